"""The data of a workload and the order of its batches, the same for every way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.workload import CLASSES, SEED, Workload, client_name
from fedpeft.local import batch_plan


@dataclass(frozen=True)
class Texts:
    """The population's data: client c owns rows ``c * examples`` to ``(c + 1) * examples - 1``.

    tokens: int64 ``[population * examples, tokens]``. labels: int64 ``[population * examples]``.
    """

    workload: Workload
    tokens: Tensor
    labels: Tensor

    @staticmethod
    def draw(workload: Workload) -> Texts:
        """The workload's data, on its device; two calls give the same."""
        stream = np.random.default_rng(SEED)
        rows = workload.population * workload.examples
        tokens = stream.integers(workload.vocabulary, size=(rows, workload.tokens))
        labels = stream.integers(CLASSES, size=rows)
        device = workload.device
        return Texts(
            workload, torch.from_numpy(tokens).to(device), torch.from_numpy(labels).to(device)
        )

    def rows(self, client: int) -> np.ndarray:
        """The row numbers of a client."""
        own = self.workload.examples
        return np.arange(client * own, (client + 1) * own)

    def order(self, client: int, round: int) -> Tensor:
        """A client's rows in the order of its batches: int64 ``[steps, batch]``, on the device."""
        rows, local = self.rows(client), self.workload.local
        plan = batch_plan(rows, local, SEED, client_name(client), round)
        assert plan.min() >= 0, "every batch is full"
        return torch.from_numpy(plan).to(self.workload.device)
