"""Directions from seeds: which numbers they are, and moving along them in parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft import directions, philox
from fedpeft.directions import displaced, shift
from fedpeft.tree import Layout, Tree, norm, sub

SHAPES = {"b": (3, 5), "a": (4,), "c": (2, 2, 2)}


def some_tree(dtype: torch.dtype = torch.float64) -> Tree:
    stream = torch.Generator().manual_seed(0)
    return {
        n: torch.randn(s, generator=stream, dtype=torch.float64).to(dtype)
        for n, s in SHAPES.items()
    }


def wanted(seed: int, name: str) -> np.ndarray:
    """z of a tensor, from its place among the sorted names."""
    stream = sorted(SHAPES).index(name)
    flat = philox.normals(torch.tensor([seed]), stream, int(np.prod(SHAPES[name])))[0]
    return flat.numpy().astype(np.float64).reshape(SHAPES[name])


@pytest.fixture(params=[1 << 20, 7, 1])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(directions, "AT_ONCE", request.param)
    return int(request.param)


def test_displaced_is_the_sum_written_out(at_once: int) -> None:
    start, seeds = some_tree(), torch.tensor([5, 2**61, 9, 11])
    amounts = torch.tensor([0.5, -2.0, 0.0, 1e-3], dtype=torch.float64)
    found = displaced(start, seeds, amounts)
    assert list(found) == sorted(SHAPES)
    for name, value in start.items():
        total = value.numpy().copy()
        for seed, amount in zip(seeds.tolist(), amounts.tolist(), strict=True):
            total += amount * wanted(seed, name)
        assert abs(found[name].numpy() - total).max() <= 1e-14


def test_no_movement_is_the_start_bit_by_bit() -> None:
    """KS2."""
    start = some_tree(torch.float32)
    found = displaced(start, torch.arange(100), torch.zeros(100))
    assert all(torch.equal(found[n], x) and found[n] is not x for n, x in start.items())


def test_the_order_of_seeds_does_not_matter() -> None:
    """KS3."""
    start, seeds = some_tree(torch.float32), torch.arange(300)
    amounts = torch.randn(300, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    one, two = displaced(start, seeds, amounts), displaced(start, seeds[order], amounts[order])
    assert norm(sub(one, two)) <= 1e-6 * norm(sub(one, {n: start[n] for n in one}))


def test_a_step_in_place_is_that_of_displaced_in_parts(at_once: int) -> None:
    start = some_tree(torch.float32)
    own, seed = [start[n].clone() for n in sorted(start)], torch.tensor([77])
    shift(own, seed, 0.25)
    there = displaced(start, seed, torch.tensor([0.25]))
    for found, name in zip(own, sorted(start), strict=True):
        assert torch.allclose(found, there[name], atol=1e-7)


def test_ahead_and_back_returns_to_the_start() -> None:
    """KS6: two hundred times."""
    start = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    own = [start.clone()]
    for seed in torch.arange(200).split(1):
        for amount in (5e-4, -1e-3, 5e-4):
            shift(own, seed, amount)
    assert float((own[0] - start).norm() / start.norm()) <= 1e-6


def test_rows_of_directions_are_those_of_single_seeds() -> None:
    layout, seeds = Layout.of(some_tree()), torch.tensor([3, 4])
    rows = directions.directions(seeds, layout.sizes)
    for k, seed in enumerate(seeds.tolist()):
        own = layout.unpack(rows[k : k + 1])
        assert all(np.array_equal(own[n][0].numpy(), wanted(seed, n)) for n in SHAPES)


def test_a_tensor_that_is_not_contiguous_is_moved_as_its_values_lie() -> None:
    turned = {"a": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).T}
    plain = {"a": turned["a"].contiguous()}
    seeds, amounts = torch.tensor([1]), torch.tensor([1.0])
    one, two = (displaced(tree, seeds, amounts)["a"] for tree in (turned, plain))
    assert torch.equal(one, two)


def test_slopes_times_directions_average_to_the_gradient() -> None:
    """KS5, on a quadratic: E[rho z] is its gradient, and rho the directional derivative."""
    stream = torch.Generator().manual_seed(0)
    root, at = (torch.randn(s, generator=stream, dtype=torch.float64) for s in ((6, 6), (6,)))
    hessian = root @ root.T
    z = directions.directions(torch.arange(200_000), [6]).double()
    gradient, reach = hessian @ at, 1e-3

    def loss(w: torch.Tensor) -> torch.Tensor:
        return 0.5 * (w @ hessian * w).sum(1)

    rho = (loss(at + reach * z) - loss(at - reach * z)) / (2 * reach)
    assert float((rho - z @ gradient).abs().max()) <= 1e-9 * float(rho.abs().max())
    mean = (rho[:, None] * z).mean(0)
    assert float((mean - gradient).norm() / gradient.norm()) < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_direction_is_the_same_bits_on_a_gpu() -> None:
    """KS7."""
    seeds = torch.tensor([3, 2**61])
    there = directions.directions(seeds.cuda(), [100_003, 7]).cpu()
    assert torch.equal(there, directions.directions(seeds, [100_003, 7]))
