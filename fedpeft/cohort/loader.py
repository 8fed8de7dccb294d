"""What a step trains on, ready on the device: passes of rows of like length.

A step's examples go through the model in passes, so that short rows do not pay for the padding of
long ones; the order of rows within a step does not matter. On a GPU the next step's passes are
gathered and pinned by a thread while the device computes, and copied without waiting.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpeft.config import Local
from fedpeft.data.examples import Batch, Examples

PASS_COST = {"cpu": 256, "cuda": 4096}
"""What a forward and backward pass costs beyond its tokens, in tokens: dispatch and launches."""


SHORTEST = 16
"""Fewest tokens that a row of fixed shape is padded to."""


@dataclass(frozen=True)
class Step:
    """One optimizer step's data. items: loss items per row in flight, at least 1, ``[C]``."""

    passes: tuple[Batch, ...]
    items: Tensor


class Loader:
    """Gathers steps. fixed: rows and lengths in few shapes, for compiled steps.

    threaded: gather ``ahead`` in a thread of its own (by default on CUDA).
    """

    def __init__(
        self,
        examples: Examples,
        local: Local,
        device: torch.device,
        fixed: bool = False,
        threaded: bool | None = None,
    ) -> None:
        self._examples = examples
        self._local = local
        self._device = device
        self._fixed = fixed
        threaded = device.type == "cuda" if threaded is None else threaded
        self._pool = ThreadPoolExecutor(1, "fedpeft-loader") if threaded else None
        self._next: tuple[np.ndarray, Future[Step]] | None = None

    def ahead(self, index: np.ndarray) -> None:
        """Begins to gather what ``load(index)`` will be asked for next."""
        if self._pool is not None:
            self._next = (index, self._pool.submit(self._gather, index))

    def load(self, index: np.ndarray) -> Step:
        """The step of examples ``index``, int64 ``[C, B]``, -1 where absent, on the device."""
        kept, self._next = self._next, None
        step = kept[1].result() if kept and kept[0] is index else self._gather(index)
        passes = tuple(batch.to(self._device) for batch in step.passes)
        return Step(passes, step.items.to(self._device, non_blocking=True))

    def _gather(self, index: np.ndarray) -> Step:
        parts = self._fixed_parts(index) if self._fixed else self._parts(index)
        batches = (
            self._examples.batch(torch.from_numpy(part), at_least=self._length(part))
            for part in parts
        )
        pin = self._device.type == "cuda"
        return Step(tuple(b.pin() if pin else b for b in batches), self._items(index))

    def _parts(self, index: np.ndarray) -> list[np.ndarray]:
        """The step's rows as parts of at most ``batch_size`` rows a client, short rows first."""
        lengths = self._examples.lengths_of(index.clip(min=0)) * (index >= 0)
        order = np.argsort(lengths, axis=1, kind="stable")
        width = max(1, int((index >= 0).sum(1).max()))
        ordered = np.take_along_axis(index, order, axis=1)[:, -width:]
        longest = np.take_along_axis(lengths, order, axis=1)[:, -width:].max(axis=0)
        costs = len(index) * longest
        at = cuts(costs.tolist(), self._local.batch_size, PASS_COST[self._device.type])
        return [ordered[:, i:j] for i, j in itertools.pairwise(at)]

    def _fixed_parts(self, index: np.ndarray) -> list[np.ndarray]:
        size = self._local.batch_size
        return [index[:, i : i + size] for i in range(0, index.shape[1], size)]

    def _length(self, part: np.ndarray) -> int:
        """The length that rows are padded to at least: in fixed shapes the next power of two.

        Not beyond the longest example, so that a model's position limit holds.
        """
        if not self._fixed:
            return 0
        longest = int(self._examples.lengths_of(part[part >= 0]).max(initial=1))
        return min(self._examples.longest, max(SHORTEST, 1 << (longest - 1).bit_length()))

    def _items(self, index: np.ndarray) -> Tensor:
        """Loss items per row of a step: examples, or predicted tokens; at least 1."""
        present = torch.from_numpy(index >= 0)
        if self._examples.labels is not None:
            return present.sum(1).clamp(min=1)
        lengths = torch.from_numpy(self._examples.lengths_of(index.clip(min=0))) - 1
        return (lengths * present).sum(1).clamp(min=1)


def cuts(costs: Sequence[int], most: int, overhead: int) -> list[int]:
    """Where to cut columns of non-decreasing cost into passes of at most ``most`` columns.

    A pass costs its number of columns times its last column's cost, plus ``overhead``; the cuts
    (first 0, last ``len(costs)``) minimise the sum, by dynamic programming.
    """
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first j columns, start of the last pass
    for j in range(1, len(costs) + 1):
        starts = range(max(0, j - most), j)
        best.append(min((best[i][0] + (j - i) * costs[j - 1] + overhead, i) for i in starts))
    found = [len(costs)]
    while found[-1] > 0:
        found.append(best[found[-1]][1])
    return found[::-1]
