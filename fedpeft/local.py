"""Local training of one cohort: C of its K clients at a time step together on a matrix ``[C, P]``.

Each row of the matrix is one client's adapter. Every operation is row-wise (batched forward,
optimizers, clipping, learning-rate schedule, loss scale), so no client sees another's data or
state. A row whose client is done takes the next one (``cohort.turns``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpeft import streams
from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.optimizer import RowOptimizer
from fedpeft.cohort.per_example import step_function
from fedpeft.cohort.turns import IDLE, Turn, turns
from fedpeft.config import Local
from fedpeft.privacy.record_level import NoisySteps
from fedpeft.steps import steps_of
from fedpeft.strategy import Adjust, Expand, Fit
from fedpeft.tree import Layout, Tree

FP16_SCALE = 2.0**14
"""First loss scale of a client under fp16; halved for that client when its gradient overflows."""


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
    """Local training of cohorts: ``gradients`` says of what and where, ``width`` how many at once.

    on_done: called with a client's number in its cohort when its local training is complete.
    """

    def __init__(
        self, gradients: Gradients, width: int, on_done: Callable[[int], None] = lambda k: None
    ) -> None:
        self.gradients = gradients
        self.width = width
        self.on_done = on_done

    def fit(
        self,
        start: Tree,
        plans: Sequence[np.ndarray],
        progress: Progress,
        adjust: Adjust | None = None,
        own: Mapping[str, Tree] | None = None,
        expand: Expand | None = None,
        noisy: NoisySteps | None = None,
    ) -> Fit:
        """Local training of K clients from ``start`` (stacked) along their batch plans.

        plans: one ``[steps_k, B]`` per client. adjust, own, expand: as in ``Cohort.fit``. noisy:
        step by DP-SGD; ``adjust`` then gets the noised gradient.
        """
        gradients = self.gradients.through(expand)
        device, local = gradients.device, gradients.local
        layout = Layout.of({name: value[0] for name, value in start.items()})
        clients = layout.pack(start).to(device, torch.float32)  # [K, P], where each client is now
        steps = torch.tensor([len(plan) for plan in plans])
        total = torch.zeros(len(plans), device=device)
        rows, step = _Rows(clients, local), step_function(gradients, noisy)
        for turn, following in _with_next(
            turns(plans, self.width, gradients.lane.compiled != "none")
        ):
            rows.seat(turn, own or {})
            if following is not None and local.clip_per == "client":
                gradients.loader.ahead(following.index)
            gradients.lane.select(turn.clients.tolist())
            gradient, losses = step(rows.matrix, layout, turn, rows.scale)
            if local.clip_norm > 0 and local.clip_per == "client":
                gradient = clip_rows(gradient, local.clip_norm)
            if adjust is not None:
                with torch.no_grad():
                    at = layout.unpack(rows.matrix.detach())
                    gradient = layout.pack(adjust(layout.unpack(gradient), at, rows.own))
            rows.step(gradient, rates(local, turn, steps, progress))
            rows.land(turn, losses, total)
            for k in turn.clients[turn.last].tolist():
                self.on_done(k)
        return Fit(layout.unpack(clients), total / steps.clamp(min=1).to(device), steps)


def rates(local: Local, turn: Turn, steps: Tensor, progress: Progress) -> Tensor | None:
    """Learning-rate factors ``[C, 1]`` of a turn's rows, or None where they are all 1.

    steps: of all clients in the round, int64 ``[K]``.
    """
    if local.schedule == "constant" and local.warmup == 0:
        return None
    within = torch.from_numpy(turn.steps) / steps[torch.from_numpy(turn.clients)]
    return rate(local, (progress.round - 1 + within) / progress.rounds).float()[:, None]


class _Rows:
    """The rows in flight: ``matrix [C, P]``, the optimizer, the loss scale ``[C]``.

    clients: ``[K, P]``, from which clients start and to which they return. own: the trees of
    ``Cohort.fit`` for the clients in the rows.
    """

    def __init__(self, clients: Tensor, local: Local) -> None:
        self.matrix = clients[:0]
        self.scale = clients.new_zeros(0)
        self.own: dict[str, Tree] = {}
        self._clients = clients
        self._local = local
        self._optimizer = RowOptimizer(local, self.matrix)
        self._first_scale = FP16_SCALE if local.precision == "fp16" else 1.0

    def seat(self, turn: Turn, own: Mapping[str, Tree]) -> None:
        """Lets rows go whose clients are done, and seats the clients that begin in ``turn``."""
        if np.array_equal(turn.source, np.arange(len(self.matrix))):
            return
        device = self._clients.device
        at, source = (torch.from_numpy(x).to(device) for x in (turn.clients, turn.source))
        if len(self.matrix) == 0:
            self.matrix = self._clients[at]
            self.scale = torch.full((len(at),), self._first_scale, device=device)
            self._optimizer = RowOptimizer(self._local, self.matrix)
        elif len(source) < len(self.matrix):
            kept = source.clamp(min=0)
            self.matrix, self.scale = self.matrix.detach()[kept], self.scale[kept]
            self._optimizer.select(kept)
        self.matrix = self.matrix.detach()
        for row in np.flatnonzero(turn.source == IDLE).tolist():
            self.matrix[row] = self._clients[int(turn.clients[row])]
            self.scale[row] = self._first_scale
            self._optimizer.reset(row)
        self.matrix.requires_grad_()
        where = at.clamp(min=0)
        self.own = {
            name: {key: value.to(device)[where] for key, value in tree.items()}
            for name, tree in own.items()
        }

    def step(self, gradient: Tensor, factors: Tensor | None) -> None:
        """One optimizer step of every row; under fp16 a row that overflowed waits and rescales."""
        factors = None if factors is None else factors.to(gradient.device)
        taken = None
        if self._local.precision == "fp16":
            taken = torch.isfinite(gradient).all(dim=1)
            self.scale = self.scale * torch.where(taken, 1.0, 0.5)
        self._optimizer.step(self.matrix, gradient, factors, taken)

    def land(self, turn: Turn, losses: Tensor, total: Tensor) -> None:
        """Adds the turn's losses ``[C]`` to ``total [K]``, and brings home who is done."""
        present = np.flatnonzero(turn.clients != IDLE)
        total[turn.clients[present]] += losses[present]
        done = np.flatnonzero(turn.last)
        if len(done):
            self._clients[turn.clients[done]] = self.matrix.detach()[done]


def _with_next(found: Iterable[Turn]) -> Iterator[tuple[Turn, Turn | None]]:
    """Each turn with the one after it (None after the last)."""
    before: Turn | None = None
    for turn in found:
        if before is not None:
            yield before, turn
        before = turn
    if before is not None:
        yield before, None
