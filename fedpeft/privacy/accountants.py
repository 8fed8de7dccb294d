"""Accountants: what an event costs, as the smallest epsilon that can be shown at a given delta.

Every figure is an upper bound, for add-or-remove of one unit:

- ``prv`` (default): Opacus's numerical composition of privacy loss (Gopi et al.,
  arXiv 2106.02848), its upper end. Tight to ``max(0.01, 0.1 %)``.
- ``pld``: the same by dp-accounting's pessimistic estimate, from the extra ``fedpeft[pld]``;
  slower, independent code, for a second opinion.
- ``rdp``: Rényi (Mironov et al., arXiv 1908.10530, and the conversion of Balle et al.,
  arXiv 1905.09982, theorem 21). Loose by 10-20 %, fast, never fails.

Where every release is a plain Gaussian (rate 1), ``prv`` and ``pld`` are the exact closed form of
Balle and Wang (arXiv 1805.06530, theorem 8): n releases of noise multiplier s are one Gaussian of
mu = sqrt(n) / s. The central limit theorem ("GDP") is not offered: it may come out below the truth.

What the libraries cannot compute is never guessed low. ``prv`` and ``pld`` give RDP's bound where
it is below 0.01 already, where their grid would be too large (epsilon above 500, millions of
points), where delta is below 1e-10 (rounding in their Fourier transforms would show) and where they
fail. RDP gives the closed form without sampling, which is never below, where it overflows; that is
infinite where noise is nil.

Opacus and dp-accounting are imported at the first call that needs them: that takes seconds.
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch

from fedpeft.errors import FedpeftError, suggest
from fedpeft.privacy.events import Event, History, history

log = logging.getLogger(__name__)

Accountant: TypeAlias = Literal["prv", "pld", "rdp"]

_FAILURES = (ArithmeticError, ValueError, RuntimeError, IndexError, MemoryError)
_LARGEST_EPSILON = 500.0  # exp(epsilon) overflows at 709
_LARGEST_GRID = 4_000_000
_SMALLEST_DELTA = 1e-10
_ERROR = 0.01
_RELATIVE_ERROR = 1e-3

_WHOLE_ORDERS = (
    *range(2, 11), *range(12, 64),  # Opacus's own
    *(64, 72, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1000),
)  # fmt: skip
_LOW_ORDERS = tuple(order for x in range(1, 100) if not (order := 1 + x / 10.0).is_integer())


def epsilon(event: Event, delta: float, accountant: Accountant = "prv") -> float:
    """An upper bound on epsilon of ``event`` at ``delta``; see the module's text.

    0 for no release, infinity where nothing finite can be shown. The result is cached by what the
    event flattens to. Raises FedpeftError for a delta outside (0, 1), an unknown accountant, and
    ``pld`` without dp-accounting.
    """
    check_delta(delta)
    check_accountant(accountant)
    return epsilon_of(history(event), delta, accountant)


@lru_cache(maxsize=65_536)
def epsilon_of(past: History, delta: float, accountant: Accountant) -> float:
    """``epsilon`` of a history; its arguments are taken as checked."""
    if not past:
        return 0.0
    if accountant == "rdp":
        return _rdp(past, delta)
    if all(rate == 1 for (rate, _), _ in past):
        return gaussian_epsilon(_mu(past), delta)
    compose = _prv if accountant == "prv" else _pld_accountant()
    bound = _rdp(past, delta)
    if not _ERROR < bound <= _LARGEST_EPSILON or delta < _SMALLEST_DELTA:
        return bound
    try:
        with _quiet():
            found = compose(past, delta, bound)
    except _FAILURES as error:
        log.info("%s cannot price %s (%s); RDP's bound is taken", accountant, past, error)
        return bound
    return max(0.0, min(found, bound)) if math.isfinite(found) else bound


def gaussian_delta(epsilon: float, mu: float) -> float:
    """The exact delta of a Gaussian mechanism of sensitivity over noise ``mu`` at ``epsilon``.

    Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu), Balle and Wang
    (arXiv 1805.06530), theorem 8, computed from logarithms so that no epsilon overflows.
    """
    above = _log_ndtr(mu / 2 - epsilon / mu)
    ratio = epsilon + _log_ndtr(-mu / 2 - epsilon / mu) - above
    return -math.exp(above) * math.expm1(min(0.0, ratio))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The exact epsilon of a Gaussian mechanism of sensitivity over noise ``mu`` at ``delta``."""
    highest = mu * mu / 2 + mu * math.sqrt(-2 * math.log(delta))
    if mu == 0 or not math.isfinite(highest):
        return highest
    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    return _boundary(lambda e: gaussian_delta(e, mu) <= delta, 0.0, highest)


def gaussian_multiplier(epsilon: float, delta: float) -> float:
    """The least noise multiplier with which one Gaussian release is (epsilon, delta)-private.

    Exact ("analytic Gaussian mechanism", Balle and Wang, arXiv 1805.06530). For n releases to the
    same unit multiply it by sqrt(n). Raises FedpeftError unless epsilon is positive and finite and
    delta is in (0, 1).
    """
    check_epsilon(epsilon)
    check_delta(delta)
    high = 1.0
    while gaussian_delta(epsilon, 1 / high) > delta:
        high *= 2
    low = high / 2
    while gaussian_delta(epsilon, 1 / low) <= delta:
        low, high = low / 2, low
    return _boundary(lambda noise: gaussian_delta(epsilon, 1 / noise) <= delta, low, high)


def check_epsilon(epsilon: float) -> None:
    """Raises FedpeftError unless ``epsilon`` is positive and finite."""
    if not 0 < epsilon < math.inf:
        raise FedpeftError(f"epsilon={epsilon} must be positive and finite, e.g. 8 or 1.")


def check_delta(delta: float) -> None:
    """Raises FedpeftError unless ``delta`` is in (0, 1)."""
    if not 0 < delta < 1:
        raise FedpeftError(
            f"delta={delta} must lie between 0 and 1, well below one over the number of units "
            "(examples or clients) that are protected, e.g. 1e-5."
        )


def check_accountant(accountant: str) -> None:
    """Raises FedpeftError unless ``accountant`` is the name of one."""
    if accountant not in get_args(Accountant):
        raise FedpeftError(
            f"accountant={accountant!r} is unknown. {suggest(accountant, get_args(Accountant))}"
        )


def _log_ndtr(x: float) -> float:
    """The logarithm of the standard normal distribution function."""
    return float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))


def _boundary(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The least x in (low, high] to 1e-12 with ``holds(x)``, which is so at ``high`` and above."""
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high or high - low <= 1e-12 * high:
            break
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _mu(past: History) -> float:
    """Sensitivity over noise of all releases as one Gaussian, as if every rate were 1."""
    return math.hypot(*(math.sqrt(times) / noise for (_, noise), times in past))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings, each of a case that is guarded here."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def _rdp(past: History, delta: float) -> float:
    """RDP's epsilon, the low orders only where the best one may lie among them."""
    try:
        with _quiet():
            found, order = _rdp_over(_WHOLE_ORDERS, past, delta)
            if not order >= 12:
                found = min(found, _rdp_over(_LOW_ORDERS, past, delta)[0])
    except _FAILURES:
        return gaussian_epsilon(_mu(past), delta)
    return max(0.0, found) if not math.isnan(found) else math.inf


def _rdp_over(orders: tuple[float, ...], past: History, delta: float) -> tuple[float, float]:
    from opacus.accountants.analysis import rdp  # type: ignore[import-untyped]

    curve = sum(_curve(rate, noise, orders) * times for (rate, noise), times in past)
    found, order = rdp.get_privacy_spent(orders=orders, rdp=curve, delta=delta)
    return float(found), float(order)


@lru_cache(maxsize=1024)
def _curve(rate: float, noise: float, orders: tuple[float, ...]) -> np.ndarray:
    """RDP of one release at ``orders``."""
    from opacus.accountants.analysis import rdp

    curve = rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=orders)
    return np.asarray(curve, dtype=np.float64)


def _prv(past: History, delta: float, bound: float) -> float:
    """The upper end of Opacus's PRV accountant. ``bound``: RDP's epsilon, which sets the grid."""
    from opacus.accountants import PRVAccountant  # type: ignore[import-untyped]

    error = max(_ERROR, _RELATIVE_ERROR * bound)
    times = sum(n for _, n in past)
    mesh = error / math.sqrt(times * math.log(12_000 / delta) / 2)
    tail = _rdp(past, delta / 4000)  # the half width that Opacus will choose, less 3
    if 2 * (tail + 3) / mesh > _LARGEST_GRID:
        return math.inf
    accountant = PRVAccountant()
    accountant.history = [(noise, rate, n) for (rate, noise), n in past]
    return float(accountant.get_epsilon(delta, eps_error=error))


def _pld_accountant() -> Callable[[History, float, float], float]:
    dp = _dp_accounting()
    pld = importlib.import_module("dp_accounting.pld")

    def compose(past: History, delta: float, bound: float) -> float:
        accountant = pld.PLDAccountant()
        for (rate, noise), times in past:
            event = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise))
            accountant.compose(event, times)
        return float(accountant.get_epsilon(delta))

    return compose


def _dp_accounting() -> ModuleType:
    try:
        return importlib.import_module("dp_accounting")
    except ImportError as error:
        raise FedpeftError(
            "accountant='pld' needs dp-accounting, which is not installed. Install "
            "`fedpeft[pld]`, or use the default, accountant='prv'."
        ) from error
