"""From a budget to the noise, or to the number of releases, that it pays for.

Both searches end on the safe side: what they return was evaluated and is within the budget. They
look with RDP first, which costs milliseconds and never reports less than the accountant asked for,
so that only a few evaluations of the slow one are left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from fedpeft.errors import FedpeftError
from fedpeft.privacy.accountants import (
    Accountant,
    check_accountant,
    check_delta,
    check_epsilon,
    epsilon,
    epsilon_of,
)
from fedpeft.privacy.events import Event, History, Nothing, history, join

MOST_REPETITIONS = 1_000_000
"""``affordable`` looks no further: by then grids are large, and no run has as many rounds."""

_LEAST_NOISE = 1e-3
_MOST_NOISE = 1e6


def noise_multiplier(
    target_epsilon: float,
    delta: float,
    event_of: Callable[[float], Event],
    accountant: Accountant = "prv",
    tolerance: float = 1e-3,
) -> float:
    """The least noise multiplier whose event costs at most ``target_epsilon`` at ``delta``.

    event_of: noise multiplier -> the event of the whole run; more noise must not cost more. The
    result is within a factor ``1 + tolerance`` above the least, and its own cost was evaluated.
    Raises FedpeftError where arguments are out of range, and where no noise multiplier from 0.001
    to a million divides what is within the target from what is not.
    """
    check_epsilon(target_epsilon)
    check_delta(delta)
    check_accountant(accountant)
    if not 0 < tolerance < 1:
        raise FedpeftError(f"tolerance={tolerance} must lie between 0 and 1, e.g. 0.001.")

    def within(noise: float, by: Accountant) -> bool:
        return epsilon(event_of(noise), delta, by) <= target_epsilon

    low, high = _bracket(lambda noise: within(noise, "rdp"), target_epsilon, delta)
    low, high = _bisect(lambda noise: within(noise, "rdp"), low, high, max(tolerance, 0.01))
    if accountant == "rdp":
        return _bisect(lambda noise: within(noise, "rdp"), low, high, tolerance)[1]
    step = 0.95  # RDP asks for about a tenth more noise than is needed
    low = high * step
    while within(low, accountant):
        step *= step
        low, high = low * step, low
        if low < _LEAST_NOISE:
            raise _no_boundary(target_epsilon, delta, "the least")
    return _bisect(lambda noise: within(noise, accountant), low, high, tolerance)[1]


def affordable(
    event: Event,
    budget_epsilon: float,
    delta: float,
    accountant: Accountant = "prv",
    after: Event | None = None,
) -> int:
    """How many times ``event`` fits into the budget behind ``after`` (by default nothing).

    Exact up to a thousand, above it within 0.1 % below the most. 0 where not even once; at most
    MOST_REPETITIONS (a million), which is also the answer for an event that releases nothing and
    for an infinite budget. Cached. Raises FedpeftError where arguments are out of range.
    """
    if not 0 < budget_epsilon <= math.inf:
        raise FedpeftError(f"budget_epsilon={budget_epsilon} must be positive.")
    check_delta(delta)
    check_accountant(accountant)
    rest = history(Nothing() if after is None else after)
    return affordable_of(history(event), rest, budget_epsilon, delta, accountant)


@lru_cache(maxsize=65_536)
def affordable_of(
    one: History, rest: History, budget_epsilon: float, delta: float, accountant: Accountant
) -> int:
    """``affordable`` of histories; its arguments are taken as checked."""
    if not one or budget_epsilon == math.inf:
        return MOST_REPETITIONS

    def excess(times: int, by: Accountant) -> float:
        return epsilon_of(join(rest, one, times), delta, by) - budget_epsilon

    low = _most(lambda n: excess(n, "rdp"), 0, 1)
    if accountant == "rdp":
        return low
    return _most(lambda n: excess(n, accountant), low, max(1, low // 8))


def _bracket(
    within: Callable[[float], bool], target_epsilon: float, delta: float
) -> tuple[float, float]:
    """Neighbouring powers of two, the lower not within the target, the upper within."""
    high = 1.0
    while not within(high):
        high *= 2
        if high > _MOST_NOISE:
            raise _no_boundary(target_epsilon, delta, "the most")
    low = high / 2
    while within(low):
        low, high = low / 2, low
        if low < _LEAST_NOISE:
            raise _no_boundary(target_epsilon, delta, "the least")
    return low, high


def _no_boundary(target_epsilon: float, delta: float, end: str) -> FedpeftError:
    noise, holds = (_MOST_NOISE, "not met") if end == "the most" else (_LEAST_NOISE, "met already")
    return FedpeftError(
        f"target_epsilon={target_epsilon} at delta={delta} is {holds} with {end} noise multiplier "
        f"that is tried, {noise:g}. Check the target, and that the event depends on the noise."
    )


def _bisect(
    within: Callable[[float], bool], low: float, high: float, tolerance: float
) -> tuple[float, float]:
    """The bracket narrowed until ``high <= low (1 + tolerance)``; ``high`` stays within."""
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if within(middle) else (middle, high)
    return low, high


def _most(excess: Callable[[int], float], low: int, step: int) -> int:
    """The largest n from ``low`` to MOST_REPETITIONS whose excess is not positive; else ``low``.

    Steps grow until one is in excess; then false position, the excess of the end that stays halved
    so that both ends move: an evaluation may take seconds. Above a thousand it stops at 0.1 %.
    """
    below = excess(low)
    if below > 0:
        return low
    high, above = low, below
    while above <= 0:
        low, below = high, above
        if low == MOST_REPETITIONS:
            return low
        high = min(low + step, MOST_REPETITIONS)
        above, step = excess(high), 2 * step
    while high - low > max(1, low // 1000):
        part = below / (below - above) if math.isfinite(above) else 0.5
        guess = min(max(low + round(part * (high - low)), low + 1), high - 1)
        found = excess(guess)
        if found <= 0:
            low, below, above = guess, found, above / 2
        else:
            high, above, below = guess, found, below / 2
    return low
