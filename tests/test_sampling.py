"""Client sampling is fixed by the seed and has the stated distribution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedpeft.config import Sampling
from fedpeft.errors import FedpeftError
from fedpeft.sampling import check, draw, draw_failures, expected

NAMES = [f"c{i:02}" for i in range(20)]


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


def test_failures_have_the_rate_and_come_back() -> None:
    lost = [draw_failures(0.2, NAMES, 0, t) for t in range(1000)]
    assert np.mean([len(each) for each in lost]) == pytest.approx(4, abs=0.3)
    assert any("c00" in a and "c00" not in b for a, b in itertools.pairwise(lost))
    assert draw_failures(0.0, NAMES, 0, 1) == set()


def test_expected_cohort() -> None:
    assert expected(Sampling("uniform", fraction=0.5), 20) == 10
    assert expected(Sampling("fixed", size=7), 20) == 7
    assert expected(Sampling("poisson", rate=0.1), 20) == pytest.approx(2)
