"""The attack on one privacy mechanism, in isolation: many canaries, several releases, no training.

What is attacked takes the rows of the clients (or examples) that are there, ``[n, d]``, and gives
out their noisy sum, ``[d]``, up to a factor. Every canary that is in gives a row in each release: a
fresh random direction, longer than the clip norm, so that a mechanism which does not clip each row
is found out too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fedpeft.audit.bounds import LEVEL
from fedpeft.audit.canaries import coins
from fedpeft.audit.evidence import Evidence, evidence
from fedpeft.errors import FedpeftError

Release = Callable[[np.ndarray], np.ndarray]
"""``rows [n, d] -> [d]``, called once for each release, in order; it may keep a state."""


@dataclass(frozen=True)
class Game:
    """How large an attack is.

    size: numbers in a row, d, far more than releases; the more, the less canaries are in each
    other's way. clip: the mechanism's clip norm. canaries: m. gain: rows are so many clip norms
    long.
    """

    size: int
    clip: float
    releases: int = 1
    canaries: int = 1000
    gain: float = 10.0

    def __post_init__(self) -> None:
        if not (self.clip > 0 and self.gain >= 1 and 1 <= self.releases < self.size):
            raise FedpeftError(
                f"clip={self.clip}, gain={self.gain}, releases={self.releases}, size={self.size}: "
                f"must be clip > 0, gain >= 1 and 1 <= releases < size."
            )


def attack(
    release: Release, game: Game, delta: float, stream: np.random.Generator, level: float = LEVEL
) -> Evidence:
    """What ``release`` gives away of who was in; add or remove one row.

    ``Evidence.one_run`` is a lower bound on epsilon at ``delta`` of all releases together, for
    whoever is in all of them. With noise multiplier z and no sampling, epsilon is
    ``gdp_epsilon(sqrt(releases) / z, delta)``.
    """
    included = coins(game.canaries, stream)
    return evidence(scores(release, game, included, stream), included, delta, level)


def scores(
    release: Release, game: Game, included: np.ndarray, stream: np.random.Generator
) -> np.ndarray:
    """How much each canary is seen in the releases, ``[m]``: a whitened matched filter.

    With u_it canary i's direction in release t and R the releases ``[T, d]``, ``score_i = sum_t
    <u_it, (G^-1 R)_t>`` for ``G = R R^T / d``. G says how the releases' noise hangs together: where
    it is independent, releases just add up; where it is the same, or cancels, the combination that
    is free of it counts. Raises FedpeftError for a release of another shape, or not finite.
    """
    seeds = stream.integers(0, 2**63, game.releases)
    seen: list[np.ndarray] = []
    for rows in _rows(game, seeds):
        found = np.asarray(release(game.gain * game.clip * rows[included]), dtype=np.float64)
        if found.shape != (game.size,) or not bool(np.isfinite(found).all()):
            raise FedpeftError(
                f"release {len(seen) + 1} has shape {found.shape} and {np.isfinite(found).sum()} "
                f"finite numbers: must be {game.size} finite numbers."
            )
        seen.append(found)
    releases = np.stack(seen)
    white = np.linalg.pinv(releases @ releases.T / game.size, hermitian=True) @ releases
    total = np.zeros(len(included))
    for rows, own in zip(_rows(game, seeds), white, strict=True):
        total += rows @ own
    return total


def _rows(game: Game, seeds: np.ndarray) -> Iterator[np.ndarray]:
    """All canaries' directions in each release, ``[m, d]`` of length 1; the same for equal seeds.

    Made twice rather than kept: all of them may not fit.
    """
    for seed in seeds.tolist():
        rows = np.random.Generator(np.random.PCG64(seed)).standard_normal(
            (game.canaries, game.size), dtype=np.float32
        )
        yield rows / np.linalg.norm(rows, axis=1, keepdims=True)
