"""The Cohort that a strategy sees: fit, gradients, losses and private memory of K clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpeft.data.clients import ClientData
from fedpeft.local import Progress, Trainer, batch_plan
from fedpeft.metrics import client_sums
from fedpeft.model import Network
from fedpeft.strategy import Adjust, Cohort, Fit
from fedpeft.tree import Layout, Tree

Memory = dict[str, dict[str, Tree]]
"""Private memory of clients: client name -> memory name -> tree."""


@dataclass(frozen=True)
class RoundInfo:
    """What a cohort knows of its place in the run; the seed fixes the batches."""

    progress: Progress
    seed: int


class TorchCohort(Cohort):
    """K clients on one network. ``memory`` is the store of exactly these clients' own memory."""

    def __init__(
        self,
        network: Network,
        trainer: Trainer,
        data: Sequence[ClientData],
        info: RoundInfo,
        weights: Tensor,
        memory: Memory,
    ) -> None:
        self.clients = tuple(client.name for client in data)
        self.weights = weights
        self.initial = network.initial
        self._network = network
        self._trainer = trainer
        self._data = list(data)
        self._info = info
        self._memory = memory

    def fit(self, start: Tree, *, fixed: Tree | None = None, adjust: Adjust | None = None) -> Fit:
        self._place(start, fixed)
        plans = [
            batch_plan(
                c.train, self._trainer.local, self._info.seed, c.name, self._info.progress.round
            )
            for c in self._data
        ]
        return self._trainer.fit(start, plans, self._info.progress, adjust)

    def gradients(self, at: Tree, *, fixed: Tree | None = None) -> Tree:
        self._place(at, fixed)
        layout = Layout.of({name: value[0] for name, value in at.items()})
        matrix = layout.pack(at).to(self._trainer.device, torch.float32).requires_grad_()
        total = torch.zeros_like(matrix)
        items = torch.zeros(len(self._data), device=self._trainer.device)
        for index in self._passes():
            sums, counts = self._sums(layout.unpack(matrix), index)
            total += torch.autograd.grad(sums.sum(), matrix)[0]
            items += counts
        return layout.unpack(total / items.clamp(min=1)[:, None])

    def losses(self, at: Tree, *, fixed: Tree | None = None) -> Tensor:
        self._place(at, fixed)
        placed = {name: value.to(self._trainer.device) for name, value in at.items()}
        total = torch.zeros(len(self._data), device=self._trainer.device)
        items = torch.zeros_like(total)
        with torch.no_grad():
            for index in self._passes():
                sums, counts = self._sums(placed, index)
                total += sums
                items += counts
        return total / items.clamp(min=1)

    def recall(self, name: str, default: Tree) -> Tree:
        found = {key: value.clone() for key, value in default.items()}
        for k, client in enumerate(self.clients):
            kept = self._memory.get(client, {}).get(name)
            for key, value in (kept or {}).items():
                found[key][k] = value.to(found[key].device)
        return found

    def remember(self, name: str, value: Tree) -> None:
        for k, client in enumerate(self.clients):
            own = {key: tensor[k].detach().cpu().clone() for key, tensor in value.items()}
            self._memory.setdefault(client, {})[name] = own

    def _place(self, stacked: Tree, fixed: Tree | None) -> None:
        """Checks that the trees make up the whole adapter, and writes the shared part."""
        shared = fixed or {}
        named, whole = {*stacked, *shared}, set(self.initial)
        if named != whole or len(stacked) + len(shared) != len(whole):
            raise ValueError(
                f"start and fixed must name every trainable tensor once: missing "
                f"{sorted(whole - named)[:3]}, unknown {sorted(named - whole)[:3]}, "
                f"twice {sorted(set(stacked) & set(shared))[:3]}"
            )
        for name, value in stacked.items():
            if tuple(value.shape) != (len(self.clients), *self.initial[name].shape):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; for {len(self.clients)} clients it is "
                    f"{(len(self.clients), *self.initial[name].shape)}"
                )
        self._network.write(shared)

    def _passes(self) -> list[np.ndarray]:
        """One pass over all training data in order: index arrays ``[K, batch_size]``."""
        size = self._trainer.local.batch_size
        steps = max(-(-len(c.train) // size) for c in self._data)
        plan = np.full((len(self._data), steps * size), -1, dtype=np.int64)
        for k, client in enumerate(self._data):
            plan[k, : len(client.train)] = client.train
        return [plan[:, s * size : (s + 1) * size] for s in range(steps)]

    def _sums(self, params: Tree, index: np.ndarray) -> tuple[Tensor, Tensor]:
        trainer = self._trainer
        batch = trainer.examples.batch(torch.from_numpy(index)).to(trainer.device)
        return client_sums(trainer.task, trainer.lane.logits(params, batch), batch)
