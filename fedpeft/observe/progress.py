"""How far a run is, from its folder alone: while another process plays it, and after its end."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft.comms.ledger import Bytes
from fedpeft.config import Recipe
from fedpeft.config_comms import budget_of
from fedpeft.privacy.ledger import Budget, Ledger
from fedpeft.record.metrics_log import MetricsLog


@dataclass(frozen=True)
class Progress:
    """A run so far.

    rounds, planned: complete rounds, and those of the recipe. clients, replies, excluded, dropped:
    of the last round, the last two as client -> reason and by name. loss: its mean training loss in
    nats; NaN before the first. test: the last score on the test set, as in ``metrics.jsonl``. down,
    up: bytes of all rounds by kind. budget: ``comms.budget`` in bytes, 0 without one. seconds: of
    all rounds. ended: whether the run wrote its summary. checkpoint: when the newest checkpoint was
    written, in seconds since the epoch; NaN without one. privacy: None where nothing was charged.
    aborted: why the last round has no result, if it has none. note: the last one.
    """

    rounds: int
    planned: int
    clients: int = 0
    replies: int = 0
    excluded: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    loss: float = math.nan
    test: Mapping[str, float | None] = field(default_factory=dict)
    down: Bytes = field(default_factory=dict)
    up: Bytes = field(default_factory=dict)
    budget: int = 0
    seconds: float = 0.0
    ended: bool = False
    checkpoint: float = math.nan
    privacy: Spent | None = None
    aborted: str = ""
    note: str = ""


@dataclass(frozen=True)
class Spent:
    """What a privacy ledger was charged: the largest epsilon of any client, at ``delta``.

    budget: ``privacy.epsilon``, infinite without one. clients: how many were charged.
    """

    epsilon: float
    budget: float
    delta: float
    clients: int


DROPPED = "dropped out"


def progress(folder: Path, recipe: Recipe) -> Progress:
    """What the run folder says; of a folder that is not there yet, that nothing was done.

    Raises FedpeftError where the record or the ledger is damaged, or of another fedpeft.
    """
    lines = MetricsLog(folder / "metrics.jsonl").read()
    rounds = [line for line in lines if line["kind"] == "round"]
    tests = [line for line in lines if line["kind"] == "evaluation" and line["scope"] == "test"]
    notes = [str(line["text"]) for line in lines if line["kind"] == "note"]
    last: dict[str, Any] = rounds[-1] if rounds else {}
    failures = {one["client"]: str(one["reason"]) for one in last.get("failures", ())}
    return Progress(
        rounds=last.get("round", 0),
        planned=recipe.rounds.count,
        clients=last.get("clients", 0),
        replies=last.get("replies", 0),
        excluded={name: why for name, why in failures.items() if why != DROPPED},
        dropped=tuple(name for name, why in failures.items() if why == DROPPED),
        loss=_number(last.get("loss")),
        test=tests[-1]["score"] if tests else {},
        down=_added(line["bytes_down"] for line in rounds),
        up=_added(line["bytes_up"] for line in rounds),
        budget=budget_of(recipe.comms),
        seconds=sum(_number(line["seconds"]) for line in rounds),
        ended=any(line["kind"] == "summary" for line in lines),
        checkpoint=_newest(folder / "checkpoints"),
        privacy=spent(ledger_of(folder), recipe),
        aborted=last.get("aborted", ""),
        note=notes[-1] if notes else "",
    )


def ledger_of(folder: Path) -> Path:
    """A run's privacy ledger: in its folder or, of a deployment, beside it, where it stays."""
    own = folder / "privacy.jsonl"
    return own if own.exists() else folder.with_name("privacy.jsonl")


def spent(ledger: Path, recipe: Recipe) -> Spent | None:
    """What a ledger was charged, by the recipe's accountant; None where there is none.

    The file may be in use: its whole lines are read from a copy. Raises FedpeftError where it is
    damaged.
    """
    try:
        whole = ledger.read_bytes().rpartition(b"\n")
    except FileNotFoundError:
        return None
    privacy = recipe.privacy
    budget = Budget(privacy.epsilon or math.inf, privacy.delta, privacy.accountant)
    with tempfile.TemporaryDirectory(prefix="fedpeft-") as place:
        copy = Path(place) / ledger.name
        copy.write_bytes(whole[0] + whole[1])
        with Ledger.open(copy, budget) as found:
            return Spent(found.worst(), budget.epsilon, budget.delta, len(found.clients()))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _added(books: Iterable[Mapping[str, int]]) -> Bytes:
    found: Counter[str] = Counter()
    for one in books:
        found.update(one)
    return dict(found)


def _newest(checkpoints: Path) -> float:
    """When the newest checkpoint was written; older ones are deleted meanwhile."""
    times = []
    for one in checkpoints.glob("round-*"):
        with contextlib.suppress(FileNotFoundError):
            times.append(one.stat().st_mtime)
    return max(times, default=math.nan)
