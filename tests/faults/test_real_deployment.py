"""A site that is killed in the middle of a run, on Flower's real processes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from fedpeft.config import Engine
from fedpeft.config_load import dump_recipe
from fedpeft.deploy.create import init
from fedpeft.engine import Seam, play_round
from fedpeft.model import save_adapter
from fedpeft.prepare import prepare
from tests.faults.register import fault
from tests.tiny import tiny_recipe, write_tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MAIN = [sys.executable, "-c", "from fedpeft.cli import main; main()"]


def kill_site(deployment: psutil.Process, name: str) -> None:
    """SIGKILL for the SuperNode of a site and all that it has started."""
    for process in deployment.children(recursive=True):
        command = " ".join(process.cmdline())
        if "supernode" in command and f'client="{name}"' in command:
            for own in [*process.children(recursive=True), process]:
                own.kill()
            return
    raise AssertionError(f"there is no SuperNode of {name}")


@fault(30, "X")
def test_a_site_that_is_killed_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tiny(tmp_path, (6, 11, 5))
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    folder = tmp_path / "federation"
    init(folder, str(tmp_path / "recipe.yaml"), sites=["c0", "c1", "c2"])
    said = []
    with subprocess.Popen(
        [*MAIN, "deploy", "up", str(folder), "--local"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout
        for line in process.stdout:
            said.append(line)
            if "round 1: 3 replies" in line:
                kill_site(psutil.Process(process.pid), "c1")
    text = "".join(said)
    assert process.returncode == 0, text
    assert "round 2: 2 replies" in text and "c1 excluded" in text
    prepared = prepare(dataclasses.replace(recipe, engine=Engine(kind="cohort", device="cpu")))
    state = prepared.strategy.init(prepared.problem)
    for number, names in ((1, ("c0", "c1", "c2")), (2, ("c0", "c2"))):
        seam = Seam(prepared.post, names)
        state, _ = play_round(
            prepared.strategy, state, prepared.federation(), recipe.rounds, 0, number, seam
        )
    adapter = prepared.strategy.adapter(state)
    save_adapter(prepared.network, adapter, tmp_path / "wanted", recipe.model.name)
    found = load_file(folder / "server" / "run" / "adapter" / "adapter_model.safetensors")
    wanted = load_file(tmp_path / "wanted" / "adapter_model.safetensors")
    for name, value in wanted.items():
        assert float((found[name] - value).abs().max()) <= 1e-5 * max(1.0, float(value.abs().max()))
