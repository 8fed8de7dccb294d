"""``fedpeft site``: what it tells a person, how it ends; once with a real worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from fedpeft.cli.app import app
from fedpeft.config_load import dump_recipe
from fedpeft.errors import FedpeftError
from fedpeft.flower import shim, wire
from fedpeft.flower.records import Header, decode, encode_stack
from fedpeft.prepare import prepare
from fedpeft.site import process
from fedpeft.site.folder import read_config, write_config
from fedpeft.site.frames import Frame
from fedpeft.site.process import run
from fedpeft.site.server import Limits
from tests.site.fakes import FakeWorker, echo
from tests.tiny import tiny_recipe, write_tiny

ROOT = Path(__file__).parents[2]
CONFIG = {"client": "c0", "socket": "resident/site.sock", "state": "state"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # and back
    own = tmp_path / "own"
    own.mkdir()
    write_config(own, CONFIG)
    return own


def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(command: list[str]) -> Any:
        return FakeWorker(7, echo, lambda: None, 0)

    monkeypatch.setattr(process, "Worker", start)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    fake(monkeypatch)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "is ready" in line:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    assert run(folder, Limits(memory=3 * 2**30), say) == code
    assert signal.getsignal(number) is before
    assert not (folder / "resident" / "site.sock").exists()
    assert said == [
        "site c0",
        f"  socket          {folder}/resident/site.sock",
        f"  state           {folder}/state",
        "  policy          none: any recipe is taken",
        "  privacy-ledger  none",
        "  identity        none",
        "  memory          a worker above 3.0 GiB is exchanged",
        "  queue           8 requests may wait",
        "worker 7 is ready",
    ]


def test_a_second_signal_ends_it_now(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = FakeWorker(7, echo, lambda: None, 0)
    stop = process.Resident.stop

    def leave(code: int) -> None:
        raise SystemExit(code)

    def stop_and_once_more(self: process.Resident) -> None:
        stop(self)
        self._desk.close("")  # for the thread that is not ended here
        signal.raise_signal(signal.SIGTERM)

    def say(line: str) -> None:
        if "is ready" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(process, "Worker", lambda command: worker)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(process.Resident, "stop", stop_and_once_more)
    with pytest.raises(SystemExit) as ended:
        run(folder, Limits(grace=20.0), say)
    assert ended.value.code == 143 and worker.killed.is_set()


@pytest.mark.parametrize(
    ("note", "message"),
    [
        (None, "has no site.json: name a site's folder, as `fedpeft deploy init`"),
        ("{", "site.json cannot be used"),
        ('{"format": 2, "config": {}}', "it must be of format 1"),
        ('{"format": 1, "config": {"client": "a"}}', "names no socket, which a site process needs"),
        ('{"format": 1, "config": {"client": []}}', "client must be text or a number"),
    ],
)
def test_a_folder_of_something_else_is_refused(
    folder: Path, note: str | None, message: str
) -> None:
    (folder / "site.json").unlink()
    if note is not None:
        (folder / "site.json").write_text(note)
    with pytest.raises(FedpeftError, match=message):
        read_config(folder)
    done = CliRunner().invoke(app, ["site", str(folder)])
    assert done.exit_code == 2 and done.stderr.startswith("error: ")


def test_the_command_tries_a_recipe_on_the_site(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_tiny(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny_recipe(tmp_path)))
    write_config(folder, {**CONFIG, "policy": "policy.yaml"})
    (folder / "policy.yaml").write_text("max_rank: 2\n")
    words = ["site", str(folder), "--check", str(tmp_path / "recipe.yaml")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "the site takes this recipe, as c0 with 5 training examples. Digest of" in done.stdout
    os.chdir(tmp_path)
    (folder / "policy.yaml").write_text("max_rank: 1\n")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "max_rank allows 1, and adapter.r is 2" in done.stderr
    assert not (folder / "state").exists()


class Running:
    """``fedpeft site`` as a process, and its clients."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.path = folder / "resident" / "site.sock"
        self.popen = subprocess.Popen(
            [sys.executable, "-c", "from fedpeft.cli import main; main()", "site", ".", *options],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = 0

    def until(self, text: str) -> str:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            if "is ready" in line:
                self.pid = int(line.split()[2])
            if text in line:
                return str(line)
        raise AssertionError(f"it ended without {text!r}")

    def ask(self, request: Frame) -> Frame:
        return shim.handed(self.path, request, 60.0)


@pytest.fixture
def site(folder: Path, tmp_path: Path) -> Iterator[Running]:
    write_tiny(tmp_path)
    found = Running(folder)
    yield found
    found.popen.kill()
    found.popen.wait()
    assert found.popen.stdout is not None
    found.popen.stdout.close()


def requests(tmp_path: Path, **strategy: Any) -> Iterator[Frame]:
    """Train messages of rounds 1, 2, ... , the same model each time."""
    recipe = tiny_recipe(tmp_path, **strategy)
    prepared = prepare(recipe)
    sent = prepared.strategy.send(prepared.strategy.init(prepared.problem), 1, ("c0",))
    for number in range(1, 10):
        header = Header(
            number, "c0", recipe=dump_recipe(recipe), run="ab" * 16, nonce=f"{number:x}"
        )
        [content] = encode_stack(sent, [header])
        key = shim.key_of("train", content)
        yield wire.pack({"kind": "train", "config": CONFIG, "key": key}, content)


@pytest.mark.slow
def test_a_real_site_trains_survives_its_workers_death_and_ends(
    site: Running, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    asked = requests(tmp_path, name="scaffold")
    first = site.ask(next(asked))
    assert "error" not in first.head, first.head
    trees, header = decode(wire.unpack(first))
    assert (header.round, header.client) == (1, "c0") and trees.trees
    site.until("train of round 1: answered")
    before = site.pid
    [manifest] = folder.glob("state/*/manifest.json")
    second, lost = next(asked), []
    psutil.Process(before).suspend()
    asker = threading.Thread(target=lambda: lost.append(site.ask(second)))
    asker.start()
    psutil.Process(before).kill()
    asker.join()
    again = site.ask(second)
    assert "error" not in again.head, again.head
    if "error" in lost[0].head:  # else it was not under way yet, and the next worker answered
        assert "ended with -9 over this request, which is lost" in lost[0].head["error"]
    site.until("train of round 2: answered")
    assert site.pid != before
    assert len(list(manifest.parent.glob("*.safetensors"))) == 2
    site.popen.terminate()
    assert site.popen.wait(60) == 143
    assert not psutil.pid_exists(site.pid) and not site.path.exists()
