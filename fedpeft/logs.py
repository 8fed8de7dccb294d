"""Structured logs: one JSON object per line, with the run, the round and the client it is about.

Every line has ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``message``, and ``run``, ``round``,
``client``, each null where it is not known or does not apply; a record with an exception also has
``traceback``. The last three come from the record (``extra=``) or from what was bound around it.
Of fedpeft, lines from INFO on; of other libraries, warnings.

A file of such lines stays where it is written: nothing of it is sent anywhere. That of a site may
hold tracebacks, and with them values of its data, so it is readable by its owner only.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path

OWN = ("fedpeft", "flwr.fedpeft")
"""Loggers of fedpeft's; the second is shown by Flower, as a run's log."""

ROUNDS = "fedpeft.rounds"
"""The logger of what a watcher says of a run's course, which the command line shows otherwise."""


@dataclass(frozen=True)
class Place:
    """What a line of the log is about."""

    run: str | None = None
    round: int | None = None
    client: str | None = None


_PLACE: ContextVar[Place] = ContextVar("fedpeft_place")


@contextmanager
def scope() -> Iterator[None]:
    """What is bound inside ends with the block (or, as a decorator, with the call)."""
    token = _PLACE.set(_PLACE.get(Place()))
    try:
        yield
    finally:
        _PLACE.reset(token)


def bind(run: str | None = None, round: int | None = None, client: str | None = None) -> None:
    """From here to the end of the ``scope``, lines are about this; None leaves what is bound."""
    given = {"run": run, "round": round, "client": client}
    known = {name: value for name, value in given.items() if value is not None}
    _PLACE.set(replace(_PLACE.get(Place()), **known))  # type: ignore[arg-type]  # named as in Place


def is_own(record: logging.LogRecord) -> bool:
    """Whether a record is fedpeft's."""
    return any(record.name == name or record.name.startswith(f"{name}.") for name in OWN)


class JsonLine(logging.Formatter):
    """A record as one line of ASCII, whatever is in its message."""

    def format(self, record: logging.LogRecord) -> str:
        place = _PLACE.get(Place())
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "run": getattr(record, "run", place.run),
            "round": getattr(record, "round", place.round),
            "client": getattr(record, "client", place.client),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def write_to(path: Path) -> Callable[[], None]:
    """Appends what is logged from now on to ``path``; returns what ends that.

    The file may be moved away at any time (logrotate): the next line begins a new one. Where nobody
    else shows warnings, they go to stderr as before. Raises OSError where it cannot be opened.
    """
    handler: logging.Handler = _Owners(path, encoding="ascii")
    handler.setFormatter(JsonLine())
    handler.addFilter(_worth_writing)
    root, own = logging.getLogger(), logging.getLogger(OWN[0])
    added, level = [handler], own.level
    if not root.handlers:
        added.append(_as_before())
    for one in added:
        root.addHandler(one)
    if own.getEffectiveLevel() > logging.INFO:
        own.setLevel(logging.INFO)

    def end() -> None:
        for one in added:
            root.removeHandler(one)
        handler.close()
        own.setLevel(level)

    return end


def _worth_writing(record: logging.LogRecord) -> bool:
    return record.levelno >= (logging.INFO if is_own(record) else logging.WARNING)


def _as_before() -> logging.Handler:
    """What Python does by itself as long as there is no handler; Flower shows its own lines."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.addFilter(lambda record: record.name.split(".")[0] != "flwr")
    return handler


class _Owners(logging.handlers.WatchedFileHandler):
    """A file that is made for its owner's eyes."""

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        return os.fdopen(os.open(self.baseFilename, flags, 0o600), "a", encoding="ascii")
