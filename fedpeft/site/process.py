"""``fedpeft site``: the resident process of one site, until a signal ends it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from fedpeft.errors import FedpeftError
from fedpeft.site.folder import Config, read_config
from fedpeft.site.frames import listen
from fedpeft.site.server import Limits, Resident, Say
from fedpeft.site.worker import Worker, command

SHARE = 0.75
"""Of the machine's memory: what a worker may hold between two messages, unless it is said."""


def memory_limit() -> int:
    """Bytes that a worker may hold where nobody says."""
    return int(SHARE * psutil.virtual_memory().total)


def run(folder: Path, limits: Limits, say: Say) -> int:
    """Serves the site of a folder; the exit code is 128 and the signal that ended it.

    After the first signal the message under way has ``limits.grace`` seconds; the second ends all
    at once. Everything is relative to the folder, which becomes the working one.

    Raises FedpeftError where the folder is none, where somebody serves it already, and where its
    policy cannot be read.
    """
    try:
        os.chdir(folder)
    except OSError as error:
        raise FedpeftError(
            f"DIR={str(folder)!r} cannot be entered ({error.strerror}): name a site's folder, "
            f"sites/NAME of what `fedpeft deploy init` wrote."
        ) from error
    config = read_config(Path())
    path = Path(str(config["socket"]))
    with listen(path, backlog=limits.queue) as listener:
        resident = Resident(listener, lambda: Worker(command()), limits, say)
        for line in told(config, limits):
            say(line)
        try:
            with _until_signal(resident) as ended:
                resident.serve()
        finally:
            path.unlink(missing_ok=True)
    return ended[0] if ended else 0


def told(config: Config, limits: Limits) -> Iterator[str]:
    """What a person wants to know of a site that starts."""
    bound = f"a worker above {limits.memory / 2**30:.1f} GiB is exchanged" if limits.memory else ""
    yield f"site {config['client']}"
    for key, without in (
        ("socket", ""),
        ("state", "none: what the client keeps ends with the worker"),
        ("policy", "none: any recipe is taken"),
        ("privacy-ledger", "none"),
        ("identity", "none"),
    ):
        value = config.get(key)
        yield f"  {key:<15} {Path(str(value)).absolute() if value else without}"
    yield f"  {'memory':<15} {bound or 'no limit'}"
    yield f"  {'queue':<15} {limits.queue} requests may wait"


@contextmanager
def _until_signal(resident: Resident) -> Iterator[list[int]]:
    """Signals stop the resident; the list has the exit code of the first."""
    ended: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if ended:
            resident.kill()
            os._exit(ended[0])
        ended.append(128 + number)
        resident.stop()

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield ended
    finally:
        for number, old in before.items():
            signal.signal(number, old)
