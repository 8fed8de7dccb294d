"""The ways on the tiny workload, in this process: same adapter, everything noted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.cohort import gap
from benchmarks.one import play
from benchmarks.recorder import Recorder
from benchmarks.ways import Way
from benchmarks.workload import WORKLOADS

ROUNDS = 4


def run(way: Way, folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir()
    recorder = Recorder(folder, ROUNDS, os.getpid())
    recorder.save(play(WORKLOADS["tiny"], way, recorder))
    kept = folder / "adapter.safetensors"
    return load_file(kept) if kept.exists() else {}


def test_the_engines_give_the_adapter_of_the_hand_written_loop(tmp_path: Path) -> None:
    wanted = run(Way("loop", 1, 1), tmp_path / "loop")
    moved = json.loads((tmp_path / "loop" / "run.json").read_text())["largest_update"]
    assert moved > 1e-3
    for family, chunk in (("sequential", 0), ("cohort", 0), ("cohort", 3)):
        found = run(Way(family, 1, 1, chunk=chunk), tmp_path / f"{family}{chunk}")
        difference = gap(found, wanted)
        assert difference is not None and difference < 1e-6 * moved + 1e-7


@pytest.mark.parametrize("way", [Way("cohort", 1, 1), Way("centralised", 1, 1, batch=8)])
def test_a_run_notes_every_round_and_its_first_step(way: Way, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kept = run(way, folder)
    found = json.loads((folder / "run.json").read_text())
    for part in ("seconds", "cpu_seconds", "others"):
        assert len(found[part]) == ROUNDS
        assert min(found[part]) >= 0
    assert float((folder / "first_step").read_text()) > 0
    assert bool(kept) == (way.family == "cohort")


def test_the_compared_adapter_is_that_of_the_third_round(tmp_path: Path) -> None:
    def after(rounds: int) -> dict[str, np.ndarray]:
        folder = tmp_path / str(rounds)
        folder.mkdir(exist_ok=True)
        recorder = Recorder(folder, rounds, os.getpid())
        play(WORKLOADS["tiny"], Way("loop", 1, 1), recorder)
        return load_file(folder / "adapter.safetensors")

    assert gap(after(3), after(5)) == 0
    assert gap(after(2), after(3)) != 0


def test_gap_is_none_without_an_adapter_and_refuses_other_names() -> None:
    assert gap({}, {"a": np.zeros(2)}) is None
    assert gap({"a": np.array([1.0, 2.0])}, {"a": np.array([1.0, 2.5])}) == 0.5
    with pytest.raises(ValueError, match="differ in names"):
        gap({"a": np.zeros(2)}, {"b": np.zeros(2)})
