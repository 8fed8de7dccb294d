"""``--json``: one JSON object per line on stdout, and nothing else there.

Every object has ``event``:

- ``planned``: ``folder``, the run folder; ``plan``, the fields of ``fedpeft.plan.Plan``.
- ``stage``: ``name``, the strategy or baseline whose training begins; ``rounds``.
- ``round_began``: ``stage``, ``round``, ``clients`` sampled, ``tokens`` expected.
- ``chunk_done``: ``stage``, ``clients`` trained since the last one, ``tokens`` they had.
- ``round_done``: ``stage``, the fields of ``fedpeft.engine.RoundReport``, and ``score`` on the test
  set (null where it was not measured).
- ``note``: ``text``.
- ``summary``: the fields of ``fedpeft.events.Summary``, each score with its ``perplexity``; the
  last line of a complete run. A run without it failed: see stderr and the exit code.

``fedpeft check-strategy --json`` writes ``verdict`` events alone: ``property``, ``verdict`` (holds,
broken, skipped), ``found``.

``fedpeft audit --json`` writes ``note`` events and, at the end, a ``finding`` for each attack: the
fields of ``fedpeft.audit.report.Finding``; ``claimed`` is null where nothing is claimed.

``fedpeft deploy status --json`` writes one ``status`` event, the fields of
``fedpeft.deploy.status.Status``.

Bytes are by kind. A figure that is not finite is null.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, TextIO

from fedpeft.engine import RoundReport
from fedpeft.events import Summary, Watcher
from fedpeft.metrics import Score
from fedpeft.plan import Plan


def write(out: TextIO, event: str, fields: Mapping[str, object]) -> None:
    """One event as a line, at once."""
    record = _plain({"event": event, **fields})
    out.write(json.dumps(record, allow_nan=False) + "\n")
    out.flush()


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: dataclasses as objects, null for NaN and infinity."""
    if isinstance(value, Score):
        return _plain(value.as_dict())
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Json(Watcher):
    """Writes every event to ``out``."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._stage = ""
        self.folder: str | None = None

    def planned(self, plan: Plan, folder: str) -> None:
        self.folder = folder
        write(self._out, "planned", {"folder": folder, "plan": plan})

    def stage(self, name: str, rounds: int) -> None:
        self._stage = name
        write(self._out, "stage", {"name": name, "rounds": rounds})

    def round_began(self, number: int, clients: int, tokens: int) -> None:
        fields = {"stage": self._stage, "round": number, "clients": clients, "tokens": tokens}
        write(self._out, "round_began", fields)

    def chunk_done(self, clients: int, tokens: int) -> None:
        fields = {"stage": self._stage, "clients": clients, "tokens": tokens}
        write(self._out, "chunk_done", fields)

    def round_done(self, report: RoundReport, score: Score | None) -> None:
        fields = {"stage": self._stage, **_plain(report), "score": score}
        write(self._out, "round_done", fields)

    def note(self, text: str) -> None:
        write(self._out, "note", {"text": text})

    def finished(self, summary: Summary) -> None:
        write(self._out, "summary", _plain(summary))
