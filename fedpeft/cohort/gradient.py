"""The gradient of one optimizer step for K clients in lockstep: exact, each client's own.

A step's examples go through the model in passes of rows of like length, so that short rows do not
pay for the padding of long ones; the passes' gradients add up to the gradient of the step's mean
loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from fedpeft.cohort.lanes import Lane
from fedpeft.config import Local
from fedpeft.data.clients import Task
from fedpeft.data.examples import Examples
from fedpeft.metrics import client_sums
from fedpeft.tree import Layout

PASS_COST = {"cpu": 256, "cuda": 4096}
"""What a forward and backward pass costs beyond its tokens, in tokens: dispatch and launches."""


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


def autocast(local: Local, device: torch.device) -> AbstractContextManager[object]:
    """The forward pass's precision; adapters stay float32."""
    if local.precision == "fp32":
        return nullcontext()
    kind = torch.bfloat16 if local.precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=kind)


class Gradients:
    """Gradients of the clients' mean losses on one device, under the recipe's local settings."""

    def __init__(
        self, lane: Lane, task: Task, examples: Examples, local: Local, device: torch.device
    ) -> None:
        self.lane = lane
        self.task = task
        self.examples = examples
        self.local = local
        self.device = device

    def step(
        self, matrix: Tensor, layout: Layout, index: np.ndarray, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradient ``[K, P]`` and value ``[a]`` of the mean losses of the first a rows' clients.

        matrix: ``[K, P]`` that requires grad. index: int64 ``[a, B]`` examples, -1 where absent.
        scale: ``[K]`` loss scale under fp16 (else 1); the gradient returned is free of it.
        """
        active = len(index)
        items = self._items(index).to(self.device)
        losses = torch.zeros(active, device=self.device)
        gradient = torch.zeros_like(matrix)
        for part in self._passes(index):
            batch = self.examples.batch(torch.from_numpy(part)).to(self.device)
            params = layout.unpack(matrix if active == len(matrix) else matrix[:active])
            with autocast(self.local, self.device):
                logits = self.lane.logits(params, batch)
            loss = client_sums(self.task, logits, batch)[0] / items
            gradient += torch.autograd.grad((loss * scale[:active]).sum(), matrix)[0]
            losses += loss.detach()
        return gradient / scale[:, None], losses

    def _passes(self, index: np.ndarray) -> list[np.ndarray]:
        """A step's rows as passes of at most ``batch_size`` rows a client, short rows first.

        The order of rows within a step does not matter, so that long rows need not pad short ones.
        """
        lengths = self.examples.lengths_of(index.clip(min=0)) * (index >= 0)
        order = np.argsort(lengths, axis=1, kind="stable")
        width = max(1, int((index >= 0).sum(1).max()))
        ordered = np.take_along_axis(index, order, axis=1)[:, -width:]
        longest = np.take_along_axis(lengths, order, axis=1)[:, -width:].max(axis=0)
        costs = len(index) * longest
        at = cuts(costs.tolist(), self.local.batch_size, PASS_COST[self.device.type])
        return [ordered[:, i:j] for i, j in itertools.pairwise(at)]

    def _items(self, index: np.ndarray) -> Tensor:
        """Loss items per client of a step: examples, or predicted tokens; at least 1."""
        present = torch.from_numpy(index >= 0)
        if self.examples.labels is not None:
            return present.sum(1).clamp(min=1)
        lengths = torch.from_numpy(self.examples.lengths_of(index.clip(min=0))) - 1
        return (lengths * present).sum(1).clamp(min=1)
