"""What a fleet did with its time: idle, waste, fairness, time to a score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


def jain(counts: np.ndarray) -> float:
    """Jain's index, ``(sum x)^2 / (n sum x^2)``: 1 for equal shares, 1/n for all to one."""
    x = counts.astype(np.float64)
    square = float((x * x).sum())
    return float(x.sum() ** 2 / (len(x) * square)) if square else math.nan


def gini(counts: np.ndarray) -> float:
    """Gini's coefficient, ``sum_ij |x_i - x_j| / (2 n sum x)``: 0 for equal shares."""
    x = np.sort(counts.astype(np.float64))
    n, total = len(x), float(x.sum())
    if not total:
        return math.nan
    return float((2 * np.arange(1, n + 1) - n - 1) @ x / (n * total))


def idle(seconds: np.ndarray, duration: float) -> float:
    """Share of a round that those who delivered spent waiting: ``1 - mean(T) / duration``."""
    if not len(seconds) or duration <= 0:
        return math.nan
    return 1.0 - float(seconds.mean()) / duration


def time_to(curve: Sequence[tuple[float, float]], target: float) -> float:
    """The first time whose score is at least ``target``; NaN where none is."""
    return next((time for time, value in curve if value >= target), math.nan)


@dataclass
class Books:
    """Totals of a run.

    delivered: replies that counted, int64 ``[N]``. busy: seconds at work, float64 ``[N]``.
    compute, wasted: seconds of computation in all, and for nothing. energy: joules, NaN where a
    device's power is not known. waits: sum of the rounds' idle fractions, and how many. lost: by
    kind. adapted: clients that train in another way to fit into their memory (``oom_avoided``).
    """

    delivered: np.ndarray
    busy: np.ndarray
    compute: float = 0.0
    wasted: float = 0.0
    energy: float = 0.0
    waits: tuple[float, int] = (0.0, 0)
    lost: dict[str, int] = field(default_factory=dict)
    curve: list[tuple[float, float]] = field(default_factory=list)

    @staticmethod
    def of(count: int) -> Books:
        """Of N clients that have done nothing."""
        return Books(np.zeros(count, np.int64), np.zeros(count))

    def wait(self, share: float) -> None:
        """Notes a round's idle fraction."""
        if not math.isnan(share):
            self.waits = (self.waits[0] + share, self.waits[1] + 1)

    def miss(self, kinds: Sequence[str]) -> None:
        """Notes jobs that counted for nothing."""
        for kind in kinds:
            self.lost[kind] = self.lost.get(kind, 0) + 1

    def memory(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        return {
            "delivered": torch.from_numpy(self.delivered.copy()),
            "busy": torch.from_numpy(self.busy.copy()),
            "sums": (self.compute, self.wasted, self.energy),
            "waits": self.waits,
            "lost": dict(self.lost),
            "curve": list(self.curve),
        }

    @staticmethod
    def restored(memory: dict[str, Any]) -> Books:
        """What ``memory`` gave."""
        compute, wasted, energy = memory["sums"]
        return Books(
            memory["delivered"].numpy().copy(),
            memory["busy"].numpy().copy(),
            compute,
            wasted,
            energy,
            memory["waits"],
            dict(memory["lost"]),
            list(memory["curve"]),
        )
