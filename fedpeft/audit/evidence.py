"""What the scores of canaries say in all: area under the ROC, and lower bounds on epsilon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedpeft.audit import bounds
from fedpeft.audit.membership import auc_interval, check_scores, roc
from fedpeft.errors import FedpeftError

THRESHOLDS = 64
"""Candidates for a threshold, evenly spaced among the scores that choose it."""

Strength = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Upper ends of the false positive and false negative rates -> how much that says, elementwise."""


@dataclass(frozen=True)
class Evidence:
    """What canaries' scores prove, or suggest, of epsilon.

    one_run: a lower bound. two_sets, gdp: lower bounds where the canaries' scores are independent
    (of many trainings; nearly so in one, if the canaries are orthogonal); ``gdp`` for Gaussian
    mechanisms only. auc, auc_low, auc_high: the area under the ROC and its interval.
    """

    one_run: float
    two_sets: float
    gdp: float
    auc: float
    auc_low: float
    auc_high: float


def evidence(
    scores: np.ndarray,
    member: np.ndarray,
    delta: float,
    level: float = bounds.LEVEL,
    share: float = 0.1,
) -> Evidence:
    """All that ``scores`` ``[m]`` (higher: more likely in) of canaries say.

    member: bool ``[m]``, by fair coins. share: of the canaries, so many are guessed to be in and as
    many to be out; for ``one_run``, to be fixed in advance. Thresholds for the other bounds are
    chosen on the canaries of even number and judged on the others.
    """
    check_scores(scores, member)
    guesses, correct = guess(scores, member, share)
    area = roc(scores, member).auc
    members = int(member.sum())
    low, high = auc_interval(area, members, len(member) - members, level)
    chosen = split_counts(scores, member, level, bounds.epsilon_strength(delta))
    gaussian = split_counts(scores, member, level, bounds.mu_strength)
    return Evidence(
        one_run=bounds.one_run(len(scores), guesses, correct, delta, level),
        two_sets=bounds.two_sets(chosen, delta, level) if chosen else 0.0,
        gdp=bounds.gdp_epsilon(bounds.gdp(gaussian, level), delta) if gaussian else 0.0,
        auc=area,
        auc_low=low,
        auc_high=high,
    )


def guess(scores: np.ndarray, member: np.ndarray, share: float) -> tuple[int, int]:
    """Guesses the highest and the lowest ``share`` of the scores: how many guesses, how many right.

    Of equal scores those of smaller number come first, which says nothing of a coin's result.
    Raises FedpeftError for a share that leaves nothing to guess, or overlaps.
    """
    many = round(share * len(scores))
    if not 0 < share <= 0.5 or many < 1 or 2 * many > len(scores):
        raise FedpeftError(
            f"share={share} of {len(scores)} canaries, twice: must be above 0 and at most 0.5, and "
            f"at least one canary."
        )
    order = np.argsort(-scores, kind="stable")
    right = int(member[order[:many]].sum()) + int((~member[order[-many:]]).sum())
    return 2 * many, right


def split_counts(
    scores: np.ndarray, member: np.ndarray, level: float, strength: Strength
) -> bounds.Counts | None:
    """What the strongest threshold on the even-numbered canaries says of the odd-numbered ones.

    None where one of the halves has only members or only others.
    """
    for half in (member[::2], member[1::2]):
        if bool(half.all()) or not bool(half.any()):
            return None
    own, seen = scores[::2], member[::2]
    candidates = np.quantile(own, np.linspace(0, 1, THRESHOLDS), method="nearest")
    said = own >= candidates[:, None]  # [T, m / 2]
    hits, alarms = (said & seen).sum(1), (said & ~seen).sum(1)
    rates = bounds.error_rates(hits, int(seen.sum()), alarms, int((~seen).sum()), level)
    threshold = candidates[int(strength(*rates).argmax())]
    over, truth = scores[1::2] >= threshold, member[1::2]
    return bounds.Counts(
        hits=int((over & truth).sum()),
        members=int(truth.sum()),
        alarms=int((over & ~truth).sum()),
        others=int((~truth).sum()),
    )
