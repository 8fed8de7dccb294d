"""A federation on loopback: what can go wrong, with stand-ins for Flower; then in earnest."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedpeft.cli.app import app
from fedpeft.config import Engine
from fedpeft.config_load import dump_recipe
from fedpeft.deploy import local
from fedpeft.deploy.create import init
from fedpeft.deploy.local import free_ports, listens, up
from fedpeft.engine import play_round
from fedpeft.errors import FedpeftError
from fedpeft.model import save_adapter
from fedpeft.prepare import prepare
from tests.tiny import tiny_recipe, write_tiny

ROOT = Path(__file__).parents[2]
MAIN = (sys.executable, "-c", "from fedpeft.cli import main; main()")
FAKES = Path(__file__).with_name("fakes.py")


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two sites, and stand-ins for the programs; no process may be left."""
    monkeypatch.setattr(local, "_program", lambda name: [sys.executable, str(FAKES), name])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / "federation"
    init(folder, "quickstart", ["partition.clients=2"], 2)
    yield folder
    assert psutil.Process().children(recursive=True) == []
    assert [path.name for path in tmp_path.iterdir()] == ["federation"]


def test_a_run_that_is_completed(federation: Path) -> None:
    said: list[str] = []
    found = up(federation, said.append)
    assert (found.seconds, found.down, found.up) == (1.5, 7, 5)
    assert found.adapter == federation / "server" / "run" / "adapter"
    assert "INFO : round 1" in said and "" not in said
    logs = {path.name for path in (federation / "logs").iterdir()}
    sites = [f"{kind}-client-00{k}.log" for kind in ("site", "process") for k in (0, 1)]
    assert logs == {"server.log", "run.log", *sites}


@pytest.mark.parametrize("status", ["finished:failed", "finished:stopped", "pending"])
def test_a_run_that_is_not(federation: Path, monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    monkeypatch.setenv("FAKE_STATUS", status)
    done = CliRunner().invoke(app, ["deploy", "up", str(federation), "--local"])
    assert done.exit_code == 2
    assert f"error: the run ended as {status} (why): see" in done.stderr


def test_a_server_that_does_not_start(federation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SERVER", "ends")
    with pytest.raises(FedpeftError, match="server ended with 9 before it listened: see"):
        up(federation, lambda line: None)


@pytest.mark.parametrize("command", ["supernode", "run"])
def test_a_command_that_flower_refuses(
    federation: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("FAKE_REFUSED", command)
    with pytest.raises(FedpeftError, match=f"`flwr {command} .*` failed with 1: no such thing"):
        up(federation, lambda line: None)


def test_a_site_that_ends_is_named(federation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SITE", "ends")
    said: list[str] = []
    up(federation, said.append)  # whether the others suffice is for the run to say
    for site in ("client-000", "client-001"):
        assert len([line for line in said if f"site-{site} ended with 4: see" in line]) == 1


def test_an_interrupt_ends_everything(federation: Path) -> None:
    def say(line: str) -> None:
        if "sites are started" in line:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        up(federation, say)


def test_real_machines_are_started_by_hand(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["deploy", "up", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "add --local to try them" in " ".join(done.stderr.replace("│", " ").split())


def test_ports_are_free_and_different() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert not any(map(listens, ports))


def processes_in(folder: Path) -> list[str]:
    """Command lines of processes that work in the folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder):
                found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.slow
def test_two_sites_end_with_the_adapter_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tiny(tmp_path, (6, 11))
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    folder = tmp_path / "federation"
    init(folder, str(tmp_path / "recipe.yaml"), sites=["c0", "c1"])
    done = subprocess.run(
        [*MAIN, "deploy", "up", str(folder), "--local"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round 2: 2 replies" in done.stdout
    assert processes_in(folder) == []
    prepared = prepare(dataclasses.replace(recipe, engine=Engine(kind="cohort", device="cpu")))
    state = prepared.strategy.init(prepared.problem)
    federation = prepared.federation()
    for number in (1, 2):
        state, _ = play_round(
            prepared.strategy, state, federation, recipe.rounds, recipe.seed, number
        )
    adapter = prepared.strategy.adapter(state)
    save_adapter(prepared.network, adapter, tmp_path / "wanted", recipe.model.name)
    found = load_file(folder / "server" / "run" / "adapter" / "adapter_model.safetensors")
    wanted = load_file(tmp_path / "wanted" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys() and len(found) > 2
    for name, value in wanted.items():
        scale = max(1.0, float(value.abs().max()))
        assert float((found[name] - value).abs().max()) <= 1e-5 * scale
