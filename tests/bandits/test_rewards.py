"""Rewards by hand; the linear policy against weighted least squares; agents of a fleet."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.bandits import linear
from fedpeft.bandits.agents import Agents, Policy, Seen
from fedpeft.bandits.arms import grid, pick
from fedpeft.bandits.costs import BANDWIDTH, SPEED, Device, device
from fedpeft.bandits.rewards import Worth, away, fedmp, share, spine
from fedpeft.errors import FedpeftError
from fedpeft.record import codec

RANKS = (2, 4, 8, 16, 32)


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_reward_is_the_golden_one() -> None:
    """T = (10, 20, 30): x = (-1/2, 0, 1/2); .7 / 1.25, .7 / 1, .68 / 2."""
    none = torch.zeros(3, dtype=torch.bool)
    found = spine(
        away(row(10, 20, 30)), row(0.5, 1, 0.8), row(1, 0, 0.5), row(1, 0.5, 0.5), none, Worth()
    )
    assert found.tolist() == pytest.approx([0.56, 0.70, 0.34], abs=1e-15)


def test_who_has_nothing_to_prune_is_judged_by_the_other_two() -> None:
    done = torch.tensor([True, False])
    found = spine(row(0, 0), row(1, 1), row(0, 0), row(1, 1), done, Worth())
    assert found.tolist() == pytest.approx([1.0, 0.8])


def test_rewards_lie_between_0_and_1() -> None:
    draw = np.random.default_rng(0)
    for _ in range(100):
        parts = [torch.from_numpy(draw.uniform(size=6)) for _ in range(3)]
        times, done = torch.from_numpy(draw.lognormal(0, 2, 6)), torch.rand(6) < 0.5
        for found in (spine(away(times), *parts, done, Worth()), fedmp(times, parts[0] - 0.5)):
            assert bool(((found >= 0) & (found <= 1)).all())


def test_the_reward_of_fedmp_is_the_formula() -> None:
    """Mean 20, slack 1: .5 / 11, .9 / 1, and a loss that rose."""
    found = fedmp(row(10, 20, 30), row(0.5, 0.9, -0.3))
    assert found.tolist() == pytest.approx([0.5 / 11, 0.9, 0.0])
    assert float(fedmp(row(0.01, 0.01), row(3.0, 0.0))[0]) == 1.0


def test_shares_are_of_the_largest_and_what_is_not_finite_counts_nothing() -> None:
    assert share(row(2, -1, float("nan"), 4)).tolist() == [0.5, 0, 0, 1]
    assert share(row(0, -1)).tolist() == [0, 0]


def test_recursive_least_squares_are_the_weighted_ones() -> None:
    draw = np.random.default_rng(0)
    costs, times = draw.uniform(0.1, 1, (9, 2)), draw.uniform(1, 5, 9)
    fit = linear.nothing()
    for x, t in zip(costs, times, strict=True):
        fit = linear.observe(fit, torch.from_numpy(x), float(t))
    w = linear.FORGET ** np.arange(8, -1, -1)
    normal = costs.T @ (w[:, None] * costs) + linear.FORGET**9 / linear.LOOSE * np.eye(2)
    wanted = np.linalg.solve(normal, costs.T @ (w * times))
    assert fit[0].numpy() == pytest.approx(wanted, rel=1e-8)


def test_two_rounds_without_noise_are_enough_for_both_numbers() -> None:
    fit = linear.nothing()
    for work, size in ((1.0, 1.0), (0.8, 0.2)):
        fit = linear.observe(fit, row(work, size), 30 * work + 7 * size)
    assert fit[0].tolist() == pytest.approx([30, 7], rel=1e-3)
    predicted = linear.predict(fit, torch.stack([row(0.5, 0.5)]))
    assert predicted.tolist() == pytest.approx([18.5], rel=1e-3)


def test_a_client_that_plays_one_arm_for_long_stays_finite() -> None:
    fit = linear.nothing()
    for _ in range(2000):
        fit = linear.observe(fit, row(1.0, 0.5), 4.0)
    assert bool(fit.isfinite().all()) and float(fit[1:].diagonal().max()) <= linear.LOOSE * 1.001
    assert float(linear.predict(fit, torch.stack([row(1.0, 0.5)]))) == pytest.approx(4.0)


def test_the_linear_policy_gives_a_slow_client_less_to_do() -> None:
    table = grid((0.0, 1.0), len(RANKS))
    ranks = [pick(RANKS, float(v)) for v in table[:, 2]]
    costs = torch.tensor(
        [[1 - 0.1 * float(u), r / 32] for u, r in zip(table[:, 0], ranks, strict=True)]
    )
    chosen = {}
    for name, (alpha, beta) in {"slow": (5.0, 60.0), "fast": (0.5, 2.0)}.items():
        fit = linear.nothing()
        for cost in ((1.0, 1.0), (0.9, 0.25)):
            fit = linear.observe(fit, row(*cost), alpha * cost[0] + beta * cost[1])
        arm = linear.best(fit, costs, table, RANKS, 12.0, False)
        chosen[name] = pick(RANKS, arm.v)
        assert linear.best(fit, costs, table, RANKS, 12.0, True).u == 0.0
    assert chosen["slow"] < chosen["fast"] == 32


def test_the_gain_hoped_for_grows_with_the_rank() -> None:
    assert [linear.hope(r, 32) for r in (1, 32)] == [0.5, 1.0]
    assert linear.hope(1, 1) == 1.0


def test_devices_are_drawn_by_client_and_seed() -> None:
    assert device("a", 1) == device("a", 1) != device("b", 1) != device("b", 2)
    drawn = [device(f"c{k}", 0) for k in range(400)]
    assert np.median([d.speed for d in drawn]) == pytest.approx(SPEED, rel=0.1)
    assert np.median([d.bandwidth for d in drawn]) == pytest.approx(BANDWIDTH, rel=0.1)
    assert Device(10.0, 4.0).seconds(20.0, 12.0) == 5.0


SPEEDS = {"fast": 8.0, "slow": 2.0}


def run(policy: Policy, rounds: int, seed: int = 0) -> tuple[list[float], Agents]:
    """Two devices whose times depend on rank alone, but for 5 % noise; mean |x| of every round."""
    agents, found, noise = Agents(), [], np.random.default_rng(seed)
    none, all_left = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for t in range(1, rounds + 1):
        ranks = [pick(RANKS, policy.order(agents, c).v) for c in SPEEDS]
        jitter = noise.lognormal(0, 0.05, (2, 2))
        times = [(4 + r) / s for r, s in zip(ranks, SPEEDS.values(), strict=True)] * jitter[0]
        fall = [0.5 + 0.1 * np.log2(r) for r in ranks] * jitter[1]
        seen = Seen(tuple(SPEEDS), row(*fall), none, none, all_left, row(*times), goal=1.0)
        agents = policy.credit(agents, seen, {}, (seed, t))
        found.append(float(away(row(*times)).abs().mean()))
    return found, agents


@pytest.mark.parametrize("kind", ["grid", "tree", "linear"])
def test_on_two_stationary_devices_times_come_nearer(kind: str) -> None:
    """Mean |x| over the last 40 of 200 rounds, five seeds, is below that of equal ranks (0.6)."""
    policy = Policy(kind, RANKS, levels=(0.0,))  # type: ignore[arg-type]
    runs = [run(policy, 200, seed)[0] for seed in range(5)]
    assert np.mean([own[0] for own in runs]) == pytest.approx(0.6, abs=0.05)
    assert np.mean([own[-40:] for own in runs]) < 0.3


@pytest.mark.parametrize("kind", ["grid", "tree", "linear"])
def test_equal_seeds_give_equal_agents_and_a_checkpoint_holds_them(kind: str) -> None:
    policy = Policy(kind, RANKS)  # type: ignore[arg-type]
    (one, agents), (two, other) = run(policy, 12, 3), run(policy, 12, 3)
    assert one == two and agents.orders == other.orders
    tensors, plan = codec.encode(agents)
    back = codec.decode(Agents, tensors, plan)
    assert back.orders == agents.orders
    assert all(torch.equal(back.tables[c], t) for c, t in agents.tables.items())


def test_measured_times_take_the_place_of_the_models() -> None:
    policy, none = Policy("grid", RANKS, levels=(0.0,)), torch.zeros(2, dtype=torch.float64)
    seen = Seen(("a", "b"), row(1, 1), none, none, none, row(1, 1))
    by_model = policy.credit(Agents(), seen, {}, (0, 1))
    measured = policy.credit(Agents(), seen, {"a": 1.0, "b": 3.0}, (0, 1))
    rewards = [[float(t.tables[c][:, 5].sum()) for c in "ab"] for t in (by_model, measured)]
    gain = 0.6 / 0.8
    assert rewards[0] == pytest.approx([gain, gain])
    assert rewards[1] == pytest.approx([gain / 1.25, gain / 2])


def test_a_new_client_does_not_prune() -> None:
    for kind, ranks in itertools.product(("grid", "tree", "linear"), (RANKS, (4,))):
        arm = Policy(kind, ranks).order(Agents(), "new")  # type: ignore[arg-type]
        assert arm.u == 0.0 and pick(ranks, arm.v) == ranks[len(ranks) // 2]


def test_unknown_rewards_and_weights_out_of_range_are_refused() -> None:
    with pytest.raises(FedpeftError, match="reward='speed' does not exist"):
        Policy("grid", RANKS, reward="speed")
    for wrong in ({"gain": 0.9}, {"late": -1.0}, {"gain": 0.0, "importance": 0.0}):
        with pytest.raises(FedpeftError, match="bandit: gain"):
            Worth(**wrong)
