"""What scores prove: how many guesses, which canaries choose a threshold and which judge it."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.audit import bounds
from fedpeft.audit.evidence import evidence, guess, split_counts
from fedpeft.errors import FedpeftError


def drawn(m: int, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    stream = np.random.default_rng(seed)
    member = stream.integers(0, 2, m) == 1
    return stream.standard_normal(m) + shift * member, member


def test_guesses_are_so_many_whatever_the_scores() -> None:
    for shift in (0.0, 1.0, 9.0):
        scores, member = drawn(500, shift)
        many, right = guess(scores, member, 0.1)
        order = sorted(range(500), key=lambda i: -scores[i])
        by_hand = sum(member[i] for i in order[:50]) + sum(not member[i] for i in order[450:])
        assert (many, right) == (100, by_hand)


def test_equal_scores_say_nothing() -> None:
    _, member = drawn(1000, 0.0)
    many, right = guess(np.zeros(1000), member, 0.25)
    assert (many, right) == (500, int(member[:250].sum()) + int((~member[750:]).sum()))
    assert 200 < right < 300
    found = evidence(np.zeros(1000), member, 1e-5)
    assert (found.one_run, found.two_sets, found.gdp) == (0, 0, 0)
    assert found.auc == 0.5


def test_evidence_is_that_of_its_parts() -> None:
    scores, member = drawn(1000, 2.0)
    found = evidence(scores, member, 1e-5)
    many, right = guess(scores, member, 0.1)
    assert found.one_run == bounds.one_run(1000, many, right, 1e-5) > 2
    assert found.auc_low < found.auc < found.auc_high
    # N(2, 1) against N(0, 1) is 2-GDP, of which both other bounds see a part
    claim = bounds.gdp_epsilon(2.0, 1e-5)
    assert 1 < found.two_sets < found.gdp < claim


def test_a_threshold_is_judged_on_other_canaries_than_chose_it() -> None:
    scores, member = drawn(400, 0.0)
    scores[::2] = member[::2]  # the even ones are told apart without fault, the odd ones not at all
    counts = split_counts(scores, member, 0.95, bounds.mu_strength)
    assert counts is not None
    assert (counts.members, counts.others) == (member[1::2].sum(), (~member[1::2]).sum())
    assert evidence(scores, member, 1e-5).two_sets < 0.3
    scores[1::2] = member[1::2]
    assert evidence(scores, member, 1e-5).two_sets > 3


def test_gdp_bound_of_a_gaussian_holds_in_19_of_20() -> None:
    claim = bounds.gdp_epsilon(1.0, 1e-5)
    found = [evidence(*drawn(500, 1.0, seed), 1e-5) for seed in range(100)]
    assert sum(e.gdp > claim for e in found) <= 5
    assert sum(e.one_run > claim for e in found) == 0
    assert np.mean([e.gdp for e in found]) > 1.5


def test_a_half_of_members_only() -> None:
    scores = np.arange(6.0)
    member = np.array([True, True, True, False, True, False])
    found = evidence(scores, member, 1e-5, share=0.5)
    assert (found.two_sets, found.gdp) == (0, 0)


@pytest.mark.parametrize("share", [0.0, 0.6, 0.001, -0.1])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(FedpeftError, match=f"share={share} of 100 canaries"):
        guess(*drawn(100, 0.0), share)
