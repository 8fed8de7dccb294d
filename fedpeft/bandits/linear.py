"""The linear policy: a client's time is ``alpha work + beta bytes``, and two numbers are learned.

Beyond the paper of FedSpine. Where S-UCB learns the worth of twenty arms one by one, this learns
two numbers per client by recursive least squares with forgetting, predicts the time of every arm,
and plays the arm of the largest reward; what an arm will gain is guessed, optimistically, from its
rank. Work and bytes are relative to those of the whole model with the whole adapter, so that alpha
and beta are in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedpeft.bandits.arms import Arm, pick
from fedpeft.bandits.rewards import Worth, spine

FORGET = 0.85
"""What an observation counts for one later; about seven of them are remembered."""

LOOSE = 1e4
"""Variance of both numbers before anything was seen."""


def nothing() -> Tensor:
    """The fit before anything was seen, float64 ``[3, 2]``: the two numbers, and their spread."""
    return torch.cat([torch.zeros(1, 2), LOOSE * torch.eye(2)]).double()


def observe(fit: Tensor, cost: Tensor, seconds: float) -> Tensor:
    """The fit after a round with ``cost`` ``[2]`` (work, bytes) took ``seconds``.

    With ``k = P x / (f + x' P x)``: ``theta += k (T - x' theta)``, ``P <- (P - k x' P) / f``, P at
    most ``LOOSE`` along its diagonal (a client that always plays the same arm would blow it up).
    """
    theta, spread, x = fit[0], fit[1:], cost.double()
    gain = spread @ x / (FORGET + x @ spread @ x)
    theta = theta + gain * (seconds - x @ theta)
    spread = (spread - torch.outer(gain, x @ spread)) / FORGET
    spread = spread * min(1.0, LOOSE / float(spread.diagonal().max().clamp(min=1e-300)))
    return torch.cat([theta[None], spread])


def predict(fit: Tensor, costs: Tensor) -> Tensor:
    """The seconds ``[M]`` of arms that cost ``costs`` ``[M, 2]``; no number counts as negative."""
    return costs.double() @ fit[0].clamp(min=0)


def hope(rank: int, largest: int) -> float:
    """The gain that is expected of a rank: ``1/2 + 1/2 log r / log R``."""
    return 1.0 if largest <= 1 else 0.5 + 0.5 * math.log(rank) / math.log(largest)


def best(
    fit: Tensor, costs: Tensor, table: Tensor, ranks: Sequence[int], mean: float, still: bool
) -> Arm:
    """The arm of a grid with the largest ``rewards.spine`` at the time that is predicted for it.

    costs: of the table's arms, ``[M, 2]``. ranks: what v chooses among. mean: time of a round, over
    its clients. still: u has to be 0. The first of several.
    """
    v = [float(x) for x in table[:, 2]]
    gain = torch.tensor([hope(pick(ranks, x), max(ranks)) for x in v], dtype=torch.float64)
    apart = (predict(fit, costs) - mean) / max(mean, 1e-300)
    done = torch.full((len(table),), still)
    found = spine(apart, gain, table[:, 0], gain, done, Worth())
    if still:
        found = torch.where(table[:, 0] == 0, found, -math.inf)
    cell = int(found.argmax())
    return Arm(cell, float(table[cell, 0]), v[cell])
