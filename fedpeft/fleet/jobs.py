"""What clients are asked to do, how long each part takes, and how it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedpeft.fleet.draws import Draws

Stage = Literal["any", "before", "compute", "upload"]

DELIVERED, BEFORE, COMPUTE, UPLOAD = "delivered", "before", "compute", "upload"
OFFLINE, LATE, SURPLUS, ABSENT, STALE = "offline", "late", "surplus", "absent", "stale"

REASONS = {
    BEFORE: "dropped out before the download",
    COMPUTE: "dropped out while it trained",
    UPLOAD: "dropped out while it sent its reply",
    OFFLINE: "went offline",
    LATE: "missed the deadline",
    SURPLUS: "was not among the first",
    ABSENT: "was not available",
    STALE: "was too stale",
}
"""How a job that counts for nothing has ended, in words."""


@dataclass(frozen=True)
class Jobs:
    """The jobs of K clients: float64 ``[K]``, seconds of each part in the order in which they come.

    clients: int64 ``[K]``, their numbers. size: bytes of the replies.
    """

    clients: np.ndarray
    down: np.ndarray
    load: np.ndarray
    compute: np.ndarray
    up: np.ndarray
    size: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """From the first byte down to the last byte up."""
        found: np.ndarray = self.down + self.load + self.compute + self.up
        return found

    def computed(self, end: np.ndarray) -> np.ndarray:
        """Seconds of computation that are done ``end`` seconds after the start."""
        done: np.ndarray = np.clip(end - self.down - self.load, 0.0, self.compute)
        return done

    def arrived(self, end: np.ndarray) -> np.ndarray:
        """Whole bytes of the reply that are there by then, int64 ``[K]``."""
        begun = end - (self.total - self.up)
        share = np.clip(begun / np.maximum(self.up, 1e-300), 0.0, 1.0)
        part = np.where(end >= self.total, self.size, np.floor(share * self.size))
        found: np.ndarray = part.astype(np.int64)
        return found


@dataclass(frozen=True)
class Breaks:
    """When jobs break off by themselves: seconds after their start, infinite for never, ``[K]``.

    stage: where, ``before``, ``compute`` or ``upload``.
    """

    time: np.ndarray
    stage: np.ndarray


def breaks(jobs: Jobs, chance: float, stage: Stage, draws: Draws, round: int) -> Breaks:
    """Dropouts, each with probability ``chance``, at a uniform place of a stage.

    stage: ``any`` takes each of the three with equal probability.
    """
    u = draws.uniforms(jobs.clients, round, 3)
    names = np.array([BEFORE, COMPUTE, UPLOAD])
    which = (3 * u[:, 1]).astype(np.int64) if stage == "any" else np.full(len(u), 0)
    where = names[which] if stage == "any" else np.full(len(u), stage)
    ready = jobs.down + jobs.load
    at = np.where(
        where == BEFORE,
        0.0,
        np.where(
            where == COMPUTE,
            ready + u[:, 2] * jobs.compute,
            ready + jobs.compute + u[:, 2] * jobs.up,
        ),
    )
    return Breaks(np.where(u[:, 0] < chance, at, np.inf), where)


@dataclass(frozen=True)
class Ends:
    """How K jobs ended. kind: of REASONS, or ``delivered``. time: seconds after the start."""

    kind: np.ndarray
    time: np.ndarray

    @property
    def good(self) -> np.ndarray:
        """Whose replies count, bool ``[K]``."""
        found: np.ndarray = self.kind == DELIVERED
        return found


def alone(jobs: Jobs, broken: Breaks, left: np.ndarray) -> Ends:
    """How jobs end if nobody waits for anybody. left: seconds until each client goes offline."""
    total = jobs.total
    time = np.minimum(np.minimum(total, broken.time), left)
    kind = np.full(len(total), DELIVERED, dtype="<U9")
    kind[broken.time <= np.minimum(total, left)] = broken.stage[
        broken.time <= np.minimum(total, left)
    ]
    kind[left < np.minimum(total, broken.time)] = OFFLINE
    return Ends(kind, time)
