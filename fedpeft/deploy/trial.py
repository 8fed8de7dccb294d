"""The note that a trial on this machine leaves while it runs, so that others find its server."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil

from fedpeft.errors import FedpeftError
from fedpeft.record.files import replace

NOTE = "up.json"


def note(logs: Path, address: str) -> None:
    """Says that this process has a server at ``address``. logs: the folder's."""
    own = {"address": address, "pid": os.getpid(), "began": psutil.Process().create_time()}
    replace(logs / NOTE, json.dumps(own).encode("ascii") + b"\n")


def find(logs: Path) -> str | None:
    """The address of the trial that runs now; None without one.

    Raises FedpeftError for a note whose process ended without taking it away.
    """
    path = logs / NOTE
    try:
        told = json.loads(path.read_bytes())
        address, pid, began = str(told["address"]), int(told["pid"]), float(told["began"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedpeftError(f"{path} cannot be used ({error}): delete it.") from error
    try:
        lives = psutil.Process(pid).create_time() == began
    except (psutil.Error, ValueError):
        lives = False
    if not lives:
        raise FedpeftError(
            f"{path} is of process {pid}, which ended without ending what it had started: look "
            f"for processes left of it, end them, and delete the file."
        )
    return address
