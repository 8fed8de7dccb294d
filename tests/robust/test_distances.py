"""Distances between updates against loops over dense differences, and which rows are refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.robust import distances, rules
from fedpeft.robust.distances import product_distances, squared_distances, squared_norms, usable


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_squared_distances_are_those_of_a_loop(dtype: torch.dtype) -> None:
    updates = draw(6, 37).to(dtype)
    rows = updates.double().numpy()
    wanted = [[float(((u - v) ** 2).sum()) for v in rows] for u in rows]
    found = squared_distances(updates)
    assert found.dtype == torch.float64
    assert np.allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-12)
    assert found.diagonal().tolist() == [0.0] * 6


def test_product_distances_are_those_of_the_dense_products() -> None:
    shapes = {"q": (5, 7), "v": (9, 4)}
    pairs = {
        layer: (draw(6, 3, d_in, seed=d_in), draw(6, d_out, 3, seed=d_out))
        for layer, (d_out, d_in) in shapes.items()
    }
    scaling = {"q": 0.5, "v": 2.0}
    wanted = np.zeros((6, 6))
    for layer, (a, b) in pairs.items():
        dense = scaling[layer] * np.einsum("kor,kri->koi", b.numpy(), a.numpy())
        for i in range(6):
            for j in range(6):
                wanted[i, j] += ((dense[i] - dense[j]) ** 2).sum()
    found = product_distances(pairs, scaling)
    assert np.allclose(found.numpy(), wanted, rtol=1e-10, atol=1e-10)
    assert found.diagonal().tolist() == [0.0] * 6


def test_products_know_no_difference_between_factors_of_one_product() -> None:
    """(A, B) and (A / c, c B) are one adapter, far apart as factors."""
    a, b = draw(1, 2, 5), draw(1, 4, 2, seed=1)
    a, b = torch.cat([a, a / 8, 0 * a]), torch.cat([b, 8 * b, b])
    found = product_distances({"x": (a, b)}, {"x": 1.0})
    assert float(found[0, 1]) == pytest.approx(0, abs=1e-12)
    assert float(found[0, 2]) == pytest.approx(float((b[0] @ a[0]).square().sum()))
    assert float(squared_distances(b.flatten(1))[0, 1]) > 1


def test_results_do_not_depend_on_the_width_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    updates, root = draw(11, 23), draw(23, seed=1)
    calls: dict[str, Callable[[], Tensor]] = {
        "norms": lambda: squared_norms(updates),
        "distances": lambda: squared_distances(updates),
        "clip": lambda: rules.norm_clip(updates),
        "median": lambda: rules.median(updates),
        "trim": lambda: rules.trimmed_mean(updates, 0.3),
        "krum": lambda: rules.krum(updates, 2),
        "multi": lambda: rules.multi_krum(updates, 2),
        "bulyan": lambda: rules.bulyan(updates, 2),
        "geometric": lambda: rules.geometric_median(updates),
        "fltrust": lambda: rules.fltrust(updates, root),
    }
    whole = {name: call() for name, call in calls.items()}
    widths: list[int] = []
    for block in (1, 55, 77):
        monkeypatch.setattr(distances, "BLOCK", block)
        widths.append(len(list(distances.blocks(updates))))
        for name, call in calls.items():
            assert torch.allclose(call(), whole[name], rtol=1e-12, atol=1e-14), name
    assert widths == [23, 5, 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_named_and_refused_by_every_rule(bad: float) -> None:
    updates = draw(7, 5).float()
    updates[4, 2] = bad
    assert usable(updates).tolist() == [True] * 4 + [False] + [True] * 2
    calls: list[Callable[[], Tensor]] = [
        lambda: squared_distances(updates),
        lambda: rules.norm_clip(updates),
        lambda: rules.norm_clip(updates, 1.0),
        lambda: rules.median(updates),
        lambda: rules.trimmed_mean(updates, 0.2),
        lambda: rules.krum(updates, 1),
        lambda: rules.krum(updates, 1, torch.zeros(7, 7)),
        lambda: rules.multi_krum(updates, 1),
        lambda: rules.bulyan(updates, 1),
        lambda: rules.geometric_median(updates),
        lambda: rules.fltrust(updates, torch.ones(5)),
    ]
    for call in calls:
        with pytest.raises(FedpeftError, match=r"updates has NaN, Inf .* in row 4 \(1 such"):
            call()


def test_numbers_that_overflow_when_squared_are_refused_and_any_of_float32_are_not() -> None:
    updates = torch.zeros(3, 2, dtype=torch.float64)
    updates[1, 0] = 1e200
    assert usable(updates).tolist() == [True, False, True]
    assert usable(torch.full((3, 1000), torch.finfo(torch.float32).max)).all()


@pytest.mark.parametrize("updates", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64)])
def test_what_is_not_a_matrix_of_updates_is_refused(updates: Tensor) -> None:
    with pytest.raises(FedpeftError, match=r"updates of shape \(3.*\[n, P\]"):
        rules.median(updates)


def test_products_without_layers_or_that_are_not_finite_are_refused() -> None:
    with pytest.raises(FedpeftError, match="pairs is empty"):
        product_distances({}, {})
    a = draw(3, 2, 5)
    a[1, 0, 0] = float("nan")
    with pytest.raises(FedpeftError, match="pairs holds NaN"):
        product_distances({"x": (a, draw(3, 4, 2))}, {"x": 1.0})
