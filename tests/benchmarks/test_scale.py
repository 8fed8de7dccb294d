"""The scale benchmark on tiny numbers, in this process: its clients, its points, its curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import scale
from benchmarks.scale import arguments, command, measure, point, points, population, write
from benchmarks.scale_curve import draw
from fedpeft.data.store import open_store


def test_every_text_has_one_owner() -> None:
    made = population(50)
    owned = [np.concatenate([c.train, c.holdout]) for c in made.clients]
    assert np.array_equal(np.sort(np.concatenate(owned)), np.arange(len(made.examples)))
    assert {len(c.train) for c in made.clients} == {2, 3, 4, 5, 6}
    assert {len(c.holdout) for c in made.clients} == {1}
    assert list(made.clients.names) == sorted(made.clients.names)


def test_each_point_is_measured_once() -> None:
    assert points((100, 1000), (1000, 5000)) == [(1000, 1000), (5000, 100), (5000, 1000)]
    assert points((10,), (50, 20)) == [(20, 20), (50, 10), (50, 50)]


def test_a_store_and_two_points(tmp_path: Path) -> None:
    written = write(str(tmp_path / "s"), 30)
    assert written["examples"] == len(open_store(tmp_path / "s").examples)
    assert written["bytes"] > 30 * 5 * 4 * scale.TOKENS
    for cohort in (4, 9):
        found = point(str(tmp_path / "s"), cohort, rounds=2, chunk=4)
        assert (found["population"], found["cohort"], found["lane"]) == (30, cohort, "fold")
        assert len(found["seconds_per_client"]) == 2
        assert 0 < found["during"]["own"] < found["during"]["resident"] <= found["during"]["peak"]


def test_the_report_and_its_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(verb: str, path: Path, *numbers: int) -> dict[str, Any]:
        made = write(str(path), *numbers) if verb == "write" else point(str(path), *numbers)
        return {**made, "peak_pss": None}

    monkeypatch.setattr(scale, "apart", here)
    monkeypatch.setattr(scale, "COHORT", 4)
    options = arguments(["--cohorts", "4", "8", "--populations", "10", "20", "--rounds", "1"])
    found = measure(options)
    assert [(p["population"], p["cohort"]) for p in found["points"]] == [(10, 4), (20, 4), (20, 8)]
    assert [store["population"] for store in found["stores"]] == [10, 20]
    assert str(tmp_path.anchor + "tmp") not in json.dumps(found)
    assert command(options) == (
        "python -m benchmarks.scale --cohorts 4 8 --populations 10 20 --rounds 1 --chunk 64"
    )
    draw(found, tmp_path / "curve.svg")
    text = (tmp_path / "curve.svg").read_text()
    for part in ("if every reply were kept", "cohort, of 20 clients", "ms a client"):
        assert part in text
