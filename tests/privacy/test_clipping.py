"""Clipping at client level: the bound holds to the last bit, and follows the clients' norms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.errors import FedpeftError
from fedpeft.privacy.clipping import adapt, clip, split


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [1e-3, 0.37, 1.0, 12.5])
def test_no_row_is_longer_than_the_bound(dtype: torch.dtype, bound: float) -> None:
    rows = torch.randn(300, 50, generator=stream(0), dtype=torch.float64)
    rows *= torch.logspace(-6, 6, 300, dtype=torch.float64).unsqueeze(1)
    rows = rows.to(dtype)
    found = clip(rows, bound)
    exact = rows.double().numpy()
    norms = np.array([math.sqrt(math.fsum(x * x for x in row)) for row in exact.tolist()])
    after = [math.sqrt(math.fsum(x * x for x in r)) for r in found.rows.double().tolist()]
    assert max(after) <= bound
    assert found.rows.dtype == dtype and found.broken == 0
    assert found.unclipped.tolist() == (norms <= bound).tolist()
    assert 0 < found.unclipped.sum() < 300
    expected = exact * np.minimum(1.0, bound / norms)[:, None]
    assert np.allclose(found.rows.double().numpy(), expected, rtol=2e-6, atol=0)


def test_rows_within_the_bound_are_kept_bit_for_bit() -> None:
    rows = torch.randn(5, 7, generator=stream(1))
    before = rows.clone()
    found = clip(rows, 100.0)
    assert torch.equal(found.rows, before) and torch.equal(rows, before)
    clip(rows, 0.1)
    assert torch.equal(rows, before)


def test_what_is_not_finite_becomes_zero_and_is_counted() -> None:
    rows = torch.ones(6, 3, dtype=torch.float64)
    rows[1, 0], rows[2, 1], rows[3, 2] = math.nan, math.inf, -math.inf
    rows[4] = 1e200  # finite, but not its norm
    found = clip(rows, 1.0)
    assert found.broken == 4
    assert torch.equal(found.rows[1:5], torch.zeros(4, 3, dtype=torch.float64))
    assert found.unclipped.tolist() == [False, True, True, True, True, False]
    assert found.rows[[0, 5]].norm(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_tiny_and_huge_norms_are_safe() -> None:
    rows = torch.tensor([[0.0, 0.0], [1e-45, 0.0], [3e38, 3e38], [1e-30, -1e-30]])
    found = clip(rows, 1e-6)
    assert torch.isfinite(found.rows).all() and found.broken == 0
    assert found.rows[:2].tolist() == rows[:2].tolist()
    assert found.unclipped.tolist() == [True, True, False, True]
    assert found.rows.double().norm(dim=1).max() <= 1e-6
    assert clip(torch.zeros(0, 4), 1.0).rows.shape == (0, 4)


def test_one_client_changes_the_sum_by_the_bound_at_most() -> None:
    rows = 5 * torch.randn(20, 30, generator=stream(2), dtype=torch.float64)
    rows[7] = math.nan
    total = clip(rows, 0.8).rows.sum(dim=0)
    for k in range(20):
        others = clip(torch.cat([rows[:k], rows[k + 1 :]]), 0.8).rows.sum(dim=0)
        assert (total - others).norm() <= 0.8 * (1 + 1e-12)


@pytest.mark.parametrize("rows", [torch.ones(3), torch.ones(2, 2).half(), torch.ones(2, 2).long()])
def test_other_rows_are_refused(rows: torch.Tensor) -> None:
    with pytest.raises(FedpeftError, match="float32 or float64"):
        clip(rows, 1.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_the_bound_must_be_positive_and_finite(bound: float) -> None:
    with pytest.raises(FedpeftError, match="bound="):
        clip(torch.ones(1, 1), bound)
    with pytest.raises(FedpeftError, match="bound="):
        adapt(bound, 0.5)


def bounds(start: float, rounds: int, wrong: bool = False, target: float = 0.5) -> list[float]:
    """The bound over rounds: 100 clients, log-normal norms of median 1, noise of 5 on the bits."""
    random, bound, found = np.random.default_rng(3), start, []
    for _ in range(rounds):
        norms = torch.from_numpy(random.lognormal(0.0, 1.0, 100)).unsqueeze(1)
        bits = clip(norms, bound).unclipped
        if wrong:
            bits = ~bits
        noised = (float((bits.double() - 0.5).sum()) + random.normal(0, 5)) / 100 + 0.5
        bound = adapt(bound, noised, target)
        found.append(bound)
    return found


@pytest.mark.parametrize("start", [0.1, 10.0])
def test_the_bound_goes_to_the_median(start: float) -> None:
    found = bounds(start, 160)
    assert np.median(found[60:]) == pytest.approx(1.0, abs=0.1)
    assert all(0.8 < bound < 1.25 for bound in found[60:])


def test_the_bound_goes_to_the_quantile_that_is_asked_for() -> None:
    assert np.median(bounds(1.0, 160, target=0.8)[60:]) == pytest.approx(math.exp(0.8416), rel=0.1)


@pytest.mark.parametrize(("start", "runs_to"), [(0.1, 1e-6), (10.0, 1e6)])
def test_the_clipped_bit_in_place_of_the_unclipped_runs_away(start: float, runs_to: float) -> None:
    """The negative control: what a wrong sign would do to the two tests above."""
    last = bounds(start, 200, wrong=True)[-1]
    assert last < runs_to if start < 1 else last > runs_to


def test_one_step_of_the_bound() -> None:
    assert adapt(2.0, 0.9, 0.5, 0.2) == pytest.approx(2.0 * math.exp(-0.08))
    assert adapt(2.0, 0.1, 0.5, 0.2) == pytest.approx(2.0 * math.exp(0.08))
    assert adapt(2.0, 0.5) == 2.0
    for noised in (-1e300, 1e300):
        for bound in (1e-38, 1e38):
            assert 1e-38 < adapt(bound, noised) < 1e39


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((1.0, math.nan), "noised_fraction=nan"),
        ((1.0, math.inf), "noised_fraction=inf"),
        ((1.0, 0.5, 0.0), "target=0.0"),
        ((1.0, 0.5, 1.0), "target=1.0"),
        ((1.0, 0.5, 0.5, 0.0), "rate=0.0"),
    ],
)
def test_steps_of_the_bound_that_mean_nothing_are_refused(arguments: Any, match: str) -> None:
    with pytest.raises(FedpeftError, match=match):
        adapt(*arguments)


@pytest.mark.parametrize(
    ("noise", "bits", "expected"), [(1.0, 5.0, 1.0050), (8.0, 5.0, 13.3333), (1.0, 0.6, 1.8091)]
)
def test_split_pays_for_the_bits(noise: float, bits: float, expected: float) -> None:
    found = split(noise, bits)
    assert found == pytest.approx(expected, abs=6e-5)
    # updates of sensitivity 1 and bits of sensitivity 1/2, scaled to unit noise, are one Gaussian
    assert math.hypot(1 / found, 0.5 / bits) == pytest.approx(1 / noise, rel=1e-12)


def test_bits_that_alone_cost_too_much_are_refused() -> None:
    for noise, bits in ((1.0, 0.5), (10.0, 5.0), (12.0, 5.0)):
        with pytest.raises(FedpeftError, match="must be below twice bits_std"):
            split(noise, bits)
    for arguments in ((0.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)):
        with pytest.raises(FedpeftError, match="positive and finite"):
            split(*arguments)
