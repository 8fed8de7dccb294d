"""``metrics.jsonl``: one JSON object per line, one schema.

Every line has ``schema`` (1), ``kind`` and ``round``: the round after which it was written, 0
before the first, null for what belongs to the whole run and is written at its end. By kind:

- ``round``: ``clients``, how many were sampled; ``replies``, how many are in the aggregate;
  ``failures``, a list of ``{client, reason}``; ``loss``, the replies' mean training loss in nats;
  ``bytes_down``, ``bytes_up``, of all clients together, by kind; ``seconds``; where the strategy
  has some, ``figures`` of its own: name -> number or list of numbers.
- ``bytes``: ``down``, ``up``: the same by client, a list of ``{clients, each}``: what each of these
  clients was sent, or sent, in one exchange, by kind.
- ``fleet``: of the round by the fleet's clock: ``time``, seconds since the run began; ``seconds``
  of the round; ``idle``, the share of it that clients waited; ``wasted``, the share of computation
  that counted for nothing; ``dropped``, client -> how its job ended; ``times``, client -> seconds,
  of the replies that counted; ``digest`` of all events so far; asynchronously also ``staleness`` of
  each reply and ``in_flight``, clients still at work.
- ``evaluation``: ``scope``, ``test`` (the global test set) or ``clients`` (every client's
  hold-out); ``score``, for ``test`` ``{items, loss, accuracy, macro_f1, perplexity}``, for
  ``clients`` these by client name.
- ``baseline``: ``name`` (``untrained``, ``local``, ``centralised``); ``score`` as above.
- ``summary``: ``rows``, those of the last table, each with its ``name``; ``fleet``, where there is
  one, the fields of ``fedpeft.timed.FleetSummary``.
- ``note``: ``text``: a resume, a checkpoint skipped, a warning.

``baseline`` and ``summary`` are always of the whole run. The fields named here are required; a line
may have others, and readers pass over what they do not know. A figure that is not finite is
``null``: JSON has no NaN, and plotting tools read null as missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fedpeft.errors import FedpeftError
from fedpeft.record.files import failed_write, replace

SCHEMA = 1

Kind = Literal["round", "bytes", "fleet", "evaluation", "baseline", "summary", "note"]

_REQUIRED: Mapping[str, frozenset[str]] = {
    "round": frozenset(
        {"clients", "replies", "failures", "loss", "bytes_down", "bytes_up", "seconds"}
    ),
    "bytes": frozenset({"down", "up"}),
    "fleet": frozenset({"time", "seconds", "idle", "wasted", "dropped", "times"}),
    "evaluation": frozenset({"scope", "score"}),
    "baseline": frozenset({"name", "score"}),
    "summary": frozenset({"rows"}),
    "note": frozenset({"text"}),
}
_FINAL = {"baseline", "summary"}
_HEAD = {"schema", "kind", "round"}


class MetricsLog:
    """The metrics file of one run. Holds no open file: every append opens, writes and flushes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, kind: Kind, round: int | None, fields: Mapping[str, object]) -> None:
        """Adds one line. ``round`` is None for what belongs to the whole run.

        Raises ValueError where the line does not follow the schema, FedpeftError where writing
        fails; the lines before stay whole.
        """
        wrong = _fault(kind, round, fields)
        if wrong or _HEAD & fields.keys():
            raise ValueError(wrong or f"{kind}: {sorted(_HEAD & fields.keys())} are not fields")
        record = {"schema": SCHEMA, "kind": kind, "round": round, **_finite(dict(fields))}
        line = json.dumps(record, allow_nan=False).encode("ascii") + b"\n"
        try:
            self._write(line)
        except OSError as error:
            remedy = (
                "The lines before are intact: free some space and go on with "
                f"`fedpeft resume {self.path.parent}`."
            )
            raise failed_write(error, self.path, remedy) from error

    def read(self) -> list[dict[str, Any]]:
        """All lines; without the last where it is torn (the run is writing it, or was killed).

        Raises FedpeftError that names the line where the file is no fedpeft metrics file or is of
        another schema.
        """
        return [json.loads(line) for line in self._lines()]

    def truncate_after(self, round: int) -> None:
        """Removes what a run that goes on after ``round`` writes again.

        These are the lines of later rounds, the null-round lines and a torn last line.
        """
        kept = []
        for line in self._lines():
            written = json.loads(line)["round"]
            if written is not None and written <= round:
                kept.append(line)
        replace(self.path, b"".join(line + b"\n" for line in kept))

    def _write(self, line: bytes) -> None:
        with open(self.path, "ab", buffering=0) as file:
            size, written = file.tell(), 0
            try:
                while written < len(line):
                    written += file.write(line[written:])
            except OSError:
                file.truncate(size)
                raise

    def _lines(self) -> list[bytes]:
        """The whole lines, checked."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        if not _is_json(lines[-1]):
            lines.pop()
        for number, line in enumerate(lines, start=1):
            problem = _problem(line)
            if problem is not None:
                raise FedpeftError(f"{self.path}, line {number} {problem}.")
        return lines


def _problem(line: bytes) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return "is not JSON: this is not a metrics.jsonl of fedpeft, or it is damaged"
    if not isinstance(record, dict) or "schema" not in record:
        return "has no schema number: this is not a metrics.jsonl of fedpeft"
    if record["schema"] != SCHEMA:
        return (
            f"has schema {record['schema']!r}, this fedpeft reads schema {SCHEMA}; read it with "
            "the fedpeft that wrote it"
        )
    if "round" not in record:
        return "has no round"
    return _fault(record.get("kind"), record["round"], record)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _fault(kind: object, round: object, fields: Mapping[str, object]) -> str | None:
    """What breaks the schema, if anything."""
    if kind not in _REQUIRED:
        return f"kind {kind!r} is not one of {', '.join(_REQUIRED)}"
    if round is not None and (type(round) is not int or round < 0):
        return f"round {round!r} of a {kind} is neither null nor a number from 0"
    if kind in _FINAL and round is not None:
        return f"a {kind} belongs to the whole run: its round must be null, not {round}"
    missing = _REQUIRED[str(kind)] - fields.keys()
    return f"a {kind} needs {', '.join(sorted(missing))}" if missing else None


def _finite(value: Any) -> Any:
    """``value`` with null for figures that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
