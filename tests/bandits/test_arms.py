"""S-UCB: the index by hand, plain UCB1 as its limit, a tree that tiles the square, equal seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.bandits.arms import (
    PLAYS,
    REWARDS,
    Arm,
    Rule,
    choose,
    grid,
    index,
    learn,
    middle,
    pick,
    tree,
)
from fedpeft.errors import FedpeftError
from fedpeft.streams import numpy_stream

UCB1 = Rule(decay=1.0, explore=math.sqrt(1.0), bandwidth=0.0)


def played(plays: list[float], rewards: list[float]) -> Tensor:
    table = grid([0.0], len(plays))
    table[:, PLAYS] = torch.tensor(plays, dtype=torch.float64)
    table[:, REWARDS] = torch.tensor(rewards, dtype=torch.float64)
    return table


def test_the_index_is_the_golden_one() -> None:
    found = index(played([3, 1], [1.2, 0.7]), Rule(decay=1.0, explore=0.02, bandwidth=0.0))
    assert found.tolist() == pytest.approx([0.41923, 0.73330], abs=5e-6)
    by_hand = [
        1.2 / 3 + 0.02 * math.sqrt(2 * math.log(4) / 3),
        0.7 + 0.02 * math.sqrt(2 * math.log(4)),
    ]
    assert found.tolist() == pytest.approx(by_hand, rel=1e-15)


def test_smoothing_and_pseudo_plays_are_the_formula() -> None:
    table = grid([0.0, 1.0], 2)
    table[:, PLAYS] = torch.tensor([4.0, 0.0, 1.0, 2.0])
    table[:, REWARDS] = torch.tensor([1.0, 0.0, 0.9, 0.5], dtype=torch.float64)
    rule = Rule(explore=0.1, bandwidth=0.3, plays=0.3, reward=0.5)
    centres = [(0.0, 0.25), (0.0, 0.75), (1.0, 0.25), (1.0, 0.75)]
    wanted = []
    for a in centres:
        k = [math.exp(-((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) / (2 * 0.09)) for b in centres]
        n = sum(x * y for x, y in zip(k, [4, 0, 1, 2], strict=True)) + 0.3
        s = sum(x * y for x, y in zip(k, [1, 0, 0.9, 0.5], strict=True)) + 0.15
        wanted.append(s / n + 0.1 * math.sqrt(2 * math.log(7) / n))
    assert index(table, rule).tolist() == pytest.approx(wanted, rel=1e-12)


def test_without_forgetting_and_smoothing_it_is_ucb1() -> None:
    """Counts and choices of UCB1 (Auer et al. 2002) on four Bernoulli arms, 300 plays."""
    means, table = [0.2, 0.5, 0.8, 0.6], grid([0.0], 4)
    n, s = np.zeros(4), np.zeros(4)
    coins, lots = np.random.default_rng(3), np.random.default_rng(5)
    for _ in range(300):
        arm = choose(table, UCB1, lots)
        total = max(math.e, n.sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            bounds = np.where(n > 0, s / n + np.sqrt(2 * np.log(total) / n), np.inf)
        assert bounds[arm.cell] == pytest.approx(bounds.max(), rel=1e-12)
        reward = float(coins.random() < means[arm.cell])
        table = learn(table, UCB1, arm, reward)
        n[arm.cell] += 1
        s[arm.cell] += reward
    assert table[:, PLAYS].tolist() == n.tolist() and table[:, REWARDS].tolist() == s.tolist()
    assert int(n.argmax()) == 2


def test_the_index_falls_with_plays() -> None:
    bounds = [float(index(played([n, 5.0], [0.5 * n, 1.0]), UCB1)[0]) for n in (1, 2, 4, 8, 16)]
    assert bounds == sorted(bounds, reverse=True) and len(set(bounds)) == 5


def test_forgetting_discounts_all_arms() -> None:
    table = learn(played([3, 1], [1.2, 0.7]), Rule(decay=0.5), Arm(0, 0.0, 0.25), 0.25)
    assert table[:, PLAYS].tolist() == [2.5, 0.5]
    assert table[:, REWARDS].tolist() == [0.85, 0.35]


def test_an_arm_without_plays_comes_first_and_ties_are_by_lot() -> None:
    rule = Rule(bandwidth=0.0)
    assert index(grid([0.0], 3), rule).isinf().all()
    lots = np.random.default_rng(0)
    assert {choose(grid([0.0], 3), rule, lots).cell for _ in range(50)} == {0, 1, 2}
    assert choose(played([1, 0, 1], [1, 0, 1]), rule, lots).cell == 1


def test_still_agents_play_u_zero() -> None:
    lots, rule = np.random.default_rng(0), Rule()
    for table in (grid([0.0, 0.5, 1.0], 2), _grown(40)[0]):
        table[:, PLAYS], table[:, REWARDS] = 1.0, table[:, 1]  # larger u, larger reward
        assert choose(table, rule, lots).u > 0
        arm = choose(table, rule, lots, still=True)
        assert arm.u == 0.0 and float(table[arm.cell, 0]) == 0.0


def _grown(plays: int) -> tuple[Tensor, float]:
    """A tree after so many plays of a reward that is best at (1, 0), and the plays' total."""
    table, rule, lots, total = tree(), Rule(decay=0.9), np.random.default_rng(1), 0.0
    for _ in range(plays):
        arm = choose(table, rule, lots)
        own = table[arm.cell]
        assert own[0] <= arm.u <= own[1] and own[2] <= arm.v <= own[3]
        table = learn(table, rule, arm, 0.5 * arm.u + 0.5 * (1 - arm.v))
        total = 0.9 * total + 1
    return table, total


def test_a_trees_cells_tile_the_square_down_to_the_finest() -> None:
    table, total = _grown(300)
    sides = table[:, [1, 3]] - table[:, [0, 2]]
    assert float(sides.prod(1).sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(sides.min()) >= 0.25 - 1e-12
    points = np.random.default_rng(2).uniform(size=(200, 2))
    for u, v in points:
        inside = (table[:, 0] <= u) & (u < table[:, 1]) & (table[:, 2] <= v) & (v < table[:, 3])
        assert int(inside.sum()) == 1
    assert float(table[:, PLAYS].sum()) == pytest.approx(total, rel=1e-12)
    best = table[int(index(table, Rule(explore=0.0)).argmax())]
    assert float(best[1]) == 1.0 and float(best[2]) == 0.0


def test_the_half_that_was_played_takes_over_what_is_known() -> None:
    found = learn(tree(), Rule(), Arm(0, 0.7, 0.1), 0.4)
    assert found.tolist() == [[0, 0.5, 0, 1, 0, 0], [0.5, 1, 0, 1, 1, 0.4]]
    found = learn(found, Rule(decay=1.0), Arm(1, 0.7, 0.1), 0.2)
    assert found[1].tolist() == [0.5, 1, 0, 0.5, 2, pytest.approx(0.6)]


def test_the_first_arm_is_the_middle_one() -> None:
    assert middle(tree()) == Arm(0, 0.5, 0.5)
    assert middle(tree(), still=True) == Arm(0, 0.0, 0.5)
    arm = middle(grid([0, 1 / 3, 2 / 3, 1], 5))
    assert (arm.u, arm.v) == (pytest.approx(1 / 3), pytest.approx(0.5))
    assert pick([2, 4, 8, 16, 32], arm.v) == 8
    assert pick([2, 4], 1.0) == 4 and pick([2, 4], 0.0) == 2


def test_equal_seeds_are_equal_runs() -> None:
    runs = []
    for _ in range(2):
        table, arms = grid([0.0, 1.0], 3), []
        for t in range(40):
            arm = choose(table, Rule(), numpy_stream(1, "bandit", "c", t))
            arms.append(arm)
            table = learn(table, Rule(), arm, 0.1 * arm.cell)
        runs.append((arms, table))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("wrong", [{"decay": 0.0}, {"explore": -1.0}, {"finest": 0.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(FedpeftError, match="bandit: decay="):
        Rule(**wrong)
