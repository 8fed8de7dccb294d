"""DP-FTRL by banded matrix factorisation: noise of one round that the next rounds take back.

What matters in training is the noise of prefix sums A x of the rounds' sums x, A lower triangular
of ones. With A = B C, noise C^-1 z on the rounds costs what one Gaussian mechanism on C x costs,
whoever takes part when, as long as a client takes part at most k times, at least b rounds apart
(Kairouz et al., arXiv 2103.00039; Choquette-Choo et al., arXiv 2306.08153). No sampling is assumed.
C is the band of the square root of A: Toeplitz, c_0 = 1, c_k = c_{k-1} (2k - 1) / (2k), cut after
``bands`` coefficients (Kalinin and Lampert, arXiv 2405.13763).

In round t the clients' clipped updates are summed and y_t = z_t - sum_{0<j<bands} c_j y_{t-j} is
added, z_t independent normal noise of standard deviation noise_multiplier x sensitivity x clip
norm. The event of the whole run, for each client, is one ``Gaussian(noise_multiplier)``. Separation
and participations are a promise about the schedule, which whoever samples clients must keep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fedpeft.errors import FedpeftError


def coefficients(bands: int) -> np.ndarray:
    """c_0 ... c_{bands-1} of the square root of A: float64 ``[bands]``, falling from 1.

    The square root's generating function is (1 - x)^(-1/2). One band is independent noise.
    """
    _check(bands=bands)
    k = np.arange(1, bands)
    return np.cumprod(np.concatenate([[1.0], (2 * k - 1) / (2 * k)]))


def sensitivity(bands: int, rounds: int, separation: int, participations: int) -> float:
    """L2 sensitivity of C x to one client of clip norm 1.

    The client may take part in ``participations`` of ``rounds`` rounds, at least ``separation``
    apart. The worst case is to begin with the first round and to come back as soon as possible
    (Kalinin and Lampert, for coefficients that fall and are not negative), so this is the norm of
    the sum of those columns. Where ``bands <= separation`` they do not overlap:
    sqrt(participations x sum of squared coefficients), but for what the last round cuts off.
    """
    _check(bands=bands, rounds=rounds, separation=separation, participations=participations)
    column = coefficients(min(bands, rounds))
    total = np.zeros(rounds)
    for start in range(0, rounds, separation)[:participations]:
        end = min(rounds, start + len(column))
        total[start:end] += column[: end - start]
    return float(np.linalg.norm(total))


def correlated(z: Tensor, previous: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """One round's noise y_t, from independent noise and what was added in the rounds before.

    z: any shape. previous: y of earlier rounds, the newest last, of the same shape; only the last
    ``bands - 1`` are read, so a deque of that length is enough, empty in the first round.
    coefficients: those of ``coefficients(bands)``. The y must be kept in full precision: what is
    rounded away is not taken back.
    """
    y = z.clone()
    for c, before in zip(coefficients[1:], reversed(previous), strict=False):
        y -= float(c) * before
    return y


def prefix_error(bands: int, rounds: int, separation: int, participations: int) -> float:
    """Root mean square of the noise on prefix sums, over rounds, for unit noise and clip norm.

    Sensitivity x sqrt(mean over t of ||row t of A C^-1||^2), both Toeplitz.
    """
    sens = sensitivity(bands, rounds, separation, participations)
    c = coefficients(min(bands, rounds))[1:]
    inverse = np.zeros(rounds)
    inverse[0] = 1.0
    for t in range(1, rounds):
        reach = min(t, len(c))
        inverse[t] = -np.dot(c[:reach], inverse[t - reach : t][::-1])
    rows = np.cumsum(np.cumsum(inverse) ** 2)
    return sens * math.sqrt(float(np.mean(rows)))


def best_bands(rounds: int, separation: int) -> int:
    """The number of bands up to ``separation`` with the least ``prefix_error``.

    For a client that takes part as often as the separation allows.
    """
    _check(rounds=rounds, separation=separation)
    most = math.ceil(rounds / separation)
    choices = range(1, min(rounds, separation) + 1)
    return min(choices, key=lambda bands: prefix_error(bands, rounds, separation, most))


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise FedpeftError(f"{name}={value!r} must be a whole number from 1.")
