"""What privacy will cost a run, in numbers, before it starts."""

from __future__ import annotations

import math

import numpy as np

from fedpeft.config import Recipe
from fedpeft.privacy.accountants import epsilon
from fedpeft.privacy.events import Repeated
from fedpeft.privacy.record_level import RecordLevel
from fedpeft.privacy.terms import Terms

FULL = 0.5
"""From this sampling rate on, taking part in a batch by chance hides next to nothing."""


def outlook(terms: Terms, recipe: Recipe, sizes: np.ndarray, numbers: int) -> dict[str, str]:
    """Name -> value, as they are to be shown.

    sizes: training examples per client. numbers: that one release holds. The noise-to-clip ratio is
    the norm of the noise over the largest norm that one unit may add: far above one, a single step
    or round moves nowhere, and only many of them, or larger cohorts and batches, help.
    """
    privacy = recipe.privacy
    budget = f"epsilon {privacy.epsilon:g}" if privacy.epsilon else "noise as given, no budget"
    found = {"privacy": f"{terms.unit} level, {budget}, delta {terms.delta:g}"}
    mechanism = terms.mechanism
    if not isinstance(mechanism, RecordLevel):
        ratio = mechanism.noise_multiplier * math.sqrt(numbers) / mechanism.expected
        found["noise multiplier"] = f"{mechanism.noise_multiplier:.3g}"
        found["noise-to-clip ratio"] = f"{ratio:.3g} in a round"
        return found
    least, most = int(sizes.min()), int(sizes.max())
    noise = [mechanism.multiplier(n) for n in (most, least)]
    rates = [mechanism.rate(n) for n in (most, least)]
    batch = rates[1] * least
    found["noise multiplier"] = _range(*noise)
    found["sampling rate"] = _range(*rates) + (
        "; a client whose batch is most of its data gains little from sampling"
        if rates[1] > FULL
        else ""
    )
    found["noise-to-clip ratio"] = f"{noise[1] * math.sqrt(numbers) / batch:.3g} in a step"
    return found


def _range(low: float, high: float) -> str:
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def promised(terms: Terms, recipe: Recipe, sizes: np.ndarray) -> float:
    """The largest epsilon of any client that takes part as often as it may.

    sizes: training examples per client; of records, each size has its own.
    """
    each = np.unique(sizes) if terms.release is None else sizes[:1]
    events = [terms.event(int(n)) for n in each]
    whole = events if terms.whole_run else [Repeated(event, terms.rounds) for event in events]
    return max(epsilon(event, terms.delta, recipe.privacy.accountant) for event in whole)
