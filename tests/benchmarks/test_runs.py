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
from benchmarks.recipe import write_recipe
from benchmarks.recorder import Recorder
from benchmarks.ways import Way
from benchmarks.workload import WORKLOADS
from fedpeft.prepare import prepare

ROUNDS = 4


def run(way: Way, folder: Path, workload: str = "tiny") -> dict[str, np.ndarray]:
    folder.mkdir()
    recorder = Recorder(folder, ROUNDS, os.getpid())
    recorder.save(play(WORKLOADS[workload], way, recorder))
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


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21
@pytest.mark.parametrize("name", ["bert-mini-small", "llama-1b-small"])
def test_the_gpu_workloads_shrunk_give_the_loops_adapter_in_one_batch(
    name: str, tmp_path: Path
) -> None:
    wanted = run(Way("loop", 1, 1), tmp_path / "loop", name)
    found = run(Way("cohort", 1, 1), tmp_path / "cohort", name)
    notes = json.loads((tmp_path / "cohort" / "run.json").read_text())
    assert notes["lane"] == "fold" and notes["chunk"] >= 4
    moved = json.loads((tmp_path / "loop" / "run.json").read_text())["largest_update"]
    difference = gap(found, wanted)
    assert difference is not None and difference < 0.03 * moved  # bf16
    run(Way("centralised", 1, 1, batch=8), tmp_path / "centralised", name)


def test_workers_play_a_recipe_of_the_workloads_size(tmp_path: Path) -> None:
    run(Way("worker", 1, 1), tmp_path / "worker")
    notes = json.loads((tmp_path / "worker" / "run.json").read_text())
    assert notes["lane"] == "fold" and len(notes["seconds"]) == ROUNDS
    workload, way = WORKLOADS["tiny"], Way("worker", 1, 1)
    whole = prepare(write_recipe(workload, way, tmp_path / "again"))
    clients = whole.population.clients
    assert len(clients) == workload.population
    assert {len(c.train) for c in clients} == {workload.examples}
    assert set(whole.population.examples.lengths.tolist()) == {workload.tokens}


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
