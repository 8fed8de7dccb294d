"""Client sampling is fixed by the seed and has the stated distribution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedpeft.config import Sampling
from fedpeft.errors import FedpeftError
from fedpeft.names import Names, Roster
from fedpeft.privacy.randomness import Randomness
from fedpeft.sampling import check, draw, draw_failures, expected, measured

NAMES = [f"c{i:02}" for i in range(20)]
EARLIER = {
    "fixed": ("c12", "c16", "c19"),
    "uniform": ("c05", "c11", "c13", "c18"),
    "poisson": ("c03", "c10", "c11", "c13", "c17"),
}


def test_uniform_draws_the_fraction_without_replacement() -> None:
    drawn = draw(Sampling("uniform", fraction=0.25), NAMES, 0, 1)
    assert len(drawn) == len(set(drawn)) == 5 and list(drawn) == sorted(drawn)
    assert draw(Sampling("uniform"), NAMES, 0, 1) == tuple(NAMES)
    assert len(draw(Sampling("uniform", fraction=0.001), NAMES, 0, 1)) == 1


def test_fixed_draws_exactly_size_and_refuses_more_than_there_are() -> None:
    assert {len(draw(Sampling("fixed", size=7), NAMES, 0, t)) for t in range(20)} == {7}
    with pytest.raises(FedpeftError, match=r"sampling\.size=21 .* only 20 clients.*lower it"):
        check(Sampling("fixed", size=21), 20)


def test_poisson_draws_each_client_independently() -> None:
    rounds = [draw(Sampling("poisson", rate=0.3), NAMES, 0, t) for t in range(2000)]
    sizes = np.array([len(r) for r in rounds])
    assert sizes.mean() == pytest.approx(6, abs=0.25)  # 20 * 0.3
    assert sizes.var() == pytest.approx(20 * 0.3 * 0.7, rel=0.15)
    share = np.mean(["c00" in r for r in rounds])
    assert share == pytest.approx(0.3, abs=0.04)
    assert any(len(draw(Sampling("poisson", rate=0.01), NAMES, 0, t)) == 0 for t in range(50))


@pytest.mark.parametrize("kind", ["uniform", "fixed", "poisson"])
def test_the_draw_depends_on_seed_and_round_not_on_order(kind: str) -> None:
    sampling = Sampling(kind, fraction=0.5, size=10, rate=0.5)  # type: ignore[arg-type]
    first = draw(sampling, NAMES, 3, 4)
    assert draw(sampling, NAMES[::-1], 3, 4) == first
    others = {draw(sampling, NAMES, 3, t) for t in range(5, 15)}
    others |= {draw(sampling, NAMES, s, 4) for s in range(4, 14)}
    assert len(others) > 15


@pytest.mark.parametrize("kind", ["uniform", "fixed", "poisson"])
def test_a_roster_draws_what_its_names_draw_and_reads_no_others(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(kind, fraction=0.001, size=30, rate=0.001)  # type: ignore[arg-type]
    names = [f"c{i:05}" for i in range(30_000)]
    wanted = [draw(sampling, names, seed, 1) for seed in range(3)]
    roster, plain, read = Roster(Names.of(names), np.ones(30_000)), Names.__getitem__, []

    def watched(self: Names, at: int) -> str:
        read.append(at)
        return plain(self, at)

    monkeypatch.setattr(Names, "__getitem__", watched)
    assert [draw(sampling, roster, seed, 1) for seed in range(3)] == wanted
    assert len(read) == sum(map(len, wanted)) > 50


def test_cohorts_are_those_of_earlier_versions() -> None:
    """The same seed keeps drawing the same clients."""
    assert draw(Sampling("fixed", size=3), NAMES, 0, 1) == EARLIER["fixed"]
    assert draw(Sampling("uniform", fraction=0.2), NAMES, 3, 2) == EARLIER["uniform"]
    assert draw(Sampling("poisson", rate=0.2), NAMES, 1, 5) == EARLIER["poisson"]


def test_all_are_measured_or_a_sample_by_the_seed() -> None:
    assert measured(0, NAMES, 0) == measured(20, NAMES, 0) == measured(99, NAMES, 5) == tuple(NAMES)
    some = measured(7, NAMES, 0)
    assert len(set(some)) == 7 and list(some) == sorted(some) and set(some) < set(NAMES)
    assert measured(7, NAMES, 0) == some != measured(7, NAMES, 1)


def test_failures_have_the_rate_and_come_back() -> None:
    lost = [draw_failures(0.2, NAMES, 0, t) for t in range(1000)]
    assert np.mean([len(each) for each in lost]) == pytest.approx(4, abs=0.3)
    assert any("c00" in a and "c00" not in b for a, b in itertools.pairwise(lost))
    assert draw_failures(0.0, NAMES, 0, 1) == set()


def test_expected_cohort() -> None:
    assert expected(Sampling("uniform", fraction=0.5), 20) == 10
    assert expected(Sampling("fixed", size=7), 20) == 7
    assert expected(Sampling("poisson", rate=0.1), 20) == pytest.approx(2)
    for kind in ("uniform", "fixed", "poisson"):  # before Python 3.12 an int has no is_integer
        assert type(expected(Sampling(kind), 20)) is float  # type: ignore[arg-type]


def cyclic(groups: int, seed: int = 0, rounds: int = 30) -> list[tuple[str, ...]]:
    return [draw(Sampling("cyclic", groups=groups), NAMES, seed, t) for t in range(1, rounds + 1)]


@pytest.mark.parametrize("groups", [1, 3, 7, 20])
def test_cyclic_groups_are_disjoint_and_everybody_has_a_turn(groups: int) -> None:
    turns = cyclic(groups)[:groups]
    assert sorted(itertools.chain(*turns)) == NAMES
    assert {len(turn) for turn in turns} <= {20 // groups, -(-20 // groups)}
    assert all(list(turn) == sorted(turn) for turn in turns)


@pytest.mark.parametrize("groups", [3, 7, 20])
def test_cyclic_keeps_a_clients_rounds_apart(groups: int) -> None:
    """What the noise of banded matrix factorisation rests on: never closer than ``groups``."""
    rounds = cyclic(groups)
    for name in NAMES:
        own = [t for t, drawn in enumerate(rounds, 1) if name in drawn]
        assert min(np.diff(own), default=groups) >= groups
        assert len(own) in (30 // groups, -(-30 // groups))


def test_cyclic_groups_are_drawn_by_the_seed_once() -> None:
    assert cyclic(5)[:5] == cyclic(5)[5:10] == cyclic(5)[25:30]
    assert cyclic(5) == [
        draw(Sampling("cyclic", groups=5), NAMES[::-1], 0, t) for t in range(1, 31)
    ]
    assert len({cyclic(5, seed)[0] for seed in range(10)}) > 5
    members = [{frozenset(turn) for turn in cyclic(5, seed)[:5]} for seed in range(4)]
    assert members[0] != members[1] and members[1] != members[2]


def test_cyclic_refuses_more_groups_than_clients() -> None:
    with pytest.raises(FedpeftError, match=r"groups=21 but there are only 20 clients: lower"):
        draw(Sampling("cyclic", groups=21), NAMES, 0, 1)
    assert expected(Sampling("cyclic", groups=8), 20) == 2.5


def test_secret_draws_do_not_depend_on_the_seed() -> None:
    def half(count: int) -> np.ndarray:
        return np.arange(count) / count

    sampling = Sampling("poisson", rate=0.5)
    assert {draw(sampling, NAMES, seed, t, half) for seed in range(3) for t in range(3)} == {
        tuple(NAMES[:10])
    }
    secret = Randomness.secure()
    rounds = [draw(sampling, NAMES, 0, 1, secret.uniform) for _ in range(400)]
    assert len(set(rounds)) > 390
    assert np.mean([len(one) for one in rounds]) == pytest.approx(10, abs=4 * np.sqrt(5 / 400))


def test_only_poisson_sampling_has_secret_draws() -> None:
    def never(count: int) -> np.ndarray:
        raise AssertionError("asked for secret numbers")

    for kind in ("uniform", "fixed", "cyclic"):
        draw(Sampling(kind), NAMES, 0, 1, never)  # type: ignore[arg-type]
