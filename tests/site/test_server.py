"""The resident process: one after another, each once, and whoever waits is told what happened."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from fedpeft.errors import FedpeftError
from fedpeft.site.frames import Ended, Frame, connect, receive, send
from fedpeft.site.server import ENDING, Limits, backoff
from fedpeft.site.worker import FatalError
from tests.site.fakes import Dies, Site, echo


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "own" / "s"


class Gate:
    """An answer that waits until it is let through; it knows what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.begun = threading.Semaphore(0)
        self.let = threading.Semaphore(0)

    def __call__(self, frame: Frame) -> Frame:
        self.asked.append(frame.head["kind"])
        self.begun.release()
        assert self.let.acquire(timeout=20)
        return echo(frame)


def test_requests_are_answered_by_one_worker(path: Path) -> None:
    site = Site(path)
    with site.served():
        for number in range(3):
            found = site.ask("train", body=b"%d" % number)
            assert (found.head, bytes(found.body)) == ({"echo": "train"}, b"%d" % number)
    assert len(site.workers) == 1 and site.workers[0].ended
    assert site.delays == []


def test_two_processes_for_one_message_get_one_answer(path: Path) -> None:
    gate = Gate()
    site = Site(path, answer=gate)
    key = ["train", "run", 1, 0, "c0", "nonce"]
    with site.served():
        first = site.asked("train", key, b"1")
        assert gate.begun.acquire(timeout=20)
        second = site.asked("train", key, b"1")
        gate.let.release()
        answers = [receive(first), receive(second), site.ask("train", key, b"1")]
        assert [bytes(a.body) for a in answers] == [b"1", b"1", b"1"]
        assert gate.asked == ["train"]
        gate.let.release()
        site.ask("train", [*key[:-1], "other"])
        gate.let.release(2)
        site.ask("train")
        site.ask("train")  # without a key nothing is known to be the same
    assert len(gate.asked) == 4


def test_beyond_the_queue_a_request_is_refused(path: Path) -> None:
    gate = Gate()
    site = Site(path, answer=gate)
    with site.served():
        under_way = site.asked("train")
        assert gate.begun.acquire(timeout=20)
        submitted = [site.asked("train", [k]) for k in range(2)]
        site.until_waiting(2)
        assert site.ask("evaluate").head["error"] == (
            "FedpeftError: 2 requests wait at this site, and --queue=2: ask again later, or raise "
            "--queue."
        )
        gate.let.release(3)
        assert [receive(c).head["echo"] for c in (under_way, *submitted)] == ["train"] * 3


def test_who_waits_for_a_worker_that_dies_is_told_and_the_next_one_answers(path: Path) -> None:
    def answer(frame: Frame) -> Frame:
        if bytes(frame.body) == b"bad":
            raise Dies
        return echo(frame)

    site = Site(path, answer=answer)
    key = ["train", "run", 1]
    with site.served():
        lost = site.ask("train", key, b"bad")
        assert lost.head == {
            "error": "FedpeftError: the site's worker ended with -9 over this request, which is "
            "lost."
        }
        assert site.ask("train", key, b"good").head == {"echo": "train"}  # asked again, not kept
        assert site.ask("train", None, b"bad").head.keys() == {"error"}
        assert site.ask("train", None, b"bad").head.keys() == {"error"}
        assert site.ask("train").head == {"echo": "train"}
    assert len(site.workers) == 4
    assert site.delays == [1, 1, 2]  # an answer ends the count


def test_workers_that_die_come_back_later_and_later() -> None:
    assert [backoff(n) for n in (1, 2, 3)] == [0.5, 1.0, 2.0]
    assert backoff(50) == 60.0


def test_a_worker_that_died_between_messages_is_replaced_first(path: Path) -> None:
    site = Site(path)
    with site.served():
        site.ask("train")
        site.workers[0].ended = True
        assert site.ask("train").head == {"echo": "train"}
    assert len(site.workers) == 2


def test_a_worker_that_never_starts_does_not_keep_anybody_waiting(path: Path) -> None:
    ready = threading.Semaphore(0)
    tries = 0

    def wait_ready() -> None:
        nonlocal tries
        assert ready.acquire(timeout=20)
        tries += 1
        if tries < 3:
            raise Ended("gone")

    site = Site(path, ready=wait_ready)
    with site.served():
        for _ in range(2):
            waiting = site.asked("train")
            site.until_waiting(1)
            ready.release()
            assert "worker does not start: see the site's log" in receive(waiting).head["error"]
        ready.release()
        assert site.ask("train").head == {"echo": "train"}
    assert site.delays == [1, 2]


def test_a_worker_that_has_grown_is_exchanged_between_two_messages(path: Path) -> None:
    site = Site(path, limits=Limits(memory=100), size=101)
    with site.served():
        assert site.ask("train").head == {"echo": "train"}
        assert site.ask("train").head == {"echo": "train"}
    assert len(site.workers) >= 2 and site.workers[0].ended
    assert any("grown beyond" in line for line in site.said)
    assert site.delays == []


def test_what_cannot_start_at_all_ends_the_process(path: Path) -> None:
    def wait_ready() -> None:
        raise FatalError("policy 'p': unknown key")

    site = Site(path, ready=wait_ready)
    with site.served() as resident:
        while not resident._stopping.is_set():
            pass
    assert [str(error) for error in site.fault] == ["policy 'p': unknown key"]
    assert isinstance(site.fault[0], FedpeftError)


def test_the_message_under_way_is_finished_and_the_waiting_one_refused(path: Path) -> None:
    gate = Gate()
    site = Site(path, answer=gate)
    with site.served() as resident:
        under_way = site.asked("train")
        assert gate.begun.acquire(timeout=20)
        waiting = site.asked("train", [1])
        site.until_waiting(1)
        resident.stop()
        assert receive(waiting).head == {"error": f"FedpeftError: {ENDING}"}
        gate.let.release()
        assert receive(under_way).head == {"echo": "train"}


def test_after_its_grace_the_message_under_way_is_dropped(path: Path) -> None:
    site = Site(path, limits=Limits(grace=0.0))
    begun = threading.Event()

    def answer(frame: Frame) -> Frame:
        begun.set()
        assert site.workers[0].killed.wait(20)
        raise Dies

    site.answer = answer
    with site.served() as resident:
        under_way = site.asked("train")
        assert begun.wait(20)
        resident.stop()
        assert "which is lost" in receive(under_way).head["error"]


def test_who_says_nonsense_is_dropped_and_others_are_served(path: Path) -> None:
    site = Site(path)
    with site.served():
        with connect(path) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with pytest.raises((Ended, ConnectionResetError)):
                receive(connection)
        assert site.ask("train").head == {"echo": "train"}
    assert any("is no frame of fedpeft's" in line for line in site.said)


def test_another_version_gets_a_greeting_and_no_more(path: Path) -> None:
    site = Site(path)
    with site.served(), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        send(connection, Frame({"protocol": 0, "version": "0.0.1"}))
        assert receive(connection).head["protocol"] == 1
        with pytest.raises(Ended):
            receive(connection)
    assert any("fedpeft 0.0.1 (protocol 0)" in line for line in site.said)
