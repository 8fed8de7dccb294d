"""The worker's process: it is asked, it dies, it is ended."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedpeft.site.frames import Ended, Frame
from fedpeft.site.worker import FatalError, Worker, command

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, signal, socket, sys
from fedpeft.site.frames import Frame, receive, send
connection = socket.socket(fileno=int(sys.argv[-1]))
send(connection, Frame({sys.argv[1]: "why"}))
while True:
    frame = receive(connection)
    if frame.head["kind"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    send(connection, Frame({"echo": frame.head["kind"]}, frame.body))
"""


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = Worker([sys.executable, "-c", SCRIPT, "ready"])
    found.wait_ready()
    yield found
    found.end(0.0)


def test_it_answers_and_ends_with_its_socket(worker: Worker) -> None:
    assert worker.ask(Frame({"kind": "train"}, b"abc")) == Frame(
        {"echo": "train"}, bytearray(b"abc")
    )
    assert worker.alive() and worker.memory() > 2**20
    worker.end()
    assert not worker.alive() and not psutil.pid_exists(worker.pid) and worker.memory() == 0


def test_one_that_dies_is_noticed_at_once(worker: Worker) -> None:
    with pytest.raises((Ended, ConnectionResetError)):
        worker.ask(Frame({"kind": "die"}))
    assert worker.end() == -signal.SIGKILL


def test_one_that_goes_on_is_killed(worker: Worker) -> None:
    psutil.Process(worker.pid).suspend()
    assert worker.end(0.01) == -signal.SIGKILL


def test_what_it_cannot_start_with_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = Worker([sys.executable, "-c", SCRIPT, "fatal"])
    with pytest.raises(FatalError, match="^why$"):
        found.wait_ready()
    found.end()


def test_nothing_is_imported_from_the_folder_it_runs_in() -> None:
    assert command()[1:4] == ["-P", "-m", "fedpeft.flower.resident"]
