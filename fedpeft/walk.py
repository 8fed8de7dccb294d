"""Local training along seeded directions: two losses a step, no gradient, no optimizer state.

Zeroth-order descent as in MeZO (Malladi et al., NeurIPS 2023, arXiv 2305.17333): the slope along a
random direction z, ``rho = (l(w + reach z) - l(w - reach z)) / (2 reach)``, and a step against it,
``w <- w - lr rho z``. Seeds stand for directions (``fedpeft.directions``), so what a step did is
two numbers.

In a batched lane the clients of a chunk and both ends of a step go through the model at once. In
the loop lane a client walks in place, on the model's own tensors, beside which there is room for a
part of one direction, made again for each of a step's three moves: the memory of inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import LoopLane
from fedpeft.cohort.per_example import PerExample
from fedpeft.config import Local
from fedpeft.directions import directions, shift
from fedpeft.errors import FedpeftError
from fedpeft.local import Trainer
from fedpeft.model import set_mode
from fedpeft.privacy.record_level import NoisySteps
from fedpeft.strategy import Expand, Route, Walk
from fedpeft.tree import Layout, Tree, row

Measure = Callable[[Tensor, Layout, np.ndarray], Tensor]
"""``(matrix [C, P], its layout, examples [C, B]) -> losses [C]``, or ``[C, B]``, each example's."""

KEPT = 1 << 21
"""Numbers (8 MB) up to which a direction is kept for its step; a larger one is made thrice."""

PLAIN = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
"""What of ``local`` a walk needs to be, as must: every step is a multiple of its direction."""


def check_walk(local: Local) -> None:
    """Raises FedpeftError for settings of local training that a walk has no place for.

    A model is the sum of the steps along its directions only if nothing else moves it.
    """
    wanted = PLAIN | {"warmup": 0.0, "clip_norm": 0.0, "precision": "fp32"}
    why = {
        "precision": "a slope is a small difference of losses, which 16 bits do not hold",
        "clip_norm": "there is no gradient to clip",
    }
    for name, value in wanted.items():
        found = vars(local)[name]
        if found != value:
            reason = why.get(name, "a step must be its slope times its direction and nothing else")
            raise FedpeftError(
                f"local.{name}={found!r} with a strategy that walks along seeded directions: "
                f"{reason}. Set local.{name}={value}."
            )
    if not local.steps:
        raise FedpeftError(
            f"local.epochs={local.epochs} with a strategy that walks along seeded directions: all "
            f"clients take the same number of steps. Set local.steps, e.g. to 200."
        )


class Walker:
    """Walks of a cohort along ``route``; ``trainer`` says of what, where and how many at once.

    noisy: release the sum of the examples' clipped slopes with noise, one number a step (DP-ZO).
    """

    def __init__(self, trainer: Trainer, route: Route, noisy: NoisySteps | None = None) -> None:
        self._trainer = trainer
        self._route = route
        self._noisy = noisy

    @torch.no_grad()
    def walk(self, start: Tree, plans: list[np.ndarray], expand: Expand | None = None) -> Walk:
        """See ``Cohort.walk``. plans: the examples of each client's steps, ``[tau, B]`` each."""
        gradients = self._trainer.gradients.through(expand)
        _check(gradients, plans, self._route.seeds.shape[1])
        place = _InPlace if isinstance(gradients.lane, LoopLane) and expand is None else _Rows
        width = 1 if place is _InPlace else self._trainer.width
        device, local = gradients.device, gradients.local
        seeds, factors = self._route.seeds.to(device), self._route.factors
        moves = torch.ones(seeds.shape, device=device) if factors is None else factors.to(device)
        moves = local.lr * moves.float()  # as soon as a step is taken, times its slope
        losses = torch.full(seeds.shape, math.nan, device=device)
        parts, measure = list[Tree](), self._measure(gradients)
        set_mode(gradients.lane.model, training=False, base_dropout=False)
        with gradients.lane.installed():
            for first in range(0, len(plans), width):
                clients = np.arange(first, min(first + width, len(plans)))
                at = place(gradients, {n: value[clients] for n, value in start.items()})
                for t in range(seeds.shape[1]):
                    index = np.stack([plans[k][t] for k in clients])
                    ends = at.ends(seeds[clients, t], self._route.reach, index, measure)
                    slopes, losses[clients, t] = self._slopes(*ends, clients)
                    moves[clients, t] *= slopes
                    at.move(moves[clients, t])
                parts.append(at.adapter())
                for k in clients.tolist():
                    self._trainer.on_done(k)
        set_mode(gradients.lane.model, training=True, base_dropout=local.base_dropout)
        adapter = {n: torch.cat([part[n] for part in parts]) for n in parts[0]}
        return Walk(adapter, moves, losses.nanmean(dim=1))

    def _measure(self, gradients: Gradients) -> Measure:
        if self._noisy is not None:
            return PerExample(gradients).values

        def means(matrix: Tensor, layout: Layout, index: np.ndarray) -> Tensor:
            step = gradients.loader.load(index)
            total = torch.zeros(len(index), device=gradients.device)
            for batch in step.passes:
                own = gradients.expanded(layout.unpack(matrix))
                total += gradients.losses(own, batch) / step.items
            return total

        return means

    def _slopes(self, plus: Tensor, minus: Tensor, clients: np.ndarray) -> tuple[Tensor, Tensor]:
        """Slopes ``[C]``, 0 where a step is skipped, and the mean losses ``[C]``, NaN there."""
        difference = plus - minus
        slopes = difference / (2 * self._route.reach)
        if self._noisy is not None:
            return self._released(slopes, clients), slopes.new_full((len(slopes),), math.nan)
        taken = torch.isfinite(difference) & (difference.abs() <= self._route.cap)
        nothing = slopes.new_full((), math.nan)
        return torch.where(taken, slopes, 0.0), torch.where(taken, (plus + minus) / 2, nothing)

    def _released(self, slopes: Tensor, clients: np.ndarray) -> Tensor:
        """``(sum_i clip(rho_i) + N(0, (z C)^2)) / (q n)`` from the examples' slopes ``[C, B]``.

        Adding or removing an example moves the sum by at most C; an example whose slope is not
        finite adds zero.
        """
        assert self._noisy is not None
        bound = self._noisy.clip_norm
        clipped = torch.where(torch.isfinite(slopes), slopes, 0.0).clamp(-bound, bound)
        return self._noisy.release(clipped.sum(dim=1, keepdim=True), clients)[:, 0]


class _Place(Protocol):
    """Where the clients of a chunk are, ``C`` of them."""

    def ends(
        self, seeds: Tensor, reach: float, index: np.ndarray, measure: Measure
    ) -> tuple[Tensor, Tensor]:
        """The losses ``reach`` ahead and behind along the directions of ``seeds`` ``[C]``."""

    def move(self, moves: Tensor) -> None:
        """Moves by ``moves`` ``[C]`` against the directions that ``ends`` was given."""

    def adapter(self) -> Tree:
        """Where the clients are, stacked."""


class _Rows:
    """A row ``[P]`` for each client; both ends of a step in one pass of ``2 C`` clients."""

    def __init__(self, gradients: Gradients, start: Tree) -> None:
        self._layout = Layout.of(row(start, 0))
        self._matrix = self._layout.pack(start).to(gradients.device, torch.float32)
        self._z = self._matrix

    def ends(
        self, seeds: Tensor, reach: float, index: np.ndarray, measure: Measure
    ) -> tuple[Tensor, Tensor]:
        self._z = directions(seeds, self._layout.sizes)
        both = torch.cat([self._matrix + reach * self._z, self._matrix - reach * self._z])
        plus, minus = measure(both, self._layout, np.concatenate([index, index])).chunk(2)
        return plus, minus

    def move(self, moves: Tensor) -> None:
        self._matrix -= moves[:, None] * self._z

    def adapter(self) -> Tree:
        return self._layout.unpack(self._matrix)


class _InPlace:
    """One client on the model's own tensors, which are moved to one end of a step and the other."""

    def __init__(self, gradients: Gradients, start: Tree) -> None:
        named = dict(gradients.lane.model.named_parameters())
        self._own = {name: named[name].data for name in sorted(start)}
        for name, value in self._own.items():
            value.copy_(start[name][0])
        self._nothing = torch.empty(1, 0, device=gradients.device)
        self._seed, self._reach = torch.zeros(1, dtype=torch.int64), 0.0
        self._sizes = [value.numel() for value in self._own.values()]
        self._kept: tuple[Tensor, ...] = ()

    def ends(
        self, seeds: Tensor, reach: float, index: np.ndarray, measure: Measure
    ) -> tuple[Tensor, Tensor]:
        self._seed, self._reach, layout = seeds, reach, Layout((), ())
        if sum(self._sizes) <= KEPT:
            self._kept = directions(seeds, self._sizes)[0].split(self._sizes)
        self._shift(reach)
        plus = measure(self._nothing, layout, index)
        self._shift(-2 * reach)
        return plus, measure(self._nothing, layout, index)

    def move(self, moves: Tensor) -> None:
        self._shift(self._reach - float(moves[0]))

    def _shift(self, amount: float) -> None:
        if not self._kept:
            shift(list(self._own.values()), self._seed, amount)
            return
        for value, z in zip(self._own.values(), self._kept, strict=True):
            value.add_(z.view(value.shape), alpha=amount)

    def adapter(self) -> Tree:
        return {name: value.clone()[None] for name, value in self._own.items()}


def _check(gradients: Gradients, plans: list[np.ndarray], steps: int) -> None:
    """Raises FedpeftError where the steps are not what was planned, or the tuner adds its own."""
    lengths = {len(plan) for plan in plans}
    if lengths != {steps}:
        raise FedpeftError(
            f"the strategy walks {steps} steps, and the recipe plans "
            f"{sorted(lengths)}, which is what is accounted: let it take the recipe's local.steps."
        )
    if not gradients.objective.plain:
        raise FedpeftError(
            "adapter.kind is one with a penalty or a projection of its own (adalora, kasa, "
            "monteclora, osf, cpt), which a walk along seeded directions would leave out: choose "
            "another adapter.kind."
        )
