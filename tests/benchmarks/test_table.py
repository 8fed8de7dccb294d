from __future__ import annotations

from benchmarks.table import Arithmetic, Run, best, render, rows
from benchmarks.ways import Way


def run(way: Way, seconds: list[float], megabytes: int = 100, gap: float | None = None) -> Run:
    count = len(seconds)
    return Run(
        "A", way, 0, seconds, [1.0] * count, [0.0] * count, 5.0, megabytes * 10**6, True, gap, {}
    )


LIMIT = Way("centralised", 1, 2, batch=64)
SLOW_LIMIT = Way("centralised", 1, 2, batch=32)
COHORT = Way("cohort", 1, 2)


def test_a_row_pools_the_rounds_of_all_repeats() -> None:
    (row,) = rows([run(COHORT, [1.0, 9.0, 2.0], 100, 1e-8), run(COHORT, [3.0, 4.0], 300, 3e-8)])
    assert (row.seconds, row.least, row.most) == (3.0, 1.0, 9.0)
    assert row.peak_bytes == 300_000_000
    assert row.gap == 3e-8


def test_the_limit_is_the_best_batch_size() -> None:
    found = rows([run(SLOW_LIMIT, [3.0]), run(LIMIT, [2.0]), run(COHORT, [2.5])])
    assert best(found)["centralised"].way == LIMIT
    cohort = next(
        line
        for line in render(found, Arithmetic(1000, 2e9, 4.0)).splitlines()
        if "| cohort" in line
    )
    cells = [cell.strip() for cell in cohort.split("|")]
    assert "1.25" in cells and "80" in cells
    assert "400" in cells  # tokens per second: 1000 in 2.5 s
    assert "20.0" in cells  # 2e12 operations in 2.5 s of a peak of 4e12 a second


def test_without_a_known_peak_no_utilisation_is_shown() -> None:
    assert Arithmetic(1000, 2e9, None).utilisation(2.5) == ""
