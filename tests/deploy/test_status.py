"""What ``fedpeft deploy status`` shows, with stand-ins for Flower: running, ended, damaged."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from typer.testing import CliRunner

from fedpeft.cli.app import app
from fedpeft.deploy import commands, local, trial
from fedpeft.deploy.create import init
from fedpeft.deploy.layout import read
from fedpeft.deploy.processes import Processes
from fedpeft.deploy.status import Status, status
from fedpeft.errors import FedpeftError
from fedpeft.privacy.events import Gaussian
from fedpeft.privacy.ledger import Budget, Ledger
from fedpeft.record.metrics_log import MetricsLog

FAKES = Path(__file__).with_name("fakes.py")
SETTINGS = (
    "partition.clients=2",
    "rounds.count=5",
    "comms.budget=1 MiB",
    "privacy.unit=record",
    "privacy.epsilon=8",
    "privacy.delta=1e-4",
)
ONLINE = "2026-11-29T10:00:00+00:00"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "federation"
    init(folder, "quickstart", SETTINGS, 2, "fed.example.org:8443")
    return folder


@pytest.fixture
def federation(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, and stand-ins for the programs."""
    monkeypatch.setattr(local, "_program", lambda name: [sys.executable, str(FAKES), name])
    monkeypatch.delenv("FAKE_NODES", raising=False)
    folder = tmp_path / "federation"
    shutil.copytree(made, folder)
    return folder


def now() -> datetime:
    return datetime.now(UTC)


def key(path: Path) -> str:
    """A public key as Flower's server has it."""
    found = load_ssh_public_key(path.read_bytes())
    return found.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def answering(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: dict[str, str]) -> None:
    """The server knows both sites, the first is online."""
    places = folder / "sites"
    nodes = [
        {
            "key": key(places / f"client-{n:03}" / "node.pub"),
            "status": how,
            "online": on,
            "offline": off,
        }
        for n, how, on, off in (
            (0, "online", ONLINE, ""),
            (1, "offline", "", "2026-11-29T11:00:00"),
        )
    ]
    monkeypatch.setenv("FAKE_NODES", json.dumps([*reversed(nodes), *more]))


def record(run: Path) -> None:
    """Two rounds, the second without a client whose reason would clear the screen."""
    run.mkdir()
    log = MetricsLog(run / "metrics.jsonl")
    books = {"bytes_down": {"adapter": 1024}, "bytes_up": {"adapter": 1024}, "seconds": 1.0}
    fields: dict[str, Any] = {"clients": 2, "replies": 2, "failures": [], "loss": 1.5, **books}
    log.append("round", 1, fields)
    failures = [{"client": "client-001", "reason": "\x1b[2Jno reply"}]
    log.append("round", 2, {**fields, "replies": 1, "failures": failures})
    score = {"items": 4, "loss": 2.0, "accuracy": 0.5, "macro_f1": 0.5, "perplexity": 7.0}
    log.append("evaluation", 2, {"scope": "test", "score": score})
    checkpoint = run / "checkpoints" / "round-000002"
    checkpoint.mkdir(parents=True)
    os.utime(checkpoint, (now().timestamp() - 90, now().timestamp() - 90))


def test_while_it_runs(federation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(federation, monkeypatch)
    record(federation / "server" / "run")
    budget = Budget(8.0, 1e-4)
    with Ledger.open(federation / "sites" / "client-001" / "privacy.jsonl", budget) as ledger:
        ledger.charge(1, {"client-001": Gaussian(3.0)})
        wanted = ledger.epsilon("client-001")
    found = status(federation, now())
    assert (found.server, found.unreachable, found.warnings) == ("fed.example.org:8443", "", ())
    sites = {site.name: (site.state, site.since) for site in found.sites}
    assert sites == {
        "client-000": ("online", ONLINE),
        "client-001": ("offline", "2026-11-29T11:00:00"),
    }
    assert found.sites[0].privacy is None and found.sites[1].privacy is not None
    assert (found.sites[1].privacy.epsilon, found.sites[1].privacy.budget) == (wanted, 8.0)
    [run] = found.runs
    assert (run.id, run.status, run.down, run.up) == ("17", "finished:completed", 7, 5)
    assert (found.progress.rounds, found.progress.planned) == (2, 5)
    assert found.progress.budget == 2**20


def test_after_it_ended_the_record_is_shown(federation: Path) -> None:
    record(federation / "server" / "run")
    found = status(federation, now())
    assert "nobody is there" in found.unreachable
    assert [site.state for site in found.sites] == ["unknown", "unknown"]
    assert found.runs == () and found.progress.rounds == 2


def test_on_the_server_its_own_folder_is_enough(
    federation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(federation, monkeypatch)
    record(federation / "server" / "run")
    server = federation.with_name("server")
    (federation / "server").rename(server)
    found = status(server, now())
    assert found.server == "127.0.0.1:8443"
    assert [site.state for site in found.sites] == ["online", "offline"]
    assert found.progress.rounds == 2


def test_keys_of_nobody_are_told(federation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(federation, monkeypatch, {"key": "another", "status": "online"})
    found = status(federation, now())
    assert any("1 nodes are registered whose keys are in no file" in w for w in found.warnings)


def test_sites_that_the_server_does_not_know(
    federation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NODES", "[]")
    found = status(federation, now())
    assert {site.state for site in found.sites} == {"not registered"}


@pytest.mark.parametrize(
    ("days", "warned"), [(0, []), (800, ["ends"]), (830, ["ended"]), (3640, ["ended", "ends"])]
)
def test_a_certificate_near_its_end(federation: Path, days: int, warned: list[str]) -> None:
    found = status(federation, now() + timedelta(days=days))
    assert len(found.warnings) == len(warned)
    for text, word in zip(found.warnings, warned, strict=True):
        assert f".crt {word} on " in text
    assert all("server.crt" in text or "init" in text for text in found.warnings)


def test_a_damaged_record_does_not_hide_the_sites(
    federation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(federation, monkeypatch)
    (federation / "server" / "run").mkdir()
    (federation / "server" / "run" / "metrics.jsonl").write_text("broken\n")
    (federation / "sites" / "client-000" / "privacy.jsonl").write_text("broken\n")
    found = status(federation, now())
    assert found.sites[0].state == "online" and found.progress.rounds == 0
    assert len(found.warnings) == 2


@pytest.mark.parametrize("name", ["recipe.yaml", "server.crt", "sites/client-000.pub"])
def test_a_folder_that_is_not_whole(
    federation: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    answering(federation, monkeypatch)
    (federation / "server" / name).unlink()
    if name.endswith(".pub"):
        assert "is no public key of a node" in status(federation, now()).unreachable
        return
    with pytest.raises(FedpeftError, match=f"{name} cannot be"):
        status(federation, now())


def test_the_trial_on_this_machine_is_found(federation: Path) -> None:
    logs = federation / "logs"
    logs.mkdir()
    trial.note(logs, "127.0.0.1:1234")
    assert status(federation, now()).server == "127.0.0.1:1234"


def test_a_trial_notes_where_it_is_and_takes_the_note_away(federation: Path) -> None:
    seen = []

    def say(line: str) -> None:
        if "sites are started" in line:
            seen.append(trial.find(federation / "logs"))

    local.up(federation, say)
    assert len(seen) == 1 and str(seen[0]).startswith("127.0.0.1:")
    assert trial.find(federation / "logs") is None


@pytest.mark.parametrize("changed", [{"began": 1.0}, {"pid": 2**22 + 1}])
def test_a_note_of_a_trial_that_was_killed(federation: Path, changed: dict[str, float]) -> None:
    (federation / "logs").mkdir()
    path = federation / "logs" / trial.NOTE
    own = {"address": "127.0.0.1:9", "pid": os.getpid(), "began": psutil.Process().create_time()}
    path.write_text(json.dumps(own | changed))
    found = status(federation, now())
    assert found.server == "fed.example.org:8443"
    assert "which ended without ending what it had started" in found.warnings[0]


def test_a_note_that_is_none(tmp_path: Path) -> None:
    (tmp_path / trial.NOTE).write_text("{}")
    with pytest.raises(FedpeftError, match=r"up.json cannot be used .*: delete it"):
        trial.find(tmp_path)


def test_what_a_person_reads(federation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(federation, monkeypatch)
    record(federation / "server" / "run")
    done = CliRunner().invoke(app, ["deploy", "status", str(federation)])
    assert (done.exit_code, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "client-000 online 2026-11-29 10:00:00 –" in lines
    assert "17 finished:completed (why) 1.5 s 7 B 5 B" in lines
    assert "rounds 2 of 5" in lines
    assert "last round 1 of 2 clients in the aggregate" in lines
    assert "client-001: ?[2Jno reply" in lines
    assert "test loss 2.0000, accuracy 50.0 %" in lines
    assert "bytes 2.0 KiB down, 2.0 KiB up; 4.0 KiB of 1.0 MiB" in lines
    assert "checkpoint 2 min old" in lines
    assert "\x1b" not in done.stdout


def test_what_a_program_reads(federation: Path) -> None:
    record(federation / "server" / "run")
    done = CliRunner().invoke(app, ["deploy", "status", str(federation), "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["event"] == "status" and set(told["status"]) == set(Status.__dataclass_fields__)
    assert told["status"]["progress"]["rounds"] == 2
    assert math.isclose(told["status"]["progress"]["loss"], 1.5)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["deploy", "status", str(tmp_path)])
    assert done.exit_code == 2 and "has no deployment.json" in done.stderr


@pytest.mark.slow
def test_flowers_own_server_knows_sites_by_their_keys(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    folder, scratch = tmp_path / "federation", tmp_path / "scratch"
    shutil.copytree(made, folder)
    (folder / "logs").mkdir()
    scratch.mkdir()
    [port] = local.free_ports(1)
    with Processes(folder / "logs", local.environment(1)) as processes:
        server = local._Federation(folder, read(folder), scratch, processes, lambda line: None)
        server._serve(port)
        server._flwr(commands.register("client-001"))
        found = status(folder, now())
    assert (found.server, found.unreachable, found.runs) == (f"127.0.0.1:{port}", "", ())
    sites = {site.name: site.state for site in found.sites}
    assert sites == {"client-000": "not registered", "client-001": "registered"}
    after = status(folder, now())
    assert "SuperLink is unavailable" in after.unreachable and after.sites[1].state == "unknown"
