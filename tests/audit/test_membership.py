"""ROC, LiRA and their helpers against loops over pairs and examples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedpeft.audit.membership import auc_interval, lira, logit_confidence, roc
from fedpeft.errors import FedpeftError


def test_roc_is_that_of_a_loop_over_thresholds() -> None:
    stream = np.random.default_rng(0)
    scores = stream.integers(0, 12, 80) / 4  # many ties
    member = stream.integers(0, 2, 80) == 1
    found = roc(scores, member)
    points = [(0.0, 0.0)]
    for threshold in sorted(set(scores.tolist()), reverse=True):
        over = scores >= threshold
        points.append((over[~member].mean(), over[member].mean()))
    np.testing.assert_allclose(np.stack([found.fpr, found.tpr], 1), points)
    pairs = [float(a > b) + (a == b) / 2 for a in scores[member] for b in scores[~member]]
    assert found.auc == pytest.approx(np.mean(pairs))
    for fpr in (0.0, 0.01, 0.3, 1.0):
        assert found.tpr_at(fpr) == max(t for f, t in points if f <= fpr)


def test_roc_of_perfect_and_reversed_scores() -> None:
    member = np.array([True, False, True, False])
    assert roc(member.astype(float), member).auc == 1
    assert roc(member.astype(float), member).tpr_at(0.001) == 1
    assert roc(-member.astype(float), member).auc == 0


def test_auc_interval_covers_and_has_no_width_of_zero() -> None:
    stream = np.random.default_rng(2)
    true = 0.7602  # of N(1, 1) against N(0, 1)
    inside = 0
    for _ in range(300):
        own, other = stream.standard_normal(60) + 1, stream.standard_normal(40)
        area = roc(np.concatenate([own, other]), np.repeat([True, False], [60, 40])).auc
        low, high = auc_interval(area, 60, 40, 0.95)
        inside += low <= true <= high
    assert inside >= 285
    low, high = auc_interval(1.0, 100, 100, 0.95)
    assert 0.95 < low < 0.98 and high == 1
    assert auc_interval(0.0, 100, 100, 0.95) == pytest.approx((0.0, 1 - low))


def test_logit_confidence() -> None:
    p = np.array([0.001, 0.3, 0.5, 0.999])
    np.testing.assert_allclose(logit_confidence(-np.log(p)), np.log(p / (1 - p)), rtol=1e-12)
    extreme = logit_confidence(np.array([0.0, 1e-9, 800.0]))
    assert extreme[0] == extreme[1] == pytest.approx(math.log(1e7), rel=1e-6)
    assert extreme[2] == -800


@pytest.mark.parametrize("pooled", [False, True])
def test_lira_is_that_of_a_loop_over_examples(pooled: bool) -> None:
    stream = np.random.default_rng(3)
    shadows = stream.standard_normal((16, 9)) * np.linspace(0.5, 3, 9) + np.arange(9)
    trained_on = stream.integers(0, 2, (16, 9)) == 1
    phi = stream.standard_normal(9) + np.arange(9)
    outside = [shadows[~trained_on[:, i], i] for i in range(9)]
    sums = [((own - own.mean()) ** 2).sum() for own in outside]
    free = [len(own) - 1 for own in outside]
    for i, found in enumerate(lira(phi, shadows, trained_on, pooled)):
        variance = sum(sums) / sum(free) if pooled else sums[i] / free[i]
        assert found == pytest.approx((phi[i] - outside[i].mean()) / math.sqrt(variance))


def test_lira_tells_members_where_losses_do_not() -> None:
    stream = np.random.default_rng(4)
    hard = stream.standard_normal(400) * 5  # how hard an example is, for every model
    member = stream.integers(0, 2, 400) == 1
    shadows = hard + 0.5 * stream.standard_normal((16, 400))
    phi = hard + 0.5 * stream.standard_normal(400) + 1.5 * member
    found = roc(lira(phi, shadows, np.zeros((16, 400), bool)), member)
    assert found.auc > 0.9 > 0.65 > roc(phi, member).auc
    assert found.tpr_at(0.01) > 0.2 > roc(phi, member).tpr_at(0.01)


@pytest.mark.parametrize(
    ("shadows", "trained_on", "message"),
    [
        (np.zeros((4, 2)), np.zeros((4, 3), bool), "both must be [S, m]"),
        (np.zeros((4, 2)), np.zeros((4, 2), bool), "both must be [S, m]"),
        (np.eye(3), np.ones((3, 3), bool), "outside of 0 shadow runs"),
        (np.eye(3), np.array([[0, 1, 0], [0, 1, 0], [0, 0, 0]], bool), "example 1 is outside of 1"),
        (np.zeros((3, 3)), np.zeros((3, 3), bool), "say the same of example 0"),
    ],
)
def test_lira_refuses(shadows: np.ndarray, trained_on: np.ndarray, message: str) -> None:
    with pytest.raises(FedpeftError) as error:
        lira(np.zeros(3), shadows, trained_on)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("scores", "member", "message"),
    [
        ([0.0, 1.0], [True], "both must be [m]"),
        ([0.0, 1.0], [1, 0], "member of booleans"),
        ([math.nan, math.inf, 1.0], [True, False, True], "2 of 3 scores are not finite"),
        ([0.0, 1.0], [True, True], "member is True for all 2"),
        ([0.0, 1.0], [False, False], "member is False for all 2"),
    ],
)
def test_scores_that_are_refused(scores: list[float], member: list[object], message: str) -> None:
    with pytest.raises(FedpeftError) as error:
        roc(np.array(scores), np.array(member))
    assert message in str(error.value)
