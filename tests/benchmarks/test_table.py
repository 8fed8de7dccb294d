from __future__ import annotations

import pytest

from benchmarks.table import Run, bars, best, render, rows
from benchmarks.ways import Way, installed, variants
from benchmarks.workload import WORKLOADS


def run(way: Way, seconds: list[float], megabytes: int = 100, gap: float | None = None) -> Run:
    count = len(seconds)
    return Run(
        "A", way, 0, seconds, [1.0] * count, [0.0] * count, 5.0, megabytes * 10**6, True, gap, {}
    )


LIMIT = Way("centralised", 1, 2, batch=64)
SLOW_LIMIT = Way("centralised", 1, 2, batch=32)
COHORT = Way("cohort", 1, 2)
FLOWER = Way("flower", 2, 1)
LOOP = Way("loop", 1, 2)


def test_a_row_pools_the_rounds_of_all_repeats() -> None:
    (row,) = rows([run(COHORT, [1.0, 9.0, 2.0], 100, 1e-8), run(COHORT, [3.0, 4.0], 300, 3e-8)])
    assert (row.seconds, row.least, row.most) == (3.0, 1.0, 9.0)
    assert row.peak_bytes == 300_000_000
    assert row.gap == 3e-8


def test_the_limit_is_the_best_batch_size() -> None:
    found = rows([run(SLOW_LIMIT, [3.0]), run(LIMIT, [2.0]), run(COHORT, [2.5])])
    assert best(found)["centralised"].way == LIMIT
    cohort = next(line for line in render(found).splitlines() if "| cohort" in line)
    cells = [cell.strip() for cell in cohort.split("|")]
    assert "1.25" in cells and "80" in cells


@pytest.mark.parametrize(
    ("cohort", "flower", "megabytes", "held"),
    [
        (2.19, 2.2, 100, [True, True, True]),
        (2.21, 2.3, 100, [False, True, True]),
        (2.1, 2.0, 101, [True, False, False]),
    ],
)
def test_the_bars_of_a(cohort: float, flower: float, megabytes: int, held: list[bool]) -> None:
    found = rows([run(LIMIT, [2.0]), run(COHORT, [cohort], megabytes), run(FLOWER, [flower], 300)])
    assert [line.startswith("holds") for line in bars("A", found)] == held


@pytest.mark.parametrize(("cohort", "held"), [(1.0, True), (1.01, False)])
def test_the_bar_of_b(cohort: float, held: bool) -> None:
    (line,) = bars("B", rows([run(LOOP, [4.0]), run(COHORT, [cohort])]))
    assert line.startswith("holds") == held


def test_bars_that_cannot_be_judged_are_left_out() -> None:
    assert bars("A", rows([run(COHORT, [1.0])])) == []
    assert bars("B", rows([run(LOOP, [1.0])])) == []


def test_variants_share_the_same_number_of_threads() -> None:
    for name in ("A", "B"):
        for family in ("centralised", "cohort", "loop", "sequential", "flower", "pfl"):
            found = variants(family, WORKLOADS[name], threads=2, chunk=0)
            assert max(way.processes * way.threads for way in found) == 2
            assert len({way.label for way in found}) == len(found) > 0
    assert {w.batch for w in variants("centralised", WORKLOADS["A"], 2, 0)} == {32, 64, 128}
    assert {(w.processes, w.threads) for w in variants("flower", WORKLOADS["B"], 2, 0)} == {
        (1, 2),
        (2, 1),
    }
    assert {w.threads for w in variants("loop", WORKLOADS["B"], 2, 0)} == {1, 2}


def test_only_pfl_is_optional() -> None:
    assert installed("flower") and installed("loop")
