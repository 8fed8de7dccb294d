"""Files that a crash leaves whole: synced before they get their name; a full disk says so."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from fedpeft.errors import FedpeftError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file down to the device. Raises OSError, also where ``path`` exists."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(path: Path, data: bytes) -> None:
    """Writes ``path`` whole or leaves it as it was. Raises FedpeftError where writing fails."""
    temporary = path.with_name(f".writing-{path.name}")
    try:
        temporary.unlink(missing_ok=True)
        write_synced(temporary, data)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise failed_write(error, path, "What was there before is unchanged.") from error


def failed_write(error: OSError, path: Path, remedy: str) -> FedpeftError:
    """The error that says why ``path`` could not be written, and what to do."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        reason = f"the disk is full ({reason})"
    return FedpeftError(f"cannot write {path}: {reason}. {remedy}")
