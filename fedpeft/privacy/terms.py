"""The terms of a run's privacy: what is protected, by which mechanism, and what each round costs.

One object, made from the recipe before anything is trained, from which come the mechanism, what the
ledger is charged, and the statement; so that they cannot disagree.

Three statements about who takes part, no others: clients by independent secret draws (*poisson*),
nobody in more than so many rounds because the sampler and the ledger see to it (*cap*), and nothing
known, every round that a client took part in counts (*each*). What is random about a sample without
replacement earns nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedpeft import sampling
from fedpeft.config import Privacy, Recipe
from fedpeft.errors import FedpeftError
from fedpeft.privacy.calibrate import noise_multiplier
from fedpeft.privacy.client_level import Adaptive, Bands, ClientLevel
from fedpeft.privacy.events import Event, Gaussian, Repeated, SampledGaussian
from fedpeft.privacy.randomness import Randomness
from fedpeft.privacy.record_level import RecordLevel

EVERYONE = "(all clients)"
"""Whom the ledger charges where every client's guarantee is the same, whoever took part."""

BITS = 20.0
"""The noise on the count of clients below an adapting bound is a BITS-th of a round's clients."""


@dataclass(frozen=True)
class Terms:
    """See the module.

    unit: what is protected. sampled: the statement about who takes part. rounds: the most rounds
    that one client may take part in. mechanism: of unit ``record`` or ``client``. release: of unit
    ``client``, what a round, or with bands the whole run, releases about a client; None for
    records. delta: of the statement.
    """

    unit: Literal["record", "client"]
    sampled: Literal["poisson", "cap", "each"]
    rounds: int
    mechanism: RecordLevel | ClientLevel
    release: Event | None
    delta: float

    @property
    def everyone(self) -> bool:
        """Whether what a round costs does not depend on who takes part."""
        return self.sampled == "poisson" or self.whole_run

    @property
    def whole_run(self) -> bool:
        """Whether the whole run is one release."""
        return isinstance(self.mechanism, ClientLevel) and self.mechanism.bands is not None

    def event(self, examples: int) -> Event:
        """What a round (with bands: the run) releases about a client with so many examples."""
        if self.release is not None:
            return self.release
        assert isinstance(self.mechanism, RecordLevel), "clients have a release of their own"
        return self.mechanism.event(examples)

    def whole(self, examples: int) -> Event:
        """What the run may release in all about a client with so many examples, or a bound on it.

        It is what the noise was found for.
        """
        if self.release is None:
            assert isinstance(self.mechanism, RecordLevel), "clients have a release of their own"
            return self.mechanism.whole(examples)
        return self.release if self.whole_run else Repeated(self.release, self.rounds)


def check_delta(privacy: Privacy, sizes: np.ndarray) -> None:
    """Raises FedpeftError for a delta that protects none of clients of these sizes."""
    units = {"record": int(sizes.sum()), "client": len(sizes), "none": 0}[privacy.unit]
    if privacy.delta * units >= 1:
        raise FedpeftError(
            f"privacy.delta={privacy.delta} must be below one over the number of {privacy.unit}s "
            f"that are protected, {units}: such a delta allows one of them to be published. Take "
            f"{0.1 / units:.0e} or less."
        )


def terms_of(recipe: Recipe, sizes: np.ndarray, exchanges: int) -> Terms | None:
    """The terms of a recipe with clients of these numbers of examples; None without privacy.

    exchanges: of the strategy, each a release. Raises FedpeftError for a delta that protects
    nobody, and for parts that do not go together.
    """
    privacy = recipe.privacy
    if privacy.unit == "none":
        return None
    check_delta(privacy, sizes)
    rounds, sampled = _participation(recipe)
    randomness = randomness_of(recipe)
    if privacy.unit == "record":
        mechanism = RecordLevel(privacy, recipe.local, rounds, sizes, randomness)
        return Terms("record", sampled, rounds, mechanism, None, privacy.delta)
    level, release = _client_level(recipe, len(sizes), exchanges, randomness, (rounds, sampled))
    return Terms("client", sampled, rounds, level, release, privacy.delta)


def randomness_of(recipe: Recipe) -> Randomness:
    """The recipe's source of noise."""
    if recipe.privacy.randomness == "seeded":
        return Randomness.seeded(recipe.seed)
    return Randomness.secure()


def clipped_for_sums(recipe: Recipe, randomness: Randomness) -> ClientLevel:
    """What secure aggregation needs without client-level privacy: bounded updates, no noise."""
    bound = recipe.secure_aggregation.clip_norm
    return ClientLevel(bound, 0.0, 0.0, 1, "nobody", randomness)


def _participation(recipe: Recipe) -> tuple[int, Literal["poisson", "cap", "each"]]:
    """The most rounds of one client, and the statement about who takes part."""
    rounds, privacy = recipe.rounds, recipe.privacy
    most = privacy.max_rounds or rounds.count
    if rounds.sampling.kind == "cyclic":
        return min(most, -(-rounds.count // rounds.sampling.groups)), "cap"
    hidden = privacy.unit == "client" and privacy.noise != "client"
    if rounds.sampling.kind == "poisson" and hidden and not privacy.max_rounds:
        return rounds.count, "poisson"
    return min(most, rounds.count), "cap" if privacy.max_rounds else "each"


def _client_level(
    recipe: Recipe,
    clients: int,
    exchanges: int,
    randomness: Randomness,
    part: tuple[int, Literal["poisson", "cap", "each"]],
) -> tuple[ClientLevel, Event]:
    privacy, (rounds, sampled) = recipe.privacy, part
    expected = sampling.expected(recipe.rounds.sampling, clients)
    bands = _bands(recipe, exchanges)
    rate = recipe.rounds.sampling.rate if sampled == "poisson" else 1.0

    def release(sigma: float) -> Event:
        once = Gaussian(sigma) if rate == 1.0 else SampledGaussian(rate, sigma)
        return once if bands is not None or exchanges == 1 else Repeated(once, exchanges)

    def whole(sigma: float) -> Event:
        return release(sigma) if bands is not None else Repeated(release(sigma), rounds)

    sigma = privacy.noise_multiplier or noise_multiplier(
        privacy.epsilon, privacy.delta, whole, privacy.accountant
    )
    level = ClientLevel(
        clip_norm=privacy.clip_norm,
        noise_multiplier=sigma,
        expected=expected,
        least=max(1, math.ceil(recipe.rounds.quorum * math.floor(expected))),
        place=privacy.noise,
        randomness=randomness,
        adaptive=_adaptive(privacy, sigma, expected),
        bands=bands,
    )
    return level, release(sigma)


def _adaptive(privacy: Privacy, sigma: float, expected: float) -> Adaptive | None:
    if not privacy.adaptive:
        return None
    std = expected / BITS
    if not sigma < 2 * std:
        raise FedpeftError(
            f"privacy.adaptive with a noise multiplier of {sigma:.3g}: the noised count of clients "
            f"below the bound takes its share of the budget, which needs a multiplier below a "
            f"tenth of the expected {expected:g} clients of a round. Sample more clients, or set "
            f"privacy.adaptive=false."
        )
    return Adaptive(privacy.quantile, privacy.clip_rate, std)


def _bands(recipe: Recipe, exchanges: int) -> Bands | None:
    """Correlated noise, where the recipe asks for it and the sampler keeps clients apart."""
    privacy, rounds = recipe.privacy, recipe.rounds
    if privacy.bands == 0:
        return None
    if rounds.sampling.kind != "cyclic":
        raise FedpeftError(
            f"privacy.bands={privacy.bands} needs rounds.sampling.kind=cyclic, not "
            f"{rounds.sampling.kind!r}: correlated noise rests on nobody taking part twice within "
            f"so many rounds, which only that sampler sees to."
        )
    if exchanges > 1:
        raise FedpeftError(
            f"privacy.bands={privacy.bands} with a strategy of {exchanges} exchanges a round: set "
            f"privacy.bands=0, or use another strategy."
        )
    groups = rounds.sampling.groups
    return Bands(groups if privacy.bands < 0 else privacy.bands, rounds.count, groups)
