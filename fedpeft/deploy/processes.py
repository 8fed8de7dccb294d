"""Processes that belong together: all their descendants end with them.

Flower's programs start their children in sessions of their own, so that neither Ctrl-C nor a
signal to a process group reaches them; here they are found by parentage. Those of a process that
was killed have no parent any more, and are found by a mark in their environment.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from fedpeft.errors import FedpeftError

STEP = 0.2
"""Seconds between two looks at a process."""

GRACE = 5.0
"""Seconds that processes have to end by themselves, before they are killed."""


LASTING, LONGEST = 60.0, 16.0
"""Seconds of life after which an end is a first one; the longest wait before another start.

Flower 1.41 refuses a node that it holds for connected, which it does for a minute after its death.
"""

MARK = "FEDPEFT_TRIAL"
"""In the environment of everything that was started together, and by it."""


@dataclass
class Process:
    """A process with a name, and the file that its output goes to.

    fails: how often it ended soon after its start, in a row. began, due: when it was started, and
    when it may be once more after it ended (0: not decided), by the monotonic clock.
    """

    name: str
    popen: subprocess.Popen[bytes]
    log: Path
    command: Sequence[str] = ()
    folder: Path = Path()
    home: Path = Path()
    fails: int = 0
    began: float = field(default_factory=time.monotonic)
    due: float = 0.0

    def waits(self, now: float) -> bool:
        """Of one that ended: whether it is too early to start it again; the first call decides."""
        if not self.due:
            self.fails = 0 if now - self.began > LASTING else self.fails + 1
            self.due = now + min(LONGEST, 2.0**self.fails)
        return now < self.due

    def ended(self, seconds: float = 0.0) -> bool:
        """Waits so long for the process to end; whether it has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(seconds)
        return self.popen.poll() is not None

    def until(self, ready: Callable[[], bool], what: str, seconds: float) -> None:
        """Waits while the process lives and is not ``ready``. Raises FedpeftError."""
        for _ in range(max(1, round(seconds / STEP))):
            if ready():
                return
            if self.ended(STEP):
                raise FedpeftError(
                    f"{self.name} ended with {self.popen.returncode} before {what}: see {self.log}."
                )
        raise FedpeftError(f"{self.name}: not after {seconds:g} seconds: {what}. See {self.log}.")


@dataclass
class Processes:
    """What was started, with all that it starts; the context ends it all, whatever happens.

    logs: the folder of ``NAME.log``. environment: of all processes.
    """

    logs: Path
    environment: Mapping[str, str]
    started: list[Process] = field(default_factory=list)
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        with _undisturbed():
            stop([process.popen for process in self.started])
            self._sweep()

    def start(self, name: str, command: Sequence[str], folder: Path, home: Path) -> Process:
        """Starts a process in ``folder``, in a session of its own. home: of Flower's own files."""
        log = self.logs / f"{name}.log"
        log.unlink(missing_ok=True)
        popen = self._open(log, command, folder, home)
        self.started.append(Process(name, popen, log, command, folder, home))
        return self.started[-1]

    def restart(self, process: Process) -> None:
        """Starts a process that ended once more, after what is left of its children is ended."""
        self._sweep(process.home)
        process.popen = self._open(process.log, process.command, process.folder, process.home)
        process.began, process.due = time.monotonic(), 0.0

    def _open(
        self, log: Path, command: Sequence[str], folder: Path, home: Path
    ) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            return subprocess.Popen(
                command,
                cwd=folder,
                env={**self.environment, MARK: f"{self.mark}:{home}", "FLWR_HOME": str(home)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _sweep(self, home: Path | None = None) -> None:
        """Kills what has no living parent among what was started; home: of this process's only."""
        own = {p.popen.pid for p in self.started if p.popen.poll() is None}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                mark, _, place = process.environ().get(MARK, "").partition(":")
                if mark != self.mark or (home is not None and place != str(home)):
                    continue
                above = {process.pid, *(parent.pid for parent in process.parents())}
                if not above & own:
                    process.kill()


def stop(popens: Sequence[subprocess.Popen[bytes]], grace: float = GRACE) -> None:
    """Ends processes and all their descendants: asked first, after ``grace`` seconds killed.

    All are halted before they are asked, so that none can start another one unseen.
    """
    family = _halted(popens)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
            process.resume()
    _, alive = psutil.wait_procs(family, grace)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, grace)
    for popen in popens:
        popen.wait()


def _halted(popens: Sequence[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    """The processes that live, and their descendants, all stopped."""
    waiting: list[psutil.Process] = []
    for popen in popens:
        if popen.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                waiting.append(psutil.Process(popen.pid))
    found: list[psutil.Process] = []
    while waiting:
        process = waiting.pop()
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
            found.append(process)
            waiting += process.children()
    return found


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt inside, as Ctrl-C does; in the main thread."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled({signal.SIGTERM: interrupt, signal.SIGHUP: interrupt}):
        yield


def _undisturbed() -> contextlib.AbstractContextManager[None]:
    """Nothing that a signal can ask for leaves the block early."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return _handled(dict.fromkeys(signals, signal.SIG_IGN))


@contextlib.contextmanager
def _handled(handlers: Mapping[signal.Signals, object]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only it can set handlers
        yield
        return
    before = {number: signal.signal(number, new) for number, new in handlers.items()}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
