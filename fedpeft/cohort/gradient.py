"""The gradient of one optimizer step for the clients in flight: exact, each client's own.

The loss is the sum of the clients' mean losses; client k's depends on row k of the matrix alone,
so one backward pass per pass of the step gives every client's own gradient.

What is trained need not be the model's tensors: ``through(expand)`` gives gradients by whatever
``expand`` makes them from. This is the one place where the two meet.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedpeft.cohort.lanes import Compiled, Lane
from fedpeft.cohort.loader import Loader
from fedpeft.cohort.objective import Objective
from fedpeft.config import Local
from fedpeft.data.clients import Task
from fedpeft.data.examples import Batch, Examples
from fedpeft.metrics import client_sums
from fedpeft.strategy import Expand
from fedpeft.tree import Layout, Tree, numel


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
        self.loader = Loader(examples, local, device, fixed=lane.compiled != "none")
        self.objective = Objective(lane.model)
        self._expand: Expand | None = None
        self._step_losses = compiled(self.losses, lane.compiled)

    def through(self, expand: Expand | None) -> Gradients:
        """The same, by tensors that ``expand`` makes into the model's."""
        found = copy.copy(self)
        found._expand = expand
        return found

    def expanded(self, trained: Tree) -> Tree:
        """The model's tensors for trained ones, both stacked, differentiable."""
        return trained if self._expand is None else self._expand(trained)

    def numbers(self, matrix: Tensor, layout: Layout) -> int:
        """Numbers per row that are alive in a step: what is trained, or what it expands to."""
        with torch.no_grad():
            one = self.expanded(layout.unpack(matrix[:1]))
        return max(layout.size, numel(one))

    def step(
        self, matrix: Tensor, layout: Layout, index: np.ndarray, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradient ``[C, P]`` and value ``[C]`` of the mean losses of the clients in flight.

        With the tuner's own penalty and projection (``Objective``), where it has them.
        matrix: ``[C, P]`` that requires grad. index: int64 ``[C, B]`` examples, -1 where absent.
        scale: ``[C]`` loss scale under fp16 (else 1); the gradient returned is free of it.
        """
        step = self.loader.load(index)
        gradient: Tensor | None = None
        losses = torch.zeros(len(matrix), device=self.device)
        with self.lane.installed():
            for batch in step.passes:
                stacked = self.expanded(layout.unpack(matrix))
                loss = self._step_losses(stacked, batch) / step.items
                [part] = torch.autograd.grad((loss * scale).sum(), matrix)
                gradient = part if gradient is None else gradient + part
                losses += loss.detach()
        assert gradient is not None, "a step has at least one pass"
        return self.regularise(matrix, layout, gradient / scale[:, None], losses)

    def regularise(
        self, matrix: Tensor, layout: Layout, gradient: Tensor, losses: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adds the tuner's penalty to gradient and loss, and projects the gradient: no data."""
        penalty = self.objective.penalty(self.expanded(layout.unpack(matrix)))
        if penalty is not None:
            gradient = gradient + torch.autograd.grad(penalty.sum(), matrix)[0]
            losses = losses + penalty.detach()
        return self.objective.project(gradient, layout), losses

    def losses(self, stacked: Tree, batch: Batch) -> Tensor:
        """Summed loss of each client's rows of a batch, ``[C]``, differentiable.

        stacked: the model's own tensors.
        """
        return client_sums(self.task, self.lane.logits(stacked, batch), batch)[0]


Losses = Callable[[Tree, Batch], Tensor]


def compiled(losses: Losses, mode: Compiled) -> Losses:
    """``losses`` through ``torch.compile``; ``graphs``: replayed as CUDA graphs.

    Every shape is compiled for itself; a loader with ``fixed`` shapes keeps them few.
    """
    if mode == "none":
        return losses
    chosen = "reduce-overhead" if mode == "graphs" else "default"
    found: Losses = torch.compile(losses, dynamic=False, mode=chosen)
    return found
