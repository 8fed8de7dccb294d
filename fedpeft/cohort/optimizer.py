"""SGD and AdamW on the rows of a matrix ``[C, P]``: each row is a client with its own state.

``torch.optim`` counts steps once per tensor; with continuous batching a row may be at its third
step while its neighbour is at its first, so the step count, the bias correction and the learning
rate are columns here. Each row moves exactly as under ``torch.optim.SGD`` and ``torch.optim.AdamW``
(tests/test_local.py compares them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedpeft.config import Local

BETAS = (0.9, 0.999)
"""AdamW's decay rates (Kingma and Ba, arXiv 1412.6980; torch's defaults)."""

EPS = 1e-8
"""AdamW's epsilon (torch's default)."""


class RowOptimizer:
    """The state of C rows of P numbers: step counts ``[C, 1]`` and moments ``[C, P]`` (0 to 2)."""

    def __init__(self, local: Local, matrix: Tensor) -> None:
        self._local = local
        self._steps = torch.zeros(len(matrix), 1, device=matrix.device)
        moments = 2 if local.optimizer == "adamw" else int(local.momentum > 0)
        self._moments = [torch.zeros_like(matrix, requires_grad=False) for _ in range(moments)]

    @torch.no_grad()
    def step(
        self,
        matrix: Tensor,
        gradient: Tensor,
        rates: Tensor | None = None,
        taken: Tensor | None = None,
    ) -> None:
        """Moves ``matrix`` by one step against ``gradient``, both ``[C, P]``, in place.

        rates: factors on the learning rate, ``[C, 1]``. taken: bool ``[C]``; rows that are False
        keep their numbers and their whole state, whatever their gradient holds.
        """
        state = [matrix, self._steps, *self._moments]
        before = [value.clone() for value in state] if taken is not None else []
        self._steps += 1
        lr = self._local.lr if rates is None else self._local.lr * rates
        if self._local.optimizer == "sgd":
            self._sgd(matrix, gradient, lr)
        else:
            self._adamw(matrix, gradient, lr)
        if taken is not None:
            for now, old in zip(state, before, strict=True):
                now.copy_(torch.where(taken[:, None], now, old))

    @torch.no_grad()
    def reset(self, row: int) -> None:
        """Row ``row`` begins anew: another client takes its place."""
        self._steps[row] = 0
        for moment in self._moments:
            moment[row] = 0

    def select(self, rows: Tensor) -> None:
        """Goes on with ``rows`` (int64) alone, in that order."""
        self._steps = self._steps[rows]
        self._moments = [moment[rows] for moment in self._moments]

    def _sgd(self, matrix: Tensor, gradient: Tensor, lr: float | Tensor) -> None:
        if self._local.weight_decay:
            gradient = gradient + self._local.weight_decay * matrix
        for moment in self._moments:  # one with momentum, none without
            gradient = moment.mul_(self._local.momentum).add_(gradient)
        matrix -= lr * gradient

    def _adamw(self, matrix: Tensor, gradient: Tensor, lr: float | Tensor) -> None:
        first, second = self._moments
        first.lerp_(gradient, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        bias_1, bias_2 = (1 - beta**self._steps for beta in BETAS)
        if self._local.weight_decay:
            matrix *= 1 - lr * self._local.weight_decay
        matrix -= (lr / bias_1) * first / (second.sqrt() / bias_2.sqrt()).add_(EPS)
