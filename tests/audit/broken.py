"""The Gaussian mechanism, and mechanisms that claim to be it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Rows = np.ndarray


def clipped(rows: Rows, clip: float) -> Rows:
    """Each row scaled to a norm of at most ``clip``."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows * np.minimum(1.0, clip / np.maximum(norms, 1e-30)))


@dataclass
class Mechanism:
    """What all of them have: clip norm C, noise multiplier z, a generator (of tests only)."""

    clip: float
    z: float
    seed: int
    kept: np.ndarray | None = None
    stream: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.stream = np.random.default_rng(self.seed)

    def noise(self, shape: tuple[int, ...], factor: float = 1.0) -> np.ndarray:
        return self.stream.standard_normal(shape) * (factor * self.z * self.clip)


def sound(m: Mechanism, rows: Rows) -> Rows:
    return np.asarray(clipped(rows, m.clip).sum(0) + m.noise(rows.shape[1:]))


def sound_mean(m: Mechanism, rows: Rows) -> Rows:
    """Divided by a fixed number: post-processing."""
    return sound(m, rows) / 250


def no_noise(m: Mechanism, rows: Rows) -> Rows:
    return np.asarray(clipped(rows, m.clip).sum(0))


def mean_clipped(m: Mechanism, rows: Rows) -> Rows:
    """The batch's mean is clipped instead of each row."""
    n = len(rows)
    return np.asarray((n * clipped(rows.mean(0), m.clip) + m.noise(rows.shape[1:])) / n)


def noise_before_clip(m: Mechanism, rows: Rows) -> Rows:
    """Every row has its share of the noise before it is clipped, so the clip shrinks the noise."""
    noisy = rows + m.noise(rows.shape, len(rows) ** -0.5)
    return np.asarray(clipped(noisy, m.clip).sum(0))


def divided_twice(m: Mechanism, rows: Rows) -> Rows:
    """The noise is divided by n for the mean, and then by n again with the sum."""
    n = len(rows)
    return np.asarray((clipped(rows, m.clip).sum(0) + m.noise(rows.shape[1:]) / n) / n)


def reused_noise(m: Mechanism, rows: Rows) -> Rows:
    """All releases have the same noise, as with a generator that is seeded in each round."""
    if m.kept is None:
        m.kept = m.noise(rows.shape[1:])
    return np.asarray(clipped(rows, m.clip).sum(0) + m.kept)


def alternating_noise(m: Mechanism, rows: Rows) -> Rows:
    """Every second release takes back the noise of the one before it."""
    if m.kept is None:
        m.kept = m.noise(rows.shape[1:])
        return np.asarray(clipped(rows, m.clip).sum(0) + m.kept)
    found, m.kept = clipped(rows, m.clip).sum(0) - m.kept, None
    return np.asarray(found)


BROKEN: list[Callable[[Mechanism, Rows], Rows]] = [
    no_noise,
    mean_clipped,
    noise_before_clip,
    divided_twice,
    reused_noise,
    alternating_noise,
]
