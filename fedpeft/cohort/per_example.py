"""Per-example gradients by the cohort's own mechanism, clipped and summed per client.

Every example of a step is a client of its own whose parameters are its client's: the lane that
carries K clients carries the examples, no hooks. The norm is Euclidean, flat over all trainable
tensors, in float32, of the gradient of the example's own loss: its cross-entropy, or the mean over
its own predicted tokens. So what one example adds to a sum depends on that example and the adapter
alone, and is at most ``clip_norm`` long (Abadi et al., arXiv 1607.00133, Algorithm 1, without the
noise).

Two ways to the same sum. *One pass*: all gradients ``[n, P]`` of a pass are held, as many rows as
the budget allows. *Two passes* over one client's graph: the first backward takes each tensor's
per-example gradients only to add up their squared norms, the second takes them again and adds them
up with their weights; never more than one tensor's are held. Both act on the parameter, not on the
layer, so they serve every adapter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedpeft.cohort.chunk import free_memory
from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import LoopLane
from fedpeft.cohort.loader import PASS_COST, cuts
from fedpeft.cohort.turns import Turn
from fedpeft.metrics import client_sums
from fedpeft.privacy.record_level import NoisySteps
from fedpeft.tree import Layout, Tree

NUMBERS = {"cpu": 2**27, "cuda": 2**30}
"""Most per-example gradient numbers (examples x P) held at a time: 0.5 and 4 GB in float32."""

SHARE = 0.125
"""Share of the free memory that they may take; their parameters take as much again."""

SECOND_PASS = 1.5
"""Cost of a forward and two backward passes over that of one: behind a frozen base, whose own
gradients are not computed, backward costs about what forward does."""

RESCALE = 2.0**-7
"""Factor on the loss scale when examples that overflowed under fp16 are tried again."""

Weigh = Callable[[Tensor, Tensor], Tensor]
"""``(norms [n], positions in the index [n]) -> weights [n]`` of the examples' gradients."""

StepFunction = Callable[[Tensor, Layout, Turn, Tensor], tuple[Tensor, Tensor]]
"""As ``Gradients.step``, of a turn."""


@dataclass(frozen=True)
class Budget:
    """How many per-example gradient ``numbers`` may be held; ``passes`` forces one or two."""

    numbers: int
    passes: Literal[1, 2] | None = None

    @staticmethod
    def of(device: torch.device) -> Budget:
        """What the device's free memory allows now."""
        return Budget(min(NUMBERS[device.type], int(SHARE * free_memory(device)) // 4))


@dataclass(frozen=True)
class Clipped:
    """Sums of clipped gradients, and what the examples were before clipping.

    total: ``[K, P]``, zero for clients without examples. norms, losses: ``[a, B]`` like the index,
    0 where absent. An example whose gradient is not finite has a norm that is not, and added zero.
    """

    total: Tensor
    norms: Tensor
    losses: Tensor

    @property
    def skipped(self) -> Tensor:
        """Examples whose gradient is not finite, per client: int64 ``[a]``.

        Depends on private data: under differential privacy it is not to be released as it is.
        """
        return (~torch.isfinite(self.norms)).sum(1)


@dataclass(frozen=True)
class _Rows:
    """Examples of a step: flat position in the index, client, example number; all int64 ``[n]``."""

    at: np.ndarray
    client: np.ndarray
    example: np.ndarray

    @staticmethod
    def of(index: np.ndarray) -> _Rows:
        at = np.flatnonzero(index >= 0)
        return _Rows(at, at // index.shape[1], index.reshape(-1)[at])

    def __len__(self) -> int:
        return len(self.at)

    def take(self, which: np.ndarray | slice) -> _Rows:
        return _Rows(self.at[which], self.client[which], self.example[which])


@dataclass(frozen=True)
class _Call:
    """One request: where, with which loss scale ``[K]``, and how to weigh; filled in place."""

    matrix: Tensor
    layout: Layout
    scale: Tensor
    weigh: Weigh
    total: Tensor  # [K, P]
    norms: Tensor  # [a * B]
    losses: Tensor  # [a * B]

    def weights(self, squares: Tensor, at: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights of the scaled gradients, and which examples to leave out (None: none).

        squares: ``[n]`` squared norms of the scaled gradients. Notes the norms.
        """
        norms = squares.sqrt() / scale
        self.norms[at] = norms
        bad = ~torch.isfinite(norms)
        weights = self.weigh(norms, at).masked_fill(bad, 0.0) / scale
        return weights, bad if bool(bad.any()) else None


class _Collector:
    """What the backward passes through ``_Expand`` do with the gradients of n examples."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = rows
        self.squares = torch.zeros(rows, device=device)
        self.weights: Tensor | None = None
        self.bad: Tensor | None = None

    def take(self, gradient: Tensor) -> Tensor | None:
        """First backward: adds up squares, no gradient. Second: the weighted sum over examples."""
        if self.weights is None:
            self.squares += _squares(gradient)
            return None
        total: Tensor = torch.tensordot(self.weights, _without(gradient, self.bad), dims=1)
        return total


class _Expand(torch.autograd.Function):
    """A client's tensor for n examples, as a view; their gradients go to a collector."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, collector: _Collector) -> Tensor:
        ctx.collector = collector
        return value.expand(collector.rows, *value.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        found: Tensor | None = ctx.collector.take(gradients[0])
        return found, None


_expand: Callable[[Tensor, _Collector], Tensor] = _Expand.apply


class PerExample:
    """Clipped per-example gradients of what ``gradients`` trains on."""

    def __init__(self, gradients: Gradients, budget: Budget | None = None) -> None:
        self._gradients = gradients
        self.lane = gradients.lane
        self.task = gradients.task
        self.examples = gradients.examples
        self.local = gradients.local
        self.device = gradients.device
        self.budget = Budget.of(self.device) if budget is None else budget

    def step(
        self, matrix: Tensor, layout: Layout, index: np.ndarray, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean over each client's examples of their clipped gradients ``[K, P]``, and of losses.

        Arguments as of ``Gradients.step``. The losses ``[a]`` are means over the examples whose
        gradient is finite. The tuner's own penalty, which holds no data, is not clipped.
        """
        found = self.clipped(matrix, layout, index, scale)
        counts = torch.from_numpy((index >= 0).sum(1)).to(self.device)
        gradient = found.total
        gradient[: len(index)] /= counts.clamp(min=1)[:, None]
        finite = torch.isfinite(found.norms)
        losses = found.losses.masked_fill(~finite, 0.0).sum(1)
        mean = losses / (counts - found.skipped).clamp(min=1)
        return self._gradients.regularise(matrix, layout, gradient, mean)

    def noisy_step(
        self, noisy: NoisySteps, matrix: Tensor, layout: Layout, turn: Turn, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As ``step``, by DP-SGD: noised sums over expected numbers of examples.

        The losses are NaN: they depend on private data, and no noise covers them.
        """
        found = self.clipped(matrix, layout, turn.index, scale)
        gradient = noisy.release(found.total, turn.clients)
        unknown = gradient.new_full((len(turn.index),), math.nan)
        return self._gradients.regularise(matrix, layout, gradient, unknown)

    def clipped(self, matrix: Tensor, layout: Layout, index: np.ndarray, scale: Tensor) -> Clipped:
        """Sums of the gradients of the clients' examples, each clipped to ``local.clip_norm``.

        Adding or removing an example of a client changes its sum by at most ``clip_norm``,
        replacing one by at most twice that; no other client's sum changes.
        """
        bound = self.local.clip_norm

        def weigh(norms: Tensor, at: Tensor) -> Tensor:
            return bound / norms.clamp(min=bound)

        return self.weighted(matrix, layout, index, scale, weigh)

    def weighted(
        self, matrix: Tensor, layout: Layout, index: np.ndarray, scale: Tensor, weigh: Weigh
    ) -> Clipped:
        """Sums of the examples' gradients times what ``weigh`` gives them.

        Under fp16 an example whose gradient overflows is tried again with smaller loss scales, so
        that what it adds does not depend on how other examples moved its client's scale.
        """
        total = torch.zeros_like(matrix, requires_grad=False)
        norms = torch.zeros(index.size, device=self.device)
        losses = torch.zeros(index.size, device=self.device)
        rows = self._trainable(_Rows.of(index))
        fp16, size = self.local.precision == "fp16", self._gradients.numbers(matrix, layout)
        for factor in (1.0, RESCALE, 0.0) if fp16 else (1.0,):
            scales = (scale * factor).clamp(min=1.0) if fp16 else scale
            call = _Call(matrix.detach(), layout, scales, weigh, total, norms, losses)
            for part, run in self._passes(rows, size, len(index)):
                run(call, part)
            if fp16:
                rows = rows.take(~np.isfinite(norms.cpu().numpy()[rows.at]))
        return Clipped(total, norms.view(index.shape), losses.view(index.shape))

    @torch.no_grad()
    def values(self, matrix: Tensor, layout: Layout, index: np.ndarray) -> Tensor:
        """Each example's own mean loss, ``[a, B]``, 0 where absent; forward only.

        Rows of the model are made as for gradients, so the same check holds for both.
        """
        losses = torch.zeros(index.size, device=self.device)
        rows, size = self._trainable(_Rows.of(index)), self._gradients.numbers(matrix, layout)
        fits = min(self.budget.numbers // max(1, size), self.local.batch_size * len(index))
        most = 1 if isinstance(self.lane, LoopLane) else max(1, fits)
        for part in self._cut(rows, 1, most):
            own = layout.unpack(matrix.index_select(0, self._placed(part.client)))
            losses[self._placed(part.at)] = self._losses(own, part)
        return losses.view(index.shape)

    def _trainable(self, rows: _Rows) -> _Rows:
        """The examples that have something to predict; the others' loss and gradient are zero."""
        least = 1 if self.task == "classification" else 2
        return rows.take(self.examples.lengths_of(rows.example) >= least)

    def _passes(
        self, rows: _Rows, size: int, clients: int
    ) -> Iterator[tuple[_Rows, Callable[[_Call, _Rows], None]]]:
        """The examples in passes of like length, each with the way it goes."""
        most = max(1, self.budget.numbers // size)
        if self._two_pay(rows, most):
            for client in np.unique(rows.client):
                own = rows.take(rows.client == client)
                yield from ((part, self._two) for part in self._cut(own, 1, self.local.batch_size))
            return
        if isinstance(self.lane, LoopLane):  # alone and without padding
            most = 1
        unit = max(1, min(most, clients))
        most = min(most // unit, self.local.batch_size * clients // unit)
        yield from ((part, self._one) for part in self._cut(rows, unit, most))

    def _two_pay(self, rows: _Rows, most: int) -> bool:
        """Whether two passes cost less than one in parts of ``most`` examples.

        Costs are in tokens. Where all fits, one part is cheaper; where the budget leaves a few
        examples a part, each part costs its overhead, and half a pass more is the lesser evil.
        """
        if isinstance(self.lane, LoopLane) or self.budget.passes == 1:
            return False
        if self.budget.passes == 2:
            return True
        tokens, overhead = (
            int(self.examples.lengths_of(rows.example).sum()),
            PASS_COST[self.device.type],
        )
        per_client = np.unique(rows.client, return_counts=True)[1]
        passes = int(np.ceil(per_client / self.local.batch_size).sum())
        one = tokens + math.ceil(len(rows) / most) * overhead
        return SECOND_PASS * (tokens + passes * overhead) < one

    def _cut(self, rows: _Rows, unit: int, most: int) -> Iterator[_Rows]:
        """Passes of at most ``most`` blocks of ``unit`` examples, short ones first."""
        lengths = self.examples.lengths_of(rows.example)
        order = np.argsort(lengths, kind="stable")
        ends = np.minimum(np.arange(unit, len(rows) + unit, unit), len(rows))
        costs = unit * lengths[order][ends - 1]
        at = cuts(costs.tolist(), most, PASS_COST[self.device.type])
        for i, j in itertools.pairwise(at):
            yield rows.take(order[unit * i : unit * j])

    def _losses(self, stacked: Tree, rows: _Rows) -> Tensor:
        """Each example's own mean loss, ``[n]``, at trained tensors."""
        index = torch.from_numpy(rows.example)[:, None]
        batch = self.examples.batch(index).to(self.device)
        logits = self.lane.logits(self._gradients.expanded(stacked), batch)
        sums, counts = client_sums(self.task, logits, batch)
        return sums / counts

    def _one(self, call: _Call, rows: _Rows) -> None:
        """One backward with every example's gradient at hand."""
        at, client = self._placed(rows.at), self._placed(rows.client)
        own = call.layout.unpack(call.matrix.index_select(0, client))
        leaves = {name: value.detach().requires_grad_() for name, value in own.items()}
        losses, scale = self._losses(leaves, rows), call.scale[client]
        found = torch.autograd.grad(
            (losses * scale).sum(), list(leaves.values()), allow_unused=True
        )
        gradients = {n: g for n, g in zip(leaves, found, strict=True) if g is not None}
        call.losses[at] = losses.detach()
        squares = torch.stack([_squares(g) for g in gradients.values()]).sum(0)
        weights, bad = call.weights(squares, at, scale)
        share = weights.new_zeros(len(call.matrix), len(rows))  # [K, n]
        share[client, torch.arange(len(rows), device=self.device)] = weights
        totals = call.layout.unpack(call.total)
        for name, gradient in gradients.items():
            flat = _without(gradient, bad).reshape(len(rows), -1)
            totals[name] += (share @ flat).view(totals[name].shape)

    def _two(self, call: _Call, rows: _Rows) -> None:
        """Two backwards through one client's graph: norms, then the weighted sum."""
        at, k = self._placed(rows.at), int(rows.client[0])
        collector = _Collector(len(rows), self.device)
        row = call.layout.unpack(call.matrix[k : k + 1])
        leaves = {name: value[0].detach().requires_grad_() for name, value in row.items()}
        stacked = {name: _expand(leaf, collector) for name, leaf in leaves.items()}
        losses, scale = self._losses(stacked, rows), call.scale[k].expand(len(rows))
        loss, wanted = (losses * scale).sum(), list(leaves.values())
        torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        call.losses[at] = losses.detach()
        collector.weights, collector.bad = call.weights(collector.squares, at, scale)
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        totals = call.layout.unpack(call.total)
        for name, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                totals[name][k] += gradient

    def _placed(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.device)


def step_function(gradients: Gradients, noisy: NoisySteps | None = None) -> StepFunction:
    """What gives a step's gradients under the recipe's local settings, noised if asked for."""
    clips = gradients.local.clip_norm > 0 and gradients.local.clip_per == "example"
    if noisy is not None:
        return partial(PerExample(gradients).noisy_step, noisy)
    step = PerExample(gradients).step if clips else gradients.step

    def of_turn(matrix: Tensor, layout: Layout, turn: Turn, scale: Tensor) -> tuple[Tensor, Tensor]:
        return step(matrix, layout, turn.index, scale)

    return of_turn


def _squares(gradient: Tensor) -> Tensor:
    """Squared norms of the rows, float32 ``[n]``."""
    flat = gradient.reshape(len(gradient), -1).float()
    return flat.square().sum(1)


def _without(gradient: Tensor, bad: Tensor | None) -> Tensor:
    """The gradients in float32, zero where ``bad``; weight zero would not make NaN vanish."""
    if bad is None:
        return gradient.float()
    shape = (-1, *[1] * (gradient.ndim - 1))
    return gradient.float().masked_fill(bad.view(shape), 0.0)
