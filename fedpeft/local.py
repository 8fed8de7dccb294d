"""Local training of one cohort: K clients step in lockstep on one matrix ``[K, P]``.

Row k of the matrix is client k's adapter. Every operation is row-wise (batched forward, optimizers,
clipping, learning-rate schedule, loss scale), so no client sees another's data or state. Clients
with fewer steps leave the batch when they are done; rows must come with most steps first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpeft import streams
from fedpeft.cohort.lanes import Lane
from fedpeft.cohort.per_example import step_gradients
from fedpeft.config import Local
from fedpeft.data.clients import Task
from fedpeft.data.examples import Examples
from fedpeft.strategy import Adjust, Fit
from fedpeft.tree import Layout, Tree

FP16_SCALE = 2.0**14
"""First loss scale of a client under fp16; halved for that client when its gradient overflows."""


def steps_of(examples: int, local: Local) -> int:
    """Optimizer steps per round of a client with ``examples`` training examples."""
    return local.steps or local.epochs * math.ceil(examples / (local.batch_size * local.accumulate))


def batch_plan(train: np.ndarray, local: Local, seed: int, client: str, round: int) -> np.ndarray:
    """Which examples a client uses at each step of a round: int64 ``[steps, B]``, -1 where absent.

    B = batch_size * accumulate. Each pass is a fresh permutation from the client's own stream
    (seed, client, round, pass); batches never mix two passes.
    """
    width = local.batch_size * local.accumulate
    per_pass = math.ceil(len(train) / width)
    steps = steps_of(len(train), local)
    plan = np.full((math.ceil(steps / per_pass), per_pass * width), -1, dtype=np.int64)
    for i in range(len(plan)):
        order = streams.numpy_stream(seed, "batches", client, round, i).permutation(len(train))
        plan[i, : len(train)] = train[order]
    return plan.reshape(-1, width)[:steps]


@dataclass(frozen=True)
class Progress:
    """Where a round lies in the run, for the learning-rate schedule; ``round`` counts from 1."""

    round: int
    rounds: int


def rate(local: Local, done: Tensor) -> Tensor:
    """The factor on the learning rate after the share ``done`` of the run (any shape, 0 to 1)."""
    warm = (done / local.warmup).clamp(max=1.0) if local.warmup > 0 else torch.ones_like(done)
    left = ((done - local.warmup) / (1.0 - local.warmup)).clamp(0.0, 1.0)
    if local.schedule == "linear":
        return warm * (1.0 - left)
    if local.schedule == "cosine":
        return warm * 0.5 * (1.0 + torch.cos(math.pi * left))
    return warm


def clip_rows(gradient: Tensor, bound: float) -> Tensor:
    """Each row of ``[K, P]`` scaled to a Euclidean norm of at most ``bound``."""
    norms: Tensor = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    factor: Tensor = bound / norms.clamp(min=bound)
    return gradient * factor


class Trainer:
    """Local training on one device: the lane, the task, the data and the recipe's settings."""

    def __init__(
        self, lane: Lane, task: Task, examples: Examples, local: Local, device: torch.device
    ) -> None:
        self.lane = lane
        self.task = task
        self.examples = examples
        self.local = local
        self.device = device
        self.gradients = step_gradients(lane, task, examples, local, device)

    def fit(
        self, start: Tree, plans: Sequence[np.ndarray], progress: Progress, adjust: Adjust | None
    ) -> Fit:
        """Local training of K clients from ``start`` (stacked) along their batch plans.

        plans: one ``[steps_k, B]`` per client, most steps first.
        """
        layout = Layout.of({name: value[0] for name, value in start.items()})
        matrix = layout.pack(start).to(self.device, torch.float32).requires_grad_()
        optimizer = self._optimizer(matrix)
        steps = torch.tensor([len(plan) for plan in plans])
        counts = steps.tolist()
        assert counts == sorted(counts, reverse=True), "clients come with most steps first"
        final, total = matrix.detach().clone(), torch.zeros(len(plans), device=self.device)
        scale = torch.full((len(plans),), self._first_scale, device=self.device)
        for step in range(counts[0]):
            active = int((steps > step).sum())
            index = np.stack([plan[step] for plan in plans[:active]])
            gradient, losses = self.gradients.step(matrix, layout, index, scale)
            total[:active] += losses
            if self.local.clip_norm > 0:
                gradient = clip_rows(gradient, self.local.clip_norm)
            if adjust is not None:
                with torch.no_grad():
                    changed = adjust(layout.unpack(gradient), layout.unpack(matrix.detach()))
                    gradient = layout.pack(changed)
            good = self._step(matrix, gradient, optimizer, self._rates(steps, step, progress))
            scale *= torch.where(good, 1.0, 0.5)
            still = int((steps > step + 1).sum())
            final[still:active] = matrix.detach()[still:active]
        loss = total / steps.clamp(min=1).to(self.device)
        return Fit(layout.unpack(final), loss, steps)

    @property
    def _first_scale(self) -> float:
        return FP16_SCALE if self.local.precision == "fp16" else 1.0

    def _optimizer(self, matrix: Tensor) -> torch.optim.Optimizer:
        local = self.local
        if local.optimizer == "sgd":
            return torch.optim.SGD(
                [matrix], lr=local.lr, momentum=local.momentum, weight_decay=local.weight_decay
            )
        return torch.optim.AdamW([matrix], lr=local.lr, weight_decay=local.weight_decay)

    def _rates(self, steps: Tensor, step: int, progress: Progress) -> Tensor | None:
        """Learning-rate factors ``[K, 1]`` at ``step``, or None where they are all 1."""
        if self.local.schedule == "constant" and self.local.warmup == 0:
            return None
        within = (step / steps.clamp(min=1)).clamp(max=1.0)
        done = (progress.round - 1 + within) / progress.rounds
        return rate(self.local, done).to(self.device, torch.float32)[:, None]

    def _step(
        self,
        matrix: Tensor,
        gradient: Tensor,
        optimizer: torch.optim.Optimizer,
        rates: Tensor | None,
    ) -> Tensor:
        """One optimizer step on every row; returns which rows took it, bool ``[K]``.

        The updates of SGD and AdamW are proportional to the learning rate, so a row's own rate is
        a factor on its update. Under fp16 a row whose gradient overflowed keeps all its state.
        """
        scaled = self.local.precision == "fp16"
        keep = {"": matrix, **(_row_state(optimizer, matrix) if scaled else {})}
        before = (
            {n: v.detach().clone() for n, v in keep.items()} if scaled or rates is not None else {}
        )
        matrix.grad = gradient
        optimizer.step()
        if rates is not None:
            with torch.no_grad():
                matrix.copy_(before[""] + rates * (matrix - before[""]))
        if not scaled:
            return torch.ones(len(matrix), dtype=torch.bool, device=self.device)
        good = torch.isfinite(gradient).all(dim=1)
        with torch.no_grad():
            for name, value in {"": matrix, **_row_state(optimizer, matrix)}.items():
                old = before.get(name, torch.zeros_like(value))
                value.copy_(torch.where(good[:, None], value, old))
        return good


def _row_state(optimizer: torch.optim.Optimizer, matrix: Tensor) -> Tree:
    """The optimizer's tensors that have a row per client."""
    state = optimizer.state.get(matrix, {})
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and value.shape == matrix.shape
    }
