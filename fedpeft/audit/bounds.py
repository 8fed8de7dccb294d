"""Lower bounds on epsilon from what an attack got right.

Of all of these only ``one_run`` is a bound whatever the canaries share: one training, m canaries,
each in or out by its own fair coin. ``two_sets`` and ``gdp`` take the canaries' scores for
independent, and ``gdp`` and ``one_shot`` take the mechanism for a Gaussian one too.

How many guesses are made, and at which threshold, must be fixed before the outcome is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from fedpeft.errors import FedpeftError

LEVEL = 0.95
"""Confidence of a bound, unless another is asked for."""

HALVINGS = 60
"""Steps of a bisection: more than a double has digits."""


@cache
def _special() -> Any:
    """scipy.special, which takes a while to import."""
    from scipy import special

    return special


def one_run_p_value(
    canaries: int, guesses: int, correct: int, epsilon: float, delta: float
) -> float:
    """How likely an (epsilon, delta)-private training lets so many guesses be right, at most.

    canaries: m, each in or out by a fair coin. guesses: r of them, ``correct`` of these are right.
    ``beta + 2 m delta max_i (P[W >= v - i] - beta) / i`` over i = 1..v, for W ~ Bin(r, q), q =
    e^eps / (1 + e^eps) and beta = P[W >= v] (Steinke, Nasr, Jagielski 2023, arXiv 2305.08846,
    Theorem 5.2). Tails are incomplete beta functions, no sums. Raises FedpeftError for counts that
    no audit has.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise FedpeftError(
            f"correct={correct}, guesses={guesses}, canaries={canaries}: must be 0 <= correct <= "
            f"guesses <= canaries."
        )
    _check_delta(delta)
    betainc, q = _special().betainc, 1 / (1 + math.exp(-epsilon))
    if correct == 0:
        return 1.0
    beta = float(betainc(correct, guesses - correct + 1, q))
    if delta == 0:
        return beta
    below = np.arange(correct - 1, 0, -1, dtype=np.float64)  # v - i for i = 1..v-1
    tails = np.append(betainc(below, guesses - below + 1, q), 1.0)
    worst = float(((tails - beta) / np.arange(1, correct + 1)).max())
    return min(1.0, beta + 2 * canaries * delta * worst)


def one_run(canaries: int, guesses: int, correct: int, delta: float, level: float = LEVEL) -> float:
    """The largest epsilon that ``correct`` right guesses refute, with confidence ``level``.

    0 where they refute none. Which canaries are guessed may depend on the training's output, how
    many must not. The p-value rises with epsilon wherever it is small, so a bisection finds the one
    crossing.
    """
    _check_level(level)
    return _last(
        lambda epsilon: one_run_p_value(canaries, guesses, correct, epsilon, delta) <= 1 - level
    )


@dataclass(frozen=True)
class Counts:
    """What a threshold, fixed in advance, said of canaries: in or out.

    hits: canaries that were in and said to be, of ``members``. alarms: canaries that were out and
    said to be in, of ``others``.
    """

    hits: int
    members: int
    alarms: int
    others: int


def two_sets(counts: Counts, delta: float, level: float = LEVEL) -> float:
    """Lower bound on epsilon from Clopper-Pearson intervals of both error rates, 0 at least.

    ``max(ln((TPR - delta) / FPR), ln((TNR - delta) / FNR))`` at the rates' pessimistic ends, each
    with confidence ``1 - (1 - level) / 2``, so both together with ``level``. For independent
    trainings, or scores that are as good as independent.
    """
    _check_level(level)
    _check_delta(delta)
    fpr, fnr = error_rates(*_arrays(counts), level)
    return float(epsilon_strength(delta)(fpr, fnr)[0])


def epsilon_strength(delta: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """``two_sets`` as a function of the upper ends of the error rates, elementwise."""

    def strength(fpr: np.ndarray, fnr: np.ndarray) -> np.ndarray:
        tiny = np.finfo(np.float64).tiny
        sure = np.maximum(1 - fnr - delta, tiny) / fpr
        safe = np.maximum(1 - fpr - delta, tiny) / fnr
        found: np.ndarray = np.maximum(np.log(np.maximum(sure, safe)), 0.0)
        return found

    return strength


def gdp(counts: Counts, level: float = LEVEL) -> float:
    """Lower bound on mu of Gaussian differential privacy, 0 at least.

    ``PHI^-1(1 - FPR) - PHI^-1(FNR)`` at the rates' pessimistic ends, as in ``two_sets`` (Nasr et
    al. 2023, arXiv 2302.07956). ``gdp_epsilon`` translates it. Only for mechanisms whose trade-off
    is a Gaussian's.
    """
    _check_level(level)
    fpr, fnr = error_rates(*_arrays(counts), level)
    return float(mu_strength(fpr, fnr)[0])


def mu_strength(fpr: np.ndarray, fnr: np.ndarray) -> np.ndarray:
    """``gdp`` as a function of the upper ends of the error rates, elementwise."""
    ndtri = _special().ndtri
    found: np.ndarray = np.maximum(ndtri(1 - fpr) - ndtri(fnr), 0.0)
    return found


def quantile(share: float) -> float:
    """The standard normal distribution's."""
    return float(_special().ndtri(share))


def error_rates(
    hits: np.ndarray, members: int, alarms: np.ndarray, others: int, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Upper ends of the false positive and the false negative rate, together with ``level``.

    hits, alarms: as in ``Counts``, for each of several thresholds, ``[T]``.
    """
    bad = (hits < 0) | (hits > members) | (alarms < 0) | (alarms > others)
    if members < 1 or others < 1 or bool(bad.any()):
        raise FedpeftError(
            f"hits={hits.tolist()} of members={members}, alarms={alarms.tolist()} of "
            f"others={others}: counts must be from 0 to the size of their set, and no set empty."
        )
    tail = (1 - level) / 2

    def upper(count: np.ndarray, size: int) -> np.ndarray:
        above = _special().betaincinv(count + 1, np.maximum(size - count, 1), 1 - tail)
        return np.where(count == size, 1.0, above)

    return upper(alarms, others), upper(members - hits, members)


def _arrays(counts: Counts) -> tuple[np.ndarray, int, np.ndarray, int]:
    return np.array([counts.hits]), counts.members, np.array([counts.alarms]), counts.others


def gdp_delta(mu: float, epsilon: float) -> float:
    """delta of a mu-GDP mechanism at ``epsilon`` (Dong, Roth, Su 2019, Corollary 2.13).

    ``PHI(mu/2 - eps/mu) - e^eps PHI(-mu/2 - eps/mu)``; the second term is taken in logarithms. T
    releases with noise multiplier z, no sampling: mu = sqrt(T) / z.
    """
    if mu <= 0:
        return 0.0
    special = _special()
    first = float(special.ndtr(mu / 2 - epsilon / mu))
    second = math.exp(epsilon + float(special.log_ndtr(-mu / 2 - epsilon / mu)))
    return max(0.0, first - second)


def gdp_epsilon(mu: float, delta: float) -> float:
    """The smallest epsilon >= 0 at which a mu-GDP mechanism has ``delta``; infinite for delta 0."""
    _check_delta(delta)
    if mu > 0 and delta == 0:
        return math.inf
    return _last(lambda epsilon: gdp_delta(mu, epsilon) > delta)


@dataclass(frozen=True)
class OneShot:
    """What canary clients say of a whole federated run. An estimate, not a bound.

    mu, epsilon: estimates. mu_low, epsilon_low: their one-sided lower ends.
    """

    mu: float
    mu_low: float
    epsilon: float
    epsilon_low: float


def one_shot(cosines: np.ndarray, size: int, delta: float, level: float = LEVEL) -> OneShot:
    """Epsilon of DP-FedAvg from k canary clients in one run (Andrew et al. 2023, arXiv 2302.03098).

    cosines: ``[k]``, of each canary's direction (see ``canaries.directions``) with the final
    adapter minus the initial one. size: numbers in an update, d. Of a canary that was not there the
    cosine is N(0, 1/d); so ``mu = sqrt(d) mean(cos)``, its lower end ``mu - z / sqrt(k)``. Honest
    clients that move together shorten the cosines, and the estimate then is too low.
    """
    _check_level(level)
    if len(cosines) < 2 or not bool(np.isfinite(cosines).all()):
        raise FedpeftError(
            f"cosines of {len(cosines)} canary clients: at least 2 finite numbers are needed."
        )
    mu = math.sqrt(size) * float(np.mean(cosines))
    low = mu - quantile(level) / math.sqrt(len(cosines))
    return OneShot(mu, low, gdp_epsilon(mu, delta), gdp_epsilon(low, delta))


def _last(holds: Callable[[float], bool]) -> float:
    """The largest epsilon up to which ``holds`` is true, to the last digits; 0 if nowhere."""
    if not holds(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while holds(high):
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _check_delta(delta: float) -> None:
    if not 0 <= delta < 1:
        raise FedpeftError(
            f"delta={delta}: must be a probability below 1, best far below 1 / clients."
        )


def _check_level(level: float) -> None:
    if not 0.5 <= level < 1:
        raise FedpeftError(f"level={level}: the confidence must be from 0.5 to below 1, e.g. 0.95.")
