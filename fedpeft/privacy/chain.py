"""A file of JSON lines that is only appended to, and shows when a line of it was touched.

::

    {"sha256": S0, "previous": 64 zeros, "kind": "fedpeft privacy ledger", "schema": 1}
    {"sha256": S1, "previous": S0, ...}

``sha256`` is of the line's own bytes without that field, ``previous`` is that of the line before: a
line that was changed, moved, taken out or put in is found when the file is read. Who may write the
file can also write a new chain, or drop whole lines at its end: keep ``head`` elsewhere, and ask
whether the file ``holds`` it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

from fedpeft.errors import FedpeftError
from fedpeft.record.files import failed_write, sync_folder

log = logging.getLogger(__name__)

_START = "0" * 64
_LINE = re.compile(rb'\{"sha256": "([0-9a-f]{64})", ("previous": "([0-9a-f]{64})", .*\})\n')


@final
class Chain:
    """An open chain, locked against every other process. Not for several threads.

    Read it to the end with ``replay`` once, then append. header: what the first line says.
    """

    def __init__(self, path: Path, header: Mapping[str, object]) -> None:
        """Opens and locks the file, mode 0600, and makes it where there is none.

        A link is not followed. Raises FedpeftError where that fails, and where another process has
        it open.
        """
        self.path = path
        self._header = header
        self._digests: list[str] = []
        self._size = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._handle: int | None = os.open(path, flags, 0o600)
        except OSError as error:
            raise failed_write(error, path, "Nothing was released.") from error
        try:
            _lock(self._handle, path)
        except BaseException:
            self.close()
            raise

    @property
    def head(self) -> str:
        """The SHA-256 of the last line, which stands for the whole file so far."""
        return self._digests[-1]

    def holds(self, digest: str) -> bool:
        """Whether ``digest`` is the SHA-256 of a line, so that all before it is as it was then."""
        return digest in self._digests

    def replay(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The lines behind the header, each verified: (number in the file, fields).

        A last line without its end is cut off, with a warning in the log. A new file gets its
        header. Raises FedpeftError with the line's number where the file is not as it was written.
        """
        handle, torn = self._open(), b""
        with os.fdopen(os.dup(handle), "rb") as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    torn = line
                    break
                fields = self._verify(number, line)
                if number > 1:
                    yield number, fields
        if not self._digests and not _seal(_START, self._header)[1].startswith(torn):
            raise FedpeftError(f"{self.path}, line 1: this is no file of fedpeft's. Move it away.")
        with self._failing("Nothing was released."):
            if torn:
                log.warning(
                    "%s: line %d broke off when it was written, before its release left; it is "
                    "cut off",
                    self.path,
                    len(self._digests) + 1,
                )
                os.ftruncate(handle, self._size)
                os.fsync(handle)
            os.fchmod(handle, 0o600)
        if not self._digests:
            self.append(self._header)
            with self._failing("Nothing was released."):
                sync_folder(self.path.parent)

    def append(self, fields: Mapping[str, object]) -> None:
        """Adds one line and returns when it is on the device.

        Where that fails the file is closed, as it was before, and FedpeftError is raised.
        """
        handle = self._open()
        digest, line = _seal(self._digests[-1] if self._digests else _START, fields)
        try:
            with self._failing("The release must not leave. Free some space and resume the run."):
                written = 0
                while written < len(line):
                    written += os.write(handle, line[written:])
                os.fsync(handle)
            self._digests.append(digest)
            self._size += len(line)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, self._size)
            self.close()
            raise

    def close(self) -> None:
        """Gives the file free for other processes."""
        if self._handle is not None:
            fcntl.flock(self._handle, fcntl.LOCK_UN)  # also where a child process has the file too
            os.close(self._handle)
            self._handle = None

    def _open(self) -> int:
        if self._handle is None:
            raise FedpeftError(f"{self.path} is closed. Open it again.")
        return self._handle

    def _verify(self, number: int, line: bytes) -> dict[str, Any]:
        """A whole line's fields, once it is known to be the next one."""
        at = f"{self.path}, line {number}"
        found = _LINE.fullmatch(line)
        if found is None:
            raise FedpeftError(f"{at} is no line of fedpeft's: it was changed. Restore the file.")
        digest, body, previous = found[1].decode(), b"{" + found[2], found[3].decode()
        if hashlib.sha256(body).hexdigest() != digest:
            raise FedpeftError(f"{at} was changed after it was written. Restore the file.")
        if previous != (self._digests[-1] if self._digests else _START):
            raise FedpeftError(
                f"{at} does not follow the line before: lines were moved, taken out or put in. "
                "Restore the file."
            )
        try:
            fields: dict[str, Any] = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise FedpeftError(f"{at} is not JSON: {error}. Restore the file.") from error
        del fields["previous"]
        if number == 1 and fields != self._header:
            raise FedpeftError(
                f"{at}: the file says that it is {fields}, not {dict(self._header)}. Read it with "
                "the fedpeft that wrote it."
            )
        self._digests.append(digest)
        self._size += len(line)
        return fields

    @contextlib.contextmanager
    def _failing(self, remedy: str) -> Iterator[None]:
        """Turns an OSError into one that says what could not be written, and what to do."""
        try:
            yield
        except OSError as error:
            raise failed_write(error, self.path, remedy) from error


def _seal(previous: str, fields: Mapping[str, object]) -> tuple[str, bytes]:
    """The digest of a line and its bytes."""
    body = json.dumps({"previous": previous, **fields}, allow_nan=False).encode("ascii")
    digest = hashlib.sha256(body).hexdigest()
    return digest, b'{"sha256": "%s", %s\n' % (digest.encode(), body[1:])


def _lock(handle: int, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise FedpeftError(f"{path} is no plain file. Choose another place.")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FedpeftError(
            f"{path} is in use: another process has it open. Wait for it, or end it."
        ) from None
    except OSError as error:
        raise failed_write(error, path, "Put it on a file system with locks.") from error
