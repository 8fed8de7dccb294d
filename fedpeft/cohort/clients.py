"""The Cohort that a strategy sees: fit, gradients, losses and private memory of K clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedpeft.base import folded, gradients_by_weight
from fedpeft.cohort.lanes import Lane, LoopLane, VmapLane
from fedpeft.cohort.shelf import Shelf
from fedpeft.data.clients import ClientData
from fedpeft.errors import FedpeftError
from fedpeft.local import Progress, Trainer, batch_plan
from fedpeft.metrics import client_sums
from fedpeft.model import Network
from fedpeft.privacy.record_level import NoisySteps, RecordLevel
from fedpeft.pruning.anatomy import structure_of
from fedpeft.pruning.structure import Structure
from fedpeft.strategy import Adjust, Cohort, Expand, Fit, Route, Walk
from fedpeft.tree import Layout, Tree, stack
from fedpeft.walk import Walker

Memory = dict[str, dict[str, Tree]]
"""Private memory of clients: client name -> memory name -> tree."""


@dataclass(frozen=True)
class RoundInfo:
    """What a cohort knows of its place in the run; the seed fixes the batches.

    private: the clients train by DP-SGD, with batches and noise from it, and answer nothing else.
    """

    progress: Progress
    seed: int
    private: RecordLevel | None = None


class TorchCohort(Cohort):
    """K clients on one network.

    own: the store of exactly these clients' own memory, and the shelf of what they were given.
    """

    def __init__(
        self,
        network: Network,
        trainer: Trainer,
        data: Sequence[ClientData],
        info: RoundInfo,
        weights: Tensor,
        own: tuple[Memory, Shelf],
    ) -> None:
        self.clients = tuple(client.name for client in data)
        self.weights = weights
        self.initial = network.initial
        self.lr = trainer.gradients.local.lr
        self._network = network
        self._trainer = trainer
        self._data = list(data)
        self._info = info
        self._memory, self._shelf = own
        self._trained = False

    def fit(
        self,
        start: Tree,
        *,
        fixed: Tree | None = None,
        adjust: Adjust | None = None,
        own: Mapping[str, Tree] | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
        steps: int | None = None,
    ) -> Fit:
        self._place(start, fixed, expand)
        plans, noisy, progress = self._plans(steps), self._noisy(), self._info.progress
        with folded(self._network, base or {}):
            return self._trainer.fit(start, plans, progress, adjust, own, expand, noisy)

    def walk(
        self,
        start: Tree,
        route: Route,
        *,
        fixed: Tree | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
    ) -> Walk:
        self._place(start, fixed, expand)
        walker = Walker(self._trainer, route, self._noisy())
        with folded(self._network, base or {}):
            return walker.walk(start, self._plans(None), expand)

    def gradients(
        self,
        at: Tree,
        *,
        fixed: Tree | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
    ) -> Tree:
        self._refuse_if_private("gradients")
        self._place(at, fixed, expand)
        gradients = self._trainer.gradients.through(expand)
        layout = Layout.of({name: value[0] for name, value in at.items()})
        matrix = layout.pack(at).to(self._device, torch.float32)
        total = torch.zeros_like(matrix)
        items = torch.zeros(len(self._data), device=self._device)
        with folded(self._network, base or {}):
            for part, index in self._passes():
                own = matrix[part].requires_grad_()
                sums, counts = self._sums(gradients.expanded(layout.unpack(own)), index)
                total[part] += torch.autograd.grad(sums.sum(), own)[0]
                items[part] += counts
        gradient = total / items.clamp(min=1)[:, None]
        own = matrix.requires_grad_()
        gradient, _ = gradients.regularise(own, layout, gradient, torch.zeros_like(items))
        return layout.unpack(gradient)

    def losses(
        self,
        at: Tree,
        *,
        fixed: Tree | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
        most: int | None = None,
    ) -> Tensor:
        self._refuse_if_private("losses")
        self._place(at, fixed, expand)
        gradients = self._trainer.gradients.through(expand)
        placed = {name: value.to(self._device) for name, value in at.items()}
        total = torch.zeros(len(self._data), device=self._device)
        items = torch.zeros_like(total)
        with torch.no_grad(), folded(self._network, base or {}):
            for part, index in self._passes(most):
                own = {name: value[part] for name, value in placed.items()}
                sums, counts = self._sums(gradients.expanded(own), index)
                total[part] += sums
                items[part] += counts
            penalty = gradients.objective.penalty(gradients.expanded(placed))
        mean = total / items.clamp(min=1)
        return mean if penalty is None else mean + penalty

    def weight_gradients(self, at: Tree, *, fixed: Tree | None = None) -> Tree:
        """One client after another, whatever the lane."""
        self._refuse_if_private("weight_gradients")
        self._place(at, fixed, None)
        lane, size = LoopLane(self._network.model), self._trainer.gradients.local.batch_size
        rows = []
        for k, client in enumerate(self._data):
            own = {name: value[k : k + 1].to(self._device) for name, value in at.items()}
            parts = [client.train[i : i + size] for i in range(0, len(client.train), size)]
            losses = [partial(self._sums, own, part[None], lane) for part in parts]
            rows.append(gradients_by_weight(self._network, losses))
        return stack(rows)

    def structure(self) -> Structure:
        return structure_of(self._network.model, self._network.scaling)

    @contextmanager
    def pruned(self, alive: Tree) -> Iterator[None]:
        """Not under record-level privacy, compiled, or in the lane ``vmap``."""
        self._refuse_if_private("pruned models")
        lane = self._trainer.gradients.lane
        if isinstance(lane, VmapLane) or lane.compiled != "none":
            raise FedpeftError(
                f"the strategy prunes clients' models, which the lane {lane.name!r} with "
                f"engine.compile={lane.compiled} cannot mask: set engine.compile=none, and use "
                f"adapter.kind=lora."
            )
        with lane.pruned(self.structure().parts, alive):
            yield

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

    def keep(self, name: str, version: int, value: Tree) -> None:
        self._shelf.keep(self.clients, name, version, value)

    def kept(self, name: str, since: int) -> tuple[int, Tree]:
        version, value = self._shelf.kept(self.clients, name, since)
        return version, {key: tensor.to(self._device) for key, tensor in value.items()}

    @property
    def round(self) -> int:
        """The round that is being played, from 1."""
        return self._info.progress.round

    def _plans(self, steps: int | None) -> list[np.ndarray]:
        """The clients' batches of this round, of equal width; of so many steps, if that is said."""
        info, local = self._info, self._trainer.gradients.local
        if steps is not None:
            self._refuse_if_private("steps")
            if steps < 1:
                raise ValueError(f"steps={steps}: a client takes at least one")
            local = replace(local, steps=steps)
        if info.private is None:
            number = info.progress.round
            return [batch_plan(c.train, local, info.seed, c.name, number) for c in self._data]
        plans = [info.private.plan(client.train) for client in self._data]
        width = max(plan.shape[1] for plan in plans)
        return [
            np.pad(plan, ((0, 0), (0, width - plan.shape[1])), constant_values=-1) for plan in plans
        ]

    def _noisy(self) -> NoisySteps | None:
        """How the clients step under privacy of their records, once in a round."""
        if self._info.private is None:
            return None
        self._refuse_if_trained()
        return self._info.private.steps([len(client.train) for client in self._data])

    def _refuse_if_private(self, what: str) -> None:
        if self._info.private is not None:
            raise FedpeftError(
                f"privacy.unit=record, and the strategy asks for the clients' {what}, which no "
                f"noise covers: use a strategy, or a setting of it, that learns from training only."
            )

    def _refuse_if_trained(self) -> None:
        """The ledger is charged one local training per client and round."""
        if self._trained:
            raise FedpeftError(
                "privacy.unit=record, and the strategy trains its clients a second time within a "
                "round, which is not charged: let train call cohort.fit, or cohort.walk, once."
            )
        self._trained = True

    def _place(self, start: Tree, fixed: Tree | None, expand: Expand | None) -> None:
        """Checks that the trees make up the whole adapter, and writes the shared part."""
        shared, made, what = fixed or {}, start, "start"
        if expand is not None:
            check_shapes(start, len(self.clients), {name: v[0] for name, v in start.items()})
            with torch.no_grad():
                made = expand({name: v[:1].to(self._device) for name, v in start.items()})
            what = "what expand makes of start"
        named, whole = {*made, *shared}, set(self.initial)
        if named != whole or len(made) + len(shared) != len(whole):
            raise ValueError(
                f"{what} and fixed must name every trainable tensor once: missing "
                f"{sorted(whole - named)[:3]}, unknown {sorted(named - whole)[:3]}, "
                f"twice {sorted(set(made) & set(shared))[:3]}"
            )
        check_shapes(made, len(self.clients) if expand is None else 1, self.initial)
        self._network.write(shared)

    @property
    def _device(self) -> torch.device:
        return self._trainer.gradients.device

    def _passes(self, most: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """One pass over all training data: which clients, and their examples ``[C, batch_size]``.

        As many clients at a time as are in flight in training. most: examples of each client.
        """
        size = self._trainer.gradients.local.batch_size
        for first in range(0, len(self._data), self._trainer.width):
            part = slice(first, min(first + self._trainer.width, len(self._data)))
            own = [client.train[:most] for client in self._data[part]]
            self._trainer.gradients.lane.select(part)
            steps = max(-(-len(train) // size) for train in own)
            plan = np.full((len(own), steps * size), -1, dtype=np.int64)
            for k, train in enumerate(own):
                plan[k, : len(train)] = train
            for s in range(steps):
                yield part, plan[:, s * size : (s + 1) * size]

    def _sums(
        self, params: Tree, index: np.ndarray, lane: Lane | None = None
    ) -> tuple[Tensor, Tensor]:
        gradients = self._trainer.gradients
        batch = gradients.examples.batch(torch.from_numpy(index)).to(gradients.device)
        logits = (lane or gradients.lane).logits(params, batch)
        return client_sums(gradients.task, logits, batch)


def check_shapes(stacked: Tree, clients: int, like: Tree) -> None:
    """Raises ValueError unless every tensor is ``like``'s (unstacked) for so many clients."""
    for name, value in stacked.items():
        wanted = (clients, *like[name].shape)
        if tuple(value.shape) != wanted:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; for {clients} clients it is {wanted}"
            )
