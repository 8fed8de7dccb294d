"""Processes end with all that they started, however it hides."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from fedpeft.deploy.processes import Process, Processes, interruptible, stop
from fedpeft.errors import FedpeftError

STUBBORN = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); signal.pause()"
)
PARENT = (
    "import signal, subprocess, sys; "
    f"child = subprocess.Popen([sys.executable, '-uc', {STUBBORN!r}], stdout=subprocess.PIPE, "
    "start_new_session=True); child.stdout.readline(); print(child.pid, flush=True); signal.pause()"
)


def started(processes: Processes, folder: Path, code: str) -> Process:
    return processes.start("one", [sys.executable, "-uc", code], folder, folder)


def printed(process: Process) -> str:
    process.until(lambda: process.log.read_text().endswith("\n"), "it printed", 60)
    return process.log.read_text().strip()


def gone(pid: int) -> bool:
    """Whether a process has ended; whoever adopts orphans may not have asked it yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def processes(tmp_path: Path) -> Processes:
    return Processes(tmp_path, dict(os.environ))


def test_a_child_in_a_session_of_its_own_that_ignores_signals(
    processes: Processes, tmp_path: Path
) -> None:
    process = started(processes, tmp_path, PARENT)
    child = int(printed(process))
    assert psutil.pid_exists(child)
    stop([process.popen], grace=0.5)
    assert process.ended()
    assert gone(child)


def test_the_context_ends_them_after_a_failure(processes: Processes, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background
    with pytest.raises(FedpeftError, match="by whatever"), processes:
        process = started(processes, tmp_path, "import signal; print(1); signal.pause()")
        printed(process)
        raise FedpeftError("by whatever")
    assert process.ended()
    assert signal.getsignal(signal.SIGINT) is before


def test_what_has_ended_is_no_obstacle(processes: Processes, tmp_path: Path) -> None:
    with processes:
        assert started(processes, tmp_path, "").ended(60.0)


def test_waiting_for_what_ends_before(processes: Processes, tmp_path: Path) -> None:
    with processes:
        process = started(processes, tmp_path, "raise SystemExit(7)")
        with pytest.raises(
            FedpeftError, match=r"one ended with 7 before it listened: see .*one.log"
        ):
            process.until(lambda: False, "it listened", 60.0)


def test_waiting_for_what_never_comes(processes: Processes, tmp_path: Path) -> None:
    with processes:
        process = started(processes, tmp_path, "import signal; signal.pause()")
        with pytest.raises(
            FedpeftError, match=r"not after 0.2 seconds: it listened. See .*one.log"
        ):
            process.until(lambda: False, "it listened", 0.2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_interrupt_as_ctrl_c_does(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(number)
    assert signal.getsignal(number) == before
