"""Robust rules: values by hand, against loops in numpy, and what holds for any updates."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.robust import rules
from fedpeft.robust.distances import squared_distances
from fedpeft.robust.rules import (
    bulyan,
    combine,
    fltrust,
    geometric_median,
    krum,
    krum_scores,
    median,
    multi_krum,
    norm_clip,
    trimmed_mean,
)
from fedpeft.robust.settings import Robust, Rule

Matrix = np.ndarray[Any, np.dtype[np.float64]]

SIX = torch.tensor(
    [(1, 1), (1.3, 0.9), (0.9, 1.1), (1.05, 1.02), (10, -10), (1.2, 1.25)], dtype=torch.float64
)
"""Five honest updates and one far out, of which the values below were derived by hand."""

EQUIVARIANT: tuple[Rule, ...] = (
    "none",
    "median",
    "trimmed_mean",
    "krum",
    "multi_krum",
    "bulyan",
    "geometric_median",
)
"""The rules that move with their updates."""
LONE: tuple[Rule, ...] = (
    "none",
    "norm_clip",
    "median",
    "trimmed_mean",
    "geometric_median",
    "fltrust",
)
"""The rules that take a single update."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by(rule: Rule, updates: Tensor, attackers: int = 0, root: Tensor | None = None) -> Tensor:
    settings = Robust(rule, attackers, trim=0.3, smoothing=1e-12)
    return combine(settings, updates, root=draw(updates.shape[1]) if root is None else root)


def near(found: Tensor, *wanted: float, within: float = 5e-6) -> bool:
    return found.tolist() == pytest.approx(wanted, abs=within)


def test_krum_by_hand() -> None:
    scores = krum_scores(squared_distances(SIX), 1)
    assert near(scores, 0.1229, 0.3094, 0.1614, 0.1072, 598.0429, 0.2904, within=1e-9)
    assert krum(SIX, 1).tolist() == SIX[3].tolist()


def test_multi_krum_by_hand() -> None:
    assert near(multi_krum(SIX, 1, 3), 0.98333333, 1.04)
    assert near(multi_krum(SIX, 1), 1.09, 1.054)
    assert near(multi_krum(SIX, 1, 5), 1.09, 1.054)


def test_median_and_trimmed_mean_by_hand() -> None:
    assert near(median(SIX), 1.125, 1.01)
    assert near(median(SIX[:5]), 1.05, 1.0)
    assert near(trimmed_mean(SIX, 0.2), 1.1375, 1.005)


def test_geometric_median_by_hand() -> None:
    for steps, x, y in [
        (0, 2.575, -0.78833333),
        (1, 1.4383046, 0.6244007),
        (3, 1.1502510, 0.9834681),
        (4, 1.1106745, 1.0037185),
    ]:
        assert near(geometric_median(SIX, steps=steps), x, y)
    assert near(geometric_median(SIX), 1.05, 1.02, within=1e-3)
    assert near(combine(Robust("geometric_median", 1), SIX), 1.05, 1.02, within=1e-3)


def test_bulyan_by_hand() -> None:
    """Chosen are 1, 1.1, .9, 1.05 and .97; nearest to their median, 1, are 1, .97 and 1.05."""
    one = torch.tensor([1, 1.1, 0.9, 1.05, 0.97, 1.2, 9], dtype=torch.float64)[:, None]
    assert near(bulyan(one, 1), 3.02 / 3)


def test_norm_clip_by_hand() -> None:
    """Norms 5, 10 and 1, clipped to 2 and to their median 5."""
    updates = torch.tensor([[3.0, 4.0], [0.0, -10.0], [1.0, 0.0]])
    assert near(norm_clip(updates, 2.0), (1.2 + 0 + 1) / 3, (1.6 - 2 + 0) / 3)
    assert near(norm_clip(updates), (3 + 0 + 1) / 3, (4 - 5 + 0) / 3)
    assert near(norm_clip(updates, 2.0, torch.tensor([0.0, 3.0, 1.0])), 0.25, -1.5)
    assert near(norm_clip(torch.zeros(2, 2)), 0.0, 0.0)


def test_fltrust_by_hand() -> None:
    """Cosines to (2, 0): 0.6, -1 and 1, so trust .6, 0 and 1; every update at norm 2."""
    updates = torch.tensor([[3.0, 4.0], [-10.0, 0.0], [0.5, 0.0]])
    root = torch.tensor([2.0, 0.0])
    assert near(fltrust(updates, root), (0.6 * 1.2 + 1 * 2) / 1.6, 0.6 * 1.6 / 1.6)


def test_fltrust_has_the_roots_norm_for_parallel_updates_and_is_the_root_without_trust() -> None:
    root = torch.tensor([3.0, -4.0])
    assert near(fltrust(torch.stack([7 * root, 0.1 * root, root]), root), 3.0, -4.0)
    for hostile in (torch.stack([-root, -2 * root]), torch.zeros(2, 2)):
        assert fltrust(hostile, root).tolist() == root.tolist()


def krum_order(rows: Matrix, f: int) -> list[int]:
    """The numbers of the rows by their Krum score."""
    n, scores = len(rows), []
    for i in range(n):
        away = sorted(float(((rows[i] - rows[j]) ** 2).sum()) for j in range(n) if j != i)
        scores.append(sum(away[: n - f - 2]))
    return [int(k) for k in np.argsort(scores, kind="stable")]


def oracle_bulyan(rows: Matrix, f: int) -> Matrix:
    n = len(rows)
    chosen = krum_order(rows, f)[: n - 2 * f]
    found = []
    for column in rows[chosen].T:
        middle = float(np.median(column))
        found.append(np.mean(sorted(column, key=lambda v: abs(v - middle))[: n - 4 * f]))
    return np.array(found)


def oracle_geometric(rows: Matrix) -> Matrix:
    """By gradient steps of falling length, not by Weiszfeld's weights."""
    point = rows.mean(0)
    for k in range(1, 20001):
        away = np.maximum(np.linalg.norm(rows - point, axis=1), 1e-9)
        point = point + (3.0 / (k + 10)) * ((rows - point) / away[:, None]).mean(0)
    return point


@pytest.mark.parametrize("n", [7, 10, 11])
def test_rules_are_those_of_loops_in_numpy(n: int) -> None:
    updates = draw(n, 9, seed=n)
    rows, f = updates.numpy(), 1
    ordered, cut = np.sort(rows, axis=0), int(0.3 * n + 1e-9)
    wanted = {
        "median": np.median(rows, axis=0),
        "trimmed_mean": ordered[cut : n - cut].mean(0),
        "krum": rows[krum_order(rows, f)[0]],
        "multi_krum": rows[krum_order(rows, f)[: n - f]].mean(0),
        "bulyan": oracle_bulyan(rows, f),
    }
    for rule, value in wanted.items():
        assert np.allclose(by(rule, updates, f).numpy(), value, atol=1e-12), rule  # type: ignore[arg-type]
    assert np.allclose(by("geometric_median", updates).numpy(), oracle_geometric(rows), atol=2e-3)


def test_weights_count_a_client_as_often() -> None:
    updates, weights = draw(5, 4), torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0])
    repeated = updates.repeat_interleave(weights.long(), dim=0)
    for rule in ("none", "norm_clip", "geometric_median"):
        settings = Robust(rule, clip_norm=1.0, weighted=True)  # type: ignore[arg-type]
        assert torch.allclose(
            combine(settings, updates, 7 * weights), combine(settings, repeated), atol=1e-3
        )
    equal = combine(Robust("norm_clip"), updates, weights)
    assert equal.tolist() == combine(Robust("norm_clip"), updates).tolist()


@pytest.mark.parametrize("rule", get_args(Rule))
def test_the_order_of_the_clients_changes_nothing(rule: Rule) -> None:
    updates = draw(11, 6)
    wanted = by(rule, updates, 2)
    for seed in range(3):
        order = torch.randperm(11, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(by(rule, updates[order], 2), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", EQUIVARIANT)
def test_what_is_added_to_all_updates_is_added_to_the_result(rule: Rule) -> None:
    updates, shift = draw(11, 6), 100 * draw(6, seed=1)
    assert torch.allclose(by(rule, updates + shift, 2), by(rule, updates, 2) + shift, atol=1e-9)


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("factor", [1e-6, 4.0, 1e8])
def test_a_scale_of_all_updates_is_that_of_the_result(rule: Rule, factor: float) -> None:
    """With the root of FLTrust and without a norm that is fixed."""
    updates, root = draw(11, 6), draw(6, seed=1)
    wanted = factor * by(rule, updates, 2, root)
    assert torch.allclose(by(rule, factor * updates, 2, factor * root), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", get_args(Rule))
def test_equal_updates_are_the_result(rule: Rule) -> None:
    one = draw(6)
    found = by(rule, one.expand(11, 6), 2, root=one)
    assert torch.allclose(found, one, rtol=1e-12, atol=1e-12)
    zero = torch.zeros(11, 6)
    assert by(rule, zero, 2, root=one).tolist() == (one if rule == "fltrust" else zero[0]).tolist()


@pytest.mark.parametrize("rule", get_args(Rule))
def test_a_single_client_is_the_result_or_too_few(rule: Rule) -> None:
    one = draw(1, 6)
    if rule in LONE:
        assert torch.allclose(by(rule, one, root=one[0]), one[0], rtol=1e-12, atol=1e-12)
    else:
        with pytest.raises(QuorumError, match="needs at least 3 updates, there are 1"):
            by(rule, one)


HOSTILE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "one point": lambda rows, size: torch.full_like(rows, size),
    "apart": lambda rows, size: size * rows,
    "one coordinate": lambda rows, size: rows + size * torch.eye(*rows.shape, dtype=rows.dtype),
}


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("size", [1e3, 1e12, 1e30])
def test_f_outliers_leave_every_rule_bounded_but_the_mean(
    rule: Rule, hostile: str, size: float
) -> None:
    """The geometric median's bound is 2 (n - f) / (n - 2f) (Lopuhaae & Rousseeuw 1991)."""
    n, f = 11, 2
    updates = draw(n, 6)
    updates[3:5] = HOSTILE[hostile](updates[3:5], size)
    honest = torch.cat([updates[:3], updates[5:]])
    root = honest.mean(0)
    longest = float(honest.norm(dim=1).max())
    found = by(rule, updates, f, root)
    if rule == "none":
        assert float(found.norm()) > size / 100
    elif rule in ("median", "trimmed_mean", "bulyan"):
        assert bool(((found >= honest.amin(0)) & (found <= honest.amax(0))).all())
    elif rule == "krum":
        assert float((honest - found).abs().amax(1).min()) == 0
    elif rule == "multi_krum":
        assert torch.allclose(found, honest.mean(0), atol=1e-12)
    elif rule == "geometric_median":
        assert float(found.norm()) < 2 * (n - f) / (n - 2 * f) * longest
    else:
        assert float(found.norm()) <= longest


def test_few_steps_from_the_mean_leave_far_updates_their_pull() -> None:
    """R (f / (n - f))^(steps + 1), which is why ``combine`` does not start there."""
    updates = draw(10, 3)
    updates[0] = 1e9
    for steps in (1, 2, 3):
        pull = float(geometric_median(updates, steps=steps)[0])
        assert pull == pytest.approx(1e9 * (1 / 9) ** (steps + 1), rel=0.05)
        assert float(combine(Robust("geometric_median", 1, steps=steps), updates).norm()) < 3


def test_the_geometric_median_stops_where_its_objective_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    updates, seen = draw(11, 6), []

    def watched(rows: Tensor, point: Tensor) -> Tensor:
        seen.append(float((rows - point).norm(dim=1).mean()))
        return (rows - point).norm(dim=1)

    monkeypatch.setattr(rules, "_distances_to", watched)
    geometric_median(updates, steps=500)
    changes = [abs(a - b) / b for a, b in pairwise(seen)]
    assert 3 < len(seen) < 100 and changes[-1] <= 1e-6 < min(changes[:-1])


def test_more_outliers_than_assumed_move_the_result() -> None:
    """The bounds above are of f, and not of the rules being deaf."""
    updates = draw(11, 6)
    updates[:6] = 1e6
    for rule in EQUIVARIANT[1:]:
        assert float(by(rule, updates, 2).norm()) > 1e5


def test_special_cases_are_the_plain_rules() -> None:
    updates = draw(8, 5)
    mean = updates.mean(0)
    for found in (
        multi_krum(updates, 0, 8),
        trimmed_mean(updates, 0.0),
        norm_clip(updates, 1e6),
        bulyan(updates, 0),
        combine(Robust("none"), updates),
    ):
        assert torch.allclose(found, mean, atol=1e-12)
    assert multi_krum(updates, 2, 1).tolist() == krum(updates, 2).tolist()


def test_distances_of_products_choose_where_those_of_factors_choose_otherwise() -> None:
    updates = draw(7, 5)
    distances = squared_distances(draw(7, 5, seed=9))
    for rule, plain in (("krum", krum), ("multi_krum", multi_krum), ("bulyan", bulyan)):
        settings = Robust(rule, 1, space="product")  # type: ignore[arg-type]
        found = combine(settings, updates, distances=distances)
        assert found.tolist() == plain(updates, 1, distances=distances).tolist()
        assert found.tolist() != combine(Robust(rule, 1), updates, distances=distances).tolist()  # type: ignore[arg-type]
        with pytest.raises(FedpeftError, match=r"space=product needs the distances"):
            combine(settings, updates)


def test_results_are_float64_and_arguments_are_not_written_to() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        updates = draw(11, 6).to(dtype)
        before = updates.clone()
        for rule in get_args(Rule):
            found = by(rule, updates, 2)
            assert found.dtype == torch.float64 and found.shape == (6,)
            found.zero_()
        assert torch.equal(updates, before)


def test_arguments_that_a_rule_cannot_use_are_refused() -> None:
    updates = draw(7, 5)
    with pytest.raises(FedpeftError, match=r"fltrust needs the root update"):
        combine(Robust("fltrust"), updates)
    for root in (torch.zeros(5), torch.ones(4), torch.full((5,), float("nan"))):
        with pytest.raises(FedpeftError, match=r"root has shape .* of 5 finite numbers"):
            fltrust(updates, root)
    for weights in ([1.0] * 6, [-1.0] + [1.0] * 6, [0.0] * 7, [float("nan")] * 7):
        with pytest.raises(FedpeftError, match=r"weights of shape .* each of the 7 updates"):
            combine(Robust("none"), updates, torch.tensor(weights))
    for distances in (torch.zeros(6, 6), -torch.ones(7, 7), torch.full((7, 7), float("nan"))):
        with pytest.raises(FedpeftError, match=r"distances of shape .*\[7, 7\]"):
            krum(updates, 1, distances)
    with pytest.raises(QuorumError, match=r"bulyan with robust\.attackers=2 .* 11 updates.* are 7"):
        bulyan(updates, 2)
    with pytest.raises(FedpeftError, match=r"updates has NaN"):
        combine(Robust("none"), updates * float("nan"))
