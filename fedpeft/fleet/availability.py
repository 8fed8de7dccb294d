"""Who is there: drawn round by round with a probability of the client's own, or read in a trace.

The kinds and their formulas are those of flgo (Wang et al.): ``idl`` always; ``homo`` p = 1 - beta;
``ln`` p = T / max T, T ~ LogNormal(0, -ln(1 - beta)); ``sln`` the same p times a day of 24 rounds,
0.4 sin + 0.5; ``mdf`` and ``ldf`` p by number of examples, n^beta and n^-beta over their maximum;
``ymf`` and ``yff`` by the smallest label and by the number of distinct labels; ``yc`` those whose
labels lie where the day of 24 rounds is, the others with 1 - beta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedpeft.errors import FedpeftError
from fedpeft.fleet.draws import Draws

DAY = 24
"""Rounds of a day."""

BY_LABEL = ("ymf", "yff", "yc")


@dataclass(frozen=True)
class Labels:
    """Of each client: its smallest and largest label, and how many; int64 ``[N]``. classes: all."""

    least: np.ndarray
    most: np.ndarray
    distinct: np.ndarray
    classes: int


class Availability(Protocol):
    """When the N clients are there."""

    def there(self, time: float, round: int) -> np.ndarray:
        """Who is, as the round begins: bool ``[N]``."""

    def until(self, clients: np.ndarray, time: float) -> np.ndarray:
        """When those who are there leave, float64 ``[K]``, seconds; infinite for not."""

    def next(self, time: float, usable: np.ndarray) -> float:
        """When one of ``usable`` is there, at ``time`` or after; NaN where rounds decide."""

    def online(self, client: int, end: float) -> float:
        """Seconds from 0 to ``end`` that a client is there."""


@dataclass(frozen=True)
class ByRound(Availability):
    """Probabilities float64 ``[N]``; kind as above, ``idl`` where they are all one."""

    chance: np.ndarray
    kind: str
    draws: Draws
    beta: float = 0.0
    labels: Labels | None = None

    def there(self, time: float, round: int) -> np.ndarray:
        count = len(self.chance)
        if self.kind == "idl":
            return np.ones(count, bool)
        found: np.ndarray = self.draws.uniforms(np.arange(count), round)[:, 0] < self.now(round)
        return found

    def now(self, round: int) -> np.ndarray:
        """The probabilities in a round, float64 ``[N]``."""
        if self.kind == "sln":
            return self.chance * (0.4 * math.sin(2 * math.pi * round / DAY) + 0.5)
        if self.kind == "yc":
            assert self.labels is not None, "given where the kind needs them"
            at = (1 + round % DAY) / DAY * self.labels.classes
            inside = (self.labels.least <= at) & (at <= self.labels.most + 1)
            return np.where(inside, 1.0, 1.0 - self.beta)
        return self.chance

    def until(self, clients: np.ndarray, time: float) -> np.ndarray:
        return np.full(len(clients), np.inf)

    def next(self, time: float, usable: np.ndarray) -> float:
        return math.nan

    def online(self, client: int, end: float) -> float:
        return end


def by_round(
    kind: str, beta: float, examples: np.ndarray, draws: Draws, labels: Labels | None = None
) -> ByRound:
    """The availability of clients with so many ``examples``, int64 ``[N]``."""
    if kind in BY_LABEL and labels is None:
        raise FedpeftError(
            f"fleet.availability={kind} goes by clients' labels, and the task has none: use idl, "
            f"homo, ln, sln, mdf or ldf."
        )
    count = len(examples)
    chance = np.ones(count)
    if kind == "homo":
        chance = np.full(count, 1.0 - beta)
    elif kind in ("ln", "sln"):
        drawn = np.exp(-math.log(1.0 - beta) * draws.normals(np.arange(count), 0)[:, 0])
        chance = drawn / drawn.max()
    elif kind in ("mdf", "ldf"):
        power = examples.astype(np.float64) ** (beta if kind == "mdf" else -beta)
        chance = power / power.max()
    elif kind == "ymf" and labels is not None:
        chance = beta * labels.least / max(1, int(labels.least.max())) + (1.0 - beta)
    elif kind == "yff" and labels is not None:
        chance = beta * labels.distinct / max(1, labels.classes) + (1.0 - beta)
    return ByRound(chance, kind, draws, beta, labels)


@dataclass(frozen=True)
class Intervals:
    """One client's trace: there from ``on[k]`` to ``off[k]`` seconds, again every ``period``.

    Both ascending, ``on[k] <= off[k] <= on[k + 1]``, within 0 to ``period``.
    """

    on: np.ndarray
    off: np.ndarray
    period: float

    def there(self, time: float) -> bool:
        """``on[k] <= time mod period <= off[k]`` for some k."""
        at = time % self.period
        k = int(np.searchsorted(self.on, at, side="right")) - 1
        return k >= 0 and bool(at <= self.off[k])

    def until(self, time: float) -> float:
        """When a client that is there leaves; one whose trace wraps without a gap stays."""
        start, at = time - time % self.period, time % self.period
        k = int(np.searchsorted(self.on, at, side="right")) - 1
        if k < 0 or at > self.off[k]:
            return time
        while k + 1 < len(self.on) and self.on[k + 1] <= self.off[k]:
            k += 1
        if self.off[k] < self.period or self.on[0] > 0:
            return start + float(self.off[k])
        first = 0
        while first + 1 < len(self.on) and self.on[first + 1] <= self.off[first]:
            first += 1
        whole = self.off[first] >= self.period
        return math.inf if whole else start + self.period + float(self.off[first])

    def next(self, time: float) -> float:
        """When the client is there, at ``time`` or after; infinite for never."""
        if not len(self.on):
            return math.inf
        if self.there(time):
            return time
        start, at = time - time % self.period, time % self.period
        later = self.on[self.on > at]
        found = start + (float(later[0]) if len(later) else self.period + float(self.on[0]))
        return found if self.there(found) else math.nextafter(found, math.inf)

    def online(self, end: float) -> float:
        """Seconds from 0 to ``end`` that the client is there."""
        whole, rest = divmod(end, self.period)
        part = np.clip(np.minimum(self.off, rest) - self.on, 0.0, None).sum()
        return float(whole * (self.off - self.on).sum() + part)


@dataclass(frozen=True)
class Traced(Availability):
    """Availability by traces: client i follows trace ``i mod len(traces)``."""

    traces: Sequence[Intervals]
    count: int

    def of(self, client: int) -> Intervals:
        """The trace of a client."""
        return self.traces[client % len(self.traces)]

    def there(self, time: float, round: int) -> np.ndarray:
        own = np.array([trace.there(time) for trace in self.traces])
        return own[np.arange(self.count) % len(own)]

    def until(self, clients: np.ndarray, time: float) -> np.ndarray:
        return np.array([self.of(int(i)).until(time) for i in clients])

    def next(self, time: float, usable: np.ndarray) -> float:
        used = np.unique(np.flatnonzero(usable) % len(self.traces))
        return min((self.traces[k].next(time) for k in used), default=math.inf)

    def online(self, client: int, end: float) -> float:
        return self.of(client).online(end)
