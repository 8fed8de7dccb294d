"""Means over what was covered: properties, a golden example, Gamma_min and delta^2."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft import tree
from fedpeft.coverage import Coverage, reduction, update_reduction
from fedpeft.tree import Tree
from tests.strategies.toy import LAYERS, a_of, b_of, make


def drawn(clients: int, seed: int = 0) -> tuple[Tree, Tree, Tree, Tensor]:
    """Old tensors, K clients' values, masks, weights; some entries have nobody."""
    draw = torch.Generator().manual_seed(seed)
    old = {"a": torch.randn(3, 4, generator=draw), "b": torch.randn(5, generator=draw)}
    values = {n: torch.randn(clients, *x.shape, generator=draw) for n, x in old.items()}
    masks = {n: torch.rand(x.shape, generator=draw) < 0.5 for n, x in values.items()}
    masks["b"][:, 2] = False
    return old, values, masks, torch.rand(clients, generator=draw) + 0.1


def covered(old: Tree, values: Tree, masks: Tree, weights: Tensor, size: int = 99) -> Coverage:
    """In stacks of ``size`` clients."""
    cover = Coverage(old)
    for first in range(0, len(weights), size):
        part = slice(first, first + size)
        cover.add(
            {n: x[part] for n, x in values.items()},
            {n: m[part] for n, m in masks.items()},
            weights[part],
        )
    return cover


def test_the_golden_example() -> None:
    old = {"x": torch.full((4,), 9.0)}
    masks = {"x": torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]]).bool()}
    nan = torch.nan
    values = {"x": torch.tensor([[1, 2, nan, nan], [3, nan, 5, nan], [5, 4, 1, nan]])}
    cover = covered(old, values, masks, torch.ones(3))
    assert cover.mean()["x"].tolist() == [3, 3, 3, 9]
    assert cover.fill()["x"].tolist() == pytest.approx([3, 5, 5, 9])
    assert cover.least() == 0 and cover.histogram(3) == [1, 0, 2, 1]


@pytest.mark.parametrize("rule", ["mean", "fill"])
def test_against_the_rule_in_numpy_one_entry_after_another(rule: str) -> None:
    old, values, masks, weights = drawn(6)
    cover = covered(old, values, masks, weights, size=4)
    found = cover.mean() if rule == "mean" else cover.fill()
    for name, x in old.items():
        for at in np.ndindex(*x.shape):
            on = [k for k in range(6) if masks[name][(k, *at)]]
            w = weights.double().numpy()
            before = float(x[at])
            if not on:
                assert torch.equal(found[name][at], x[at]), "not the old bits"
                continue
            own = {k: float(values[name][(k, *at)]) for k in on}
            wanted = sum(w[k] * own[k] for k in on) / sum(w[k] for k in on)
            if rule == "fill":
                wanted = before + sum(w[k] * (own[k] - before) for k in on) / w.sum()
            assert float(found[name][at]) == pytest.approx(wanted, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("rule", [Coverage.mean, Coverage.fill])
def test_what_must_not_matter_does_not(rule: object) -> None:
    """Garbage under a mask, the order of clients, the scale of weights."""
    assert callable(rule)
    old, values, masks, weights = drawn(5)
    wanted = rule(covered(old, values, masks, weights))
    spoilt = {n: torch.where(masks[n], x, torch.nan) for n, x in values.items()}
    for name, value in rule(covered(old, spoilt, masks, weights)).items():
        assert torch.equal(value, wanted[name])
    order = [3, 0, 4, 2, 1]
    turned = [{n: x[order] for n, x in part.items()} for part in (values, masks)]
    for other in (
        covered(old, turned[0], turned[1], weights[order]),
        covered(old, values, masks, 8 * weights),
        covered(old, values, masks, weights, size=2),
    ):
        for name, value in rule(other).items():
            assert torch.allclose(value, wanted[name], rtol=1e-6, atol=1e-7)


def test_full_masks_give_the_mean_by_weight_and_any_mean_lies_between_its_clients() -> None:
    old, values, masks, weights = drawn(5)
    full = {n: torch.ones_like(m) for n, m in masks.items()}
    plain = tree.mean([(values, weights)])
    for cover in (covered(old, values, full, weights), covered(old, values, {}, weights)):
        for found in (cover.mean(), cover.fill()):
            for name, value in plain.items():
                assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-7)
    for name, value in covered(old, values, masks, weights).mean().items():
        low = torch.where(masks[name], values[name], torch.inf).amin(0)
        high = torch.where(masks[name], values[name], -torch.inf).amax(0)
        some = masks[name].any(0)
        assert bool((value[some] >= low[some]).all() and (value[some] <= high[some]).all())


def test_counts_equal_brute_force_and_leave_out_what_has_no_mask() -> None:
    old, values, masks, weights = drawn(7)
    counts = torch.cat([m.sum(0).flatten() for m in masks.values()])
    cover = covered(old, values, masks, weights, size=3)
    assert cover.histogram(7) == [int((counts == k).sum()) for k in range(8)]
    assert cover.least() == int(counts.min()) == 0
    only = covered(old, values, {"a": masks["a"]}, weights)
    assert only.least() == int(masks["a"].sum(0).min()) and sum(only.histogram(7)) == 12


def test_other_shapes_and_types_are_refused() -> None:
    old, values, masks, weights = drawn(2)
    for wrong in ({"a": values["a"]}, values | {"b": values["b"].double()}):
        with pytest.raises(ValueError, match="old tensors and a client's differ"):
            covered(old, wrong, masks, weights)


def test_reduction_is_that_of_dense_matrices() -> None:
    toy, draw = make(), torch.Generator().manual_seed(1)
    at = {n: torch.randn(x.shape, generator=draw).double() for n, x in toy.initial.items()}
    factors = [name(layer) for layer in LAYERS for name in (a_of, b_of)]
    masks = {n: torch.rand(4, *at[n].shape, generator=draw) < 0.6 for n in factors}
    found, dense = reduction(at, masks), update_reduction(at, masks, toy.scaling)
    for k in range(4):
        part = {n: at[n] * masks[n][k] for n in factors}
        gone = sum(float((at[n] - part[n]).square().sum()) for n in factors)
        assert float(found[k]) == pytest.approx(gone / tree.norm({n: at[n] for n in factors}) ** 2)
        whole = [toy.update(at, layer) for layer in LAYERS]
        off = [x - toy.update(part, layer) for x, layer in zip(whole, LAYERS, strict=True)]
        share = sum(float(x.square().sum()) for x in off) / sum(
            float(x.square().sum()) for x in whole
        )
        assert float(dense[k]) == pytest.approx(share)
    begun = at | {b_of(layer): torch.zeros_like(at[b_of(layer)]) for layer in LAYERS}
    assert update_reduction(begun, masks, toy.scaling).tolist() == [0.0] * 4
    full = {n: torch.ones_like(m) for n, m in masks.items()}
    assert float(reduction(at, full).max()) == 0.0
    assert float(update_reduction(at, full, toy.scaling).max()) < 1e-12
