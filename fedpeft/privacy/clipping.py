"""Clipping at client level: one bound on the whole update, and the bound that follows the clients.

Adaptive clipping is of Andrew et al. (arXiv 1905.03871): each client's second release is one bit,
whether its update was within the bound, and the bound moves to a quantile of the norms. Nothing
here adds noise; the mechanism that does must take ``split`` for the noise on updates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.errors import FedpeftError

TARGET = 0.5
RATE = 0.2


@dataclass(frozen=True)
class Clipped:
    """K updates of norm ``bound`` at most.

    rows: ``[K, P]``. unclipped: bool ``[K]``, whether a row was within the bound as it came.
    broken: how many rows were not finite; private, like every count over clients.
    """

    rows: Tensor
    unclipped: Tensor
    broken: int


def clip(rows: Tensor, bound: float) -> Clipped:
    """Each row scaled to at most ``bound`` in L2 norm: row x min(1, bound / norm).

    rows: float32 or float64 ``[K, P]``, one client's whole update each. A row with a number that is
    not finite, or whose norm overflows float64, becomes zero: it then adds nothing, which is within
    the bound, and it counts as unclipped, as a zero row does. Norms are taken in float64, and what
    is scaled is made shorter by a few roundings, so that the bound holds for the rows as returned.
    Raises FedpeftError for other rows, and unless the bound is positive and finite.
    """
    if rows.dim() != 2 or rows.dtype not in (torch.float32, torch.float64):
        raise FedpeftError(
            f"rows must be float32 or float64 of shape [clients, numbers], not {rows.dtype} "
            f"{list(rows.shape)}. Cast them first: noise on fewer bits is not Gaussian."
        )
    _check_positive("bound", bound)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    good = torch.isfinite(norms)
    within = ~good | (norms <= bound)
    slack = max(4 * torch.finfo(rows.dtype).eps, 1e-12)
    scale = torch.where(within, 1.0, bound * (1 - slack) / norms)
    scale[scale < torch.finfo(rows.dtype).tiny] = 0.0  # would be rounded, perhaps up
    kept = torch.where(good.unsqueeze(1), rows, 0.0)
    kept *= scale.to(rows.dtype).unsqueeze(1)
    return Clipped(kept, within, int((~good).sum()))


def adapt(
    bound: float, noised_fraction: float, target: float = TARGET, rate: float = RATE
) -> float:
    """The next round's bound: bound x exp(-rate (noised_fraction - target)).

    noised_fraction: of clients whose update was *un*clipped, with noise on it, so that it may lie
    outside [0, 1]. Too many unclipped: the bound falls. It settles at the ``target`` quantile of
    the norms. The result stays within what float32 holds. Raises FedpeftError for what is not
    finite, a bound that is not positive, and a target outside (0, 1).
    """
    _check_positive("bound", bound)
    _check_positive("rate", rate)
    if not 0 < target < 1:
        raise FedpeftError(f"target={target} must lie between 0 and 1, e.g. 0.5, the median.")
    if not math.isfinite(noised_fraction):
        raise FedpeftError(f"noised_fraction={noised_fraction} must be finite.")
    limits = torch.finfo(torch.float32)
    step = min(max(-rate * (noised_fraction - target), -80.0), 80.0)
    return min(max(bound * math.exp(step), limits.tiny), limits.max)


def split(noise_multiplier: float, bits_std: float) -> float:
    """The noise multiplier for the updates, where updates and bits together cost the given one.

    (noise_multiplier^-2 - (2 bits_std)^-2)^(-1/2), Andrew et al., theorem 1. bits_std: standard
    deviation of the noise on the sum of the bits, each shifted to -1/2 or 1/2, so that its
    sensitivity is 1/2; a twentieth of the expected clients is their choice. The release is then
    accounted once, with ``noise_multiplier``. Raises FedpeftError unless
    ``noise_multiplier < 2 bits_std``: the bits alone would cost more.
    """
    _check_positive("noise_multiplier", noise_multiplier)
    _check_positive("bits_std", bits_std)
    if not noise_multiplier < 2 * bits_std:
        raise FedpeftError(
            f"noise_multiplier={noise_multiplier} must be below twice bits_std={bits_std}: else "
            "the bits alone cost more than that. Raise bits_std, or clip at a fixed bound."
        )
    ratio = noise_multiplier / (2 * bits_std)
    return noise_multiplier / math.sqrt((1 - ratio) * (1 + ratio))


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise FedpeftError(f"{name}={value} must be positive and finite.")
