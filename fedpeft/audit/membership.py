"""Membership inference: scores that are higher for members, and how well scores tell them.

A score is any number per example; ``-loss`` is the simplest, a loss threshold. LiRA compares an
example's confidence with what models say that never saw it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedpeft.audit.bounds import quantile
from fedpeft.errors import FedpeftError

FLOOR = 1e-7
"""Losses below this are not told apart: float32 has no more digits beside 1."""


@dataclass(frozen=True)
class Roc:
    """A receiver operating characteristic: rates at every threshold, from (0, 0) to (1, 1).

    fpr, tpr: ascending, ``[T]``.
    """

    fpr: np.ndarray
    tpr: np.ndarray

    @property
    def auc(self) -> float:
        """The area under it: how often a member has the higher score; ties count half."""
        return float(np.sum(np.diff(self.fpr) * (self.tpr[1:] + self.tpr[:-1]) / 2))

    def tpr_at(self, fpr: float) -> float:
        """The largest true positive rate at a false positive rate of at most ``fpr``.

        Needs 1 / fpr others to mean anything: with fewer, it is that of no false positive at all.
        """
        return float(self.tpr[np.searchsorted(self.fpr, fpr, side="right") - 1])


def roc(scores: np.ndarray, member: np.ndarray) -> Roc:
    """The ROC of scores ``[m]`` against membership (bool ``[m]``); equal scores are one threshold.

    Raises FedpeftError unless scores are finite and there are members and others.
    """
    check_scores(scores, member)
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)
    hits, alarms = np.cumsum(member[order])[last], np.cumsum(~member[order])[last]
    return Roc(np.append(0.0, alarms / alarms[-1]), np.append(0.0, hits / hits[-1]))


def auc_interval(auc: float, members: int, others: int, level: float) -> tuple[float, float]:
    """A two-sided interval of an area under the ROC, conservative, also at areas of 0 and 1.

    Wilson's for a share of ``min(members, others)`` trials: whatever the distribution of the
    scores, the area's variance is at most ``auc (1 - auc) / min(members, others)`` (van Dantzig
    1951; Cortes and Mohri 2004).
    """
    z, n = quantile((1 + level) / 2), min(members, others)
    centre = (auc + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(auc * (1 - auc) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def logit_confidence(losses: np.ndarray) -> np.ndarray:
    """``phi = log(p / (1 - p))`` of the true class's probability ``p = exp(-loss)``, elementwise.

    losses: nats. Without the loss of digits near p = 1; losses below FLOOR count as FLOOR.
    """
    bounded = np.maximum(np.asarray(losses, dtype=np.float64), FLOOR)
    found: np.ndarray = -bounded - np.log(-np.expm1(-bounded))
    return found


def lira(
    phi: np.ndarray, shadows: np.ndarray, trained_on: np.ndarray, pooled: bool = False
) -> np.ndarray:
    """Offline LiRA: ``(phi - mu_out) / sigma_out`` per example, ``[m]``; higher for members.

    phi: the attacked model's ``logit_confidence``, ``[m]``. shadows: of S shadow runs, ``[S, m]``.
    trained_on: bool ``[S, m]``, which of them had the example; these do not count. pooled: one
    sigma for all examples, better with few shadow runs (Carlini et al. 2022, arXiv 2112.03570,
    equation 4 and section VI). Raises FedpeftError where an example has fewer than 2 shadow runs
    without it, or they all say the same.
    """
    if shadows.ndim != 2 or shadows.shape != trained_on.shape or shadows.shape[1:] != phi.shape:
        raise FedpeftError(
            f"shadows of shape {shadows.shape} and trained_on of shape {trained_on.shape}: both "
            f"must be [S, m], with phi of shape {phi.shape}."
        )
    outside = np.where(trained_on, np.nan, shadows)
    many = (~trained_on).sum(axis=0)
    if int(many.min()) < 2:
        raise FedpeftError(
            f"example {int(many.argmin())} is outside of {int(many.min())} shadow runs, at least 2 "
            f"are needed: train more shadow runs (16 to 64 are usual)."
        )
    mean = np.nanmean(outside, axis=0)
    squares = np.nansum((outside - mean) ** 2, axis=0)
    if pooled:
        variance = np.full(len(phi), squares.sum() / (many - 1).sum())
    else:
        variance = squares / (many - 1)
    if not bool((variance > 0).all()):
        raise FedpeftError(
            f"all shadow runs say the same of example {int(variance.argmin())}: give them other "
            f"data or seeds, or use pooled=True."
        )
    found: np.ndarray = (phi - mean) / np.sqrt(variance)
    return found


def check_scores(scores: np.ndarray, member: np.ndarray) -> None:
    """Raises FedpeftError unless scores are finite numbers of members and of others, ``[m]``."""
    if scores.shape != member.shape or scores.ndim != 1 or member.dtype != np.bool_:
        raise FedpeftError(
            f"scores of shape {scores.shape} and member of shape {member.shape} and type "
            f"{member.dtype}: both must be [m], member of booleans."
        )
    if not bool(np.isfinite(scores).all()):
        raise FedpeftError(
            f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite: the "
            f"attacked model gives no usable loss there."
        )
    if bool(member.all()) or not bool(member.any()):
        raise FedpeftError(
            f"member is {bool(member.all())} for all {len(member)} examples: both kinds are needed."
        )
