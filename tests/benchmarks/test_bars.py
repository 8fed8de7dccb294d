from __future__ import annotations

import pytest

from benchmarks.bars import BARS, bars
from benchmarks.table import Run, rows
from benchmarks.ways import FAMILIES, Way
from benchmarks.workload import WORKLOADS


def run(family: str, seconds: float, cores: int = 2, megabytes: int = 100, start: float = 5) -> Run:
    figures = ([seconds], [1.0], [0.0], start, megabytes * 10**6, True, None)
    return Run("A", Way(family, 1, cores), 0, *figures, {})


def verdicts(workload: str, *runs: Run) -> dict[str, str]:
    """What follows the verdict -> the verdict."""
    found = (line.split(": ", 1) for line in bars(workload, rows(runs)))
    return {text: verdict for verdict, text in found}


def test_every_bar_of_the_issue_is_there_and_names_ways_that_exist() -> None:
    assert {name: len(own) for name, own in BARS.items()} == {
        "A": 9,
        "B": 5,
        "C": 1,
        "bert-mini": 3,
        "llama-1b": 3,
    }
    assert set(BARS) <= set(WORKLOADS)
    named = {f for own in BARS.values() for bar in own for f in (*bar.ours, bar.theirs) if f}
    assert named <= set(FAMILIES)


@pytest.mark.parametrize(("other", "bound"), [("pfl", 1.2), ("flower", 1.15)])
def test_a_speed_holds_from_its_bound_on(other: str, bound: float) -> None:
    text = f"cohort: at least {bound} x as fast as {other}"
    held = verdicts("A", run("cohort", 1.0), run(other, bound))
    failed = verdicts("A", run("cohort", 1.0), run(other, bound - 0.01))
    assert held[f"{text}: {bound:.2f}"] == "pass"
    assert failed[f"{text}: {bound - 0.01:.2f}"] == "FAIL"


def test_a_time_holds_up_to_its_bound() -> None:
    text = "cohort: at most 1 x the time of centralised"
    held = verdicts("A", run("cohort", 1.0), run("centralised", 1.0))
    failed = verdicts("A", run("cohort", 1.01), run("centralised", 1.0))
    assert (held[f"{text}: 1.00"], failed[f"{text}: 1.01"]) == ("pass", "FAIL")


def test_settings_are_judged_against_the_plain_cohort() -> None:
    found = verdicts("A", run("cohort", 1.0), run("bf16", 0.58), run("clipped", 1.3))
    assert found["bf16: at least 1.7 x as fast as cohort: 1.72"] == "pass"
    assert found["clipped: at most 1.25 x the time of cohort: 1.30"] == "FAIL"


def test_memory_and_startup() -> None:
    flower = run("flower", 9.0, megabytes=300)
    light = verdicts("A", run("cohort", 1.0, megabytes=100, start=6.0), flower)
    heavy = verdicts("A", run("cohort", 1.0, megabytes=101, start=6.1), flower)
    memory, start = "cohort: at most 0.333 x the memory of flower", "cohort: first step within 6 s"
    assert (light[f"{memory}: 0.33"], heavy[f"{memory}: 0.34"]) == ("pass", "FAIL")
    assert (light[f"{start}: 6.00"], heavy[f"{start}: 6.10"]) == ("pass", "FAIL")


def test_one_core_is_compared_with_one_core() -> None:
    found = verdicts("B", run("cohort", 0.5, 2), run("cohort", 0.7, 1), run("pfl", 7.7, 1))
    assert found["cohort on one core: at least 10 x as fast as pfl: 11.00"] == "pass"


def test_on_a_gpu_the_faster_of_eager_and_compiled_counts() -> None:
    found = verdicts("bert-mini", run("cohort", 2.0), run("compiled", 1.0), run("loop", 15.5))
    assert found["cohort or compiled: at least 15 x as fast as loop: 15.50"] == "pass"


def test_a_bar_that_cannot_be_judged_says_so() -> None:
    assert set(verdicts("A").values()) == {"----"}
    assert len(verdicts("A", run("cohort", 1.0))) == 9
