"""Faults 30, 43, 44 and 52 on real processes: each is killed in turn, in the middle of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fedpeft.config import Engine, Output, Recipe, Rounds
from fedpeft.config_load import dump_recipe
from fedpeft.deploy.create import init
from fedpeft.deploy.processes import MARK
from fedpeft.events import Watcher
from fedpeft.run import run
from tests.faults.register import fault
from tests.tiny import tiny_recipe, write_tiny

ROOT = Path(__file__).parents[2]
MAIN = (sys.executable, "-c", "from fedpeft.cli import main; main()")
OWN = "FEDPEFT_KILL_TEST"
"""In the environment of this test's processes."""

VICTIMS = {
    1: ("flwr-serverapp", ""),
    2: ("flower-superlink", ""),
    3: ("fedpeft.flower.supernode", "c0"),
    4: ("site .", "c1"),
    5: ("fedpeft.flower.resident", "c0"),
}
"""After which round which process is killed: a part of its command line, and whose it is."""


def recipe_of(tiny: Path) -> Recipe:
    """A round with less than both sites is none: the run ends, and goes on where it was."""
    return dataclasses.replace(tiny_recipe(tiny), rounds=Rounds(count=7, quorum=1.0), baselines=())


def living(own: str, part: str = "", site: str = "") -> list[psutil.Process]:
    """The processes of this test's trial with ``part`` in their command line, of a site."""
    found = []
    for process in psutil.process_iter():
        try:
            around = process.environ()
            ours = around.get(OWN) == own and MARK in around and around[MARK].endswith(site)
            if ours and part in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def kill(own: str, part: str, site: str) -> bool:
    """Kills such a process; whether there was one."""
    for process in living(own, part, site)[:1]:
        process.kill()
        return True
    return False


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:  # it is being written
            break
    return [line for line in found if line["kind"] == kind]


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tiny(tmp_path, (6, 11))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_of(tmp_path)))
    init(tmp_path / "federation", str(tmp_path / "recipe.yaml"), sites=["c0", "c1"])
    yield tmp_path / "federation"


@pytest.mark.slow
@fault(30, "X")
@fault(43, "K")
@fault(44, "K")
@fault(52, "K")
def test_each_process_is_killed_in_turn_and_nothing_is_lost(
    federation: Path, tmp_path: Path
) -> None:
    command = [*MAIN, "deploy", "up", str(federation), "--local", "--restart"]
    out, own = federation / "server" / "run", str(tmp_path)
    with (tmp_path / "up.log").open("wb") as log:
        up = subprocess.Popen(
            [*command, "--run-config", "reply-timeout=60"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", OWN: own},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    killed: list[int] = []
    try:
        while up.poll() is None:
            done = max((line["round"] for line in lines(out, "round")), default=0)
            if done in VICTIMS and done not in killed and kill(own, *VICTIMS[done]):
                killed.append(done)
            with contextlib.suppress(subprocess.TimeoutExpired):
                up.wait(0.2)
    finally:
        up.terminate()  # only where the test itself was stopped
        up.wait()
    said = (tmp_path / "up.log").read_text()
    assert up.returncode == 0, said
    assert killed == list(VICTIMS)
    assert [line["round"] for line in lines(out, "round")] == [1, 2, 3, 4, 5, 6, 7]
    assert all(line["replies"] == 2 for line in lines(out, "round"))
    alone = dataclasses.replace(
        recipe_of(tmp_path),
        engine=Engine(kind="cohort", device="cpu"),
        output=Output(folder=str(tmp_path / "alone")),
    )
    run(alone, Watcher())
    assert lines(out, "bytes") == lines(tmp_path / "alone", "bytes")
    found, wanted = (
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (out, tmp_path / "alone")
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-5)
    assert not living(own)
