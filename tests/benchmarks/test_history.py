from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import history
from benchmarks.table import Run, rows
from benchmarks.ways import Way

WHERE: dict[str, Any] = {
    "cpu": {"model": "Some CPU", "capability": "AVX2", "cores": 2},
    "cuda": None,
    "git": {"revision": "0123456789abcdef", "modified": True},
    "packages": {"torch": "2.13.0"},
}


def run(way: Way, seconds: list[float]) -> Run:
    ones = [1.0] * len(seconds)
    return Run("A", way, 0, seconds, ones, ones, 5.0, 10**8, True, None, {})


def test_a_line_has_what_a_later_reader_needs(tmp_path: Path) -> None:
    runs = [run(Way("centralised", 1, 2, batch=64), [2.0]), run(Way("cohort", 1, 2), [2.5, 3, 9])]
    path = tmp_path / "history.jsonl"
    for _ in range(2):
        history.append(history.lines("A", rows(runs), WHERE), path)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == 4 and found[:2] == found[2:]
    date = found[1].pop("date")
    assert len(date) == 10
    assert found[1] == {
        "commit": "0123456789ab+",
        "machine": "2 cores Some CPU AVX2",
        "torch": "2.13.0",
        "workload": "A",
        "way": "cohort (1 x 2)",
        "seconds": 3.0,
        "x_centralised": 1.5,
    }


def test_without_the_limit_there_is_no_ratio() -> None:
    (line,) = history.lines("B", rows([run(Way("cohort", 1, 1), [1.0])]), WHERE)
    assert json.loads(line)["x_centralised"] is None


def test_the_committed_history_can_be_read() -> None:
    for line in history.PATH.read_text().splitlines():
        assert {"date", "commit", "machine", "workload", "way", "seconds"} <= set(json.loads(line))


def test_gpus_are_named() -> None:
    gpu = {**WHERE, "cuda": {"devices": [{"name": "NVIDIA H100"}]}}
    assert history.machine(gpu).endswith(", NVIDIA H100")
