"""What an arm is worth: what the client gained by it, and how far its time was from the others'.

Two rewards in [0, 1]. ``spine`` is built from the four ingredients that are known of FedSpine's
(Yao et al., arXiv 2501.02438): the fall of the local loss, pruning progress, the importance of what
was trained, and the completion time relative to the other clients. ``fedmp`` is that of the same
group's FedMP (ICDE 2022), as recalled: the fall of the loss over the distance from the mean time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.errors import FedpeftError

SLACK = 0.05
"""Share of the mean time that ``fedmp`` adds to every distance from it, so that none is zero."""


@dataclass(frozen=True)
class Worth:
    """Weights of ``spine``: of its three gains, and of being later or earlier than the mean."""

    gain: float = 0.6
    progress: float = 0.2
    importance: float = 0.2
    late: float = 2.0
    early: float = 0.5

    def __post_init__(self) -> None:
        parts = (self.gain, self.progress, self.importance, self.late, self.early)
        if min(parts) < 0 or not (self.gain + self.importance > 0 and sum(parts[:3]) <= 1 + 1e-9):
            raise FedpeftError(
                f"bandit: gain, progress, importance, late, early = {parts}: weights must not be "
                f"negative, the first three must have a sum of at most 1, and gain or importance "
                f"must count."
            )


def share(values: Tensor) -> Tensor:
    """Each value over the largest, ``[m]``, in [0, 1]; what is negative or not finite is 0."""
    found = torch.nan_to_num(values.double(), 0.0, 0.0, 0.0).clamp(min=0)
    return found / found.max().clamp(min=1e-300)


def away(times: Tensor) -> Tensor:
    """``(T - mean T) / mean T`` of the clients that delivered, ``[m]``; times in seconds."""
    times = times.double()
    return (times - times.mean()) / times.mean().clamp(min=1e-300)


def spine(
    apart: Tensor,
    gain: Tensor,
    progress: Tensor,
    importance: Tensor,
    done: Tensor,
    worth: Worth,
) -> Tensor:
    """``(w_g gain + w_p progress + w_i importance) / (1 + late x+ + early x-)``, ``[m]``.

    apart: x of ``away``. gain, importance: shares of the best client's. progress: share of the
    largest step of pruning. done: bool, who has nothing left to prune; for them the other two
    weights are scaled up to a sum of 1.
    """
    pruning = worth.gain * gain + worth.progress * progress + worth.importance * importance
    tuning = (worth.gain * gain + worth.importance * importance) / (worth.gain + worth.importance)
    x = apart.double()
    late = 1 + worth.late * x.clamp(min=0) + worth.early * (-x).clamp(min=0)
    return (torch.where(done, tuning, pruning) / late).clamp(0, 1)


def fedmp(times: Tensor, fall: Tensor) -> Tensor:
    """``fall / (|T - mean T| + 0.05 mean T)``, clipped to [0, 1]; fall: of the loss, in nats."""
    times = times.double()
    apart = (times - times.mean()).abs() + SLACK * times.mean()
    fall = torch.nan_to_num(fall.double(), 0.0, 0.0, 0.0)
    return (fall / apart.clamp(min=1e-300)).clamp(0, 1)
