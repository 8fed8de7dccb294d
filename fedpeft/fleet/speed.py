"""How long a client computes: from arithmetic and a device's peak, or from measured times.

Three ways, one per fleet: by FLOPs (``Peaks``), by seconds per example as FedScale has it
(``PerExample``), by seconds per batch as FLASH measured it (``PerBatch``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedpeft.fleet.draws import Draws, shuffled
from fedpeft.fleet.profiles import PROFILES, Profile


@dataclass(frozen=True)
class Work:
    """What K clients compute in a round: float64 ``[K]`` each.

    flops: floating-point operations. moved: bytes between the device's memory and its cores.
    examples: seen, repetitions counted. batches: forward passes.
    """

    flops: np.ndarray
    moved: np.ndarray
    examples: np.ndarray
    batches: np.ndarray


class Speed(Protocol):
    """The devices of N clients."""

    def seconds(self, clients: np.ndarray, round: int, work: Work) -> np.ndarray:
        """Of computation, float64 ``[K]``, of the clients numbered ``clients``."""

    def memory(self, clients: np.ndarray) -> np.ndarray:
        """Bytes that they have, float64 ``[K]``; infinite where it is not known."""

    def watts(self, clients: np.ndarray, round: int) -> np.ndarray:
        """While they compute, float64 ``[K]``; NaN where it is not known."""


BANDWIDTH_SHARE = 0.7
"""Of a memory's nominal bandwidth, what is reached; an assumption."""


@dataclass(frozen=True)
class Peaks(Speed):
    """``flops / (utilization * peak(mode))``, seconds.

    kind: int64 ``[N]``, of ``profiles``. factor: float64 ``[N]``, by which a client takes longer.
    Modes are drawn anew every ``redraw`` rounds (0: once). roofline: at least the time that memory
    needs to move what is moved.
    """

    profiles: tuple[Profile, ...]
    kind: np.ndarray
    factor: np.ndarray
    draws: Draws
    utilization: float = 0.25
    redraw: int = 0
    roofline: bool = False

    def seconds(self, clients: np.ndarray, round: int, work: Work) -> np.ndarray:
        peak = self._of_mode(clients, round, [profile.modes for profile in self.profiles])
        found = work.flops / (self.utilization * peak)
        if self.roofline:
            width = np.array([profile.bandwidth for profile in self.profiles])[self.kind[clients]]
            found = np.maximum(found, work.moved / (BANDWIDTH_SHARE * width))
        slower: np.ndarray = found * self.factor[clients]
        return slower

    def memory(self, clients: np.ndarray) -> np.ndarray:
        have = np.array([profile.memory for profile in self.profiles])
        found: np.ndarray = have[self.kind[clients]]
        return found

    def watts(self, clients: np.ndarray, round: int) -> np.ndarray:
        none = [profile.power or (np.nan,) * len(profile.modes) for profile in self.profiles]
        return self._of_mode(clients, round, none)

    def _of_mode(
        self, clients: np.ndarray, round: int, values: list[tuple[float, ...]]
    ) -> np.ndarray:
        """The value of the mode that each client is in, by profile and mode."""
        epoch = 1 + (round // self.redraw if self.redraw else 0)
        share = self.draws.uniforms(clients, epoch)[:, 0]
        table = np.full((len(values), max(map(len, values))), np.nan)
        for row, own in zip(table, values, strict=True):
            row[: len(own)] = own
        counts = np.array([len(own) for own in values])[self.kind[clients]]
        found: np.ndarray = table[self.kind[clients], (share * counts).astype(np.int64)]
        return found


@dataclass(frozen=True)
class PerExample(Speed):
    """``3 * examples * seconds`` (FedScale: backward counts as two forwards). float64 ``[N]``."""

    each: np.ndarray

    def seconds(self, clients: np.ndarray, round: int, work: Work) -> np.ndarray:
        found: np.ndarray = 3.0 * work.examples * self.each[clients]
        return found

    def memory(self, clients: np.ndarray) -> np.ndarray:
        return np.full(len(clients), np.inf)

    def watts(self, clients: np.ndarray, round: int) -> np.ndarray:
        return np.full(len(clients), np.nan)


@dataclass(frozen=True)
class PerBatch(Speed):
    """``batches * N(mean, std)`` seconds, the normal drawn per round. mean, std: ``[N]``."""

    mean: np.ndarray
    std: np.ndarray
    draws: Draws

    def seconds(self, clients: np.ndarray, round: int, work: Work) -> np.ndarray:
        drawn = self.mean[clients] + self.std[clients] * self.draws.normals(clients, round)[:, 0]
        found: np.ndarray = work.batches * np.maximum(drawn, 0.05 * self.mean[clients])
        return found

    def memory(self, clients: np.ndarray) -> np.ndarray:
        return np.full(len(clients), np.inf)

    def watts(self, clients: np.ndarray, round: int) -> np.ndarray:
        return np.full(len(clients), np.nan)


FLASH = {
    "reddit": ((2596.0, 336.0), (916.0, 21.0), (528.0, 49.0)),
    "celeba": ((5392.0, 983.0), (1355.0, 55.0), (561.0, 20.0)),
    "femnist": ((1642.0, 100.0), (588.0, 24.0), (179.0, 2.0)),
}
"""Milliseconds of a batch, mean and deviation, on a low, mid and high phone, by FLASH's models."""

FLASH_CLASSES = (0.532, 0.464, 0.004)
"""Shares of low, mid and high phones in FLASH's traces."""


def mixed(shares: Mapping[str, int], count: int, draws: Draws) -> tuple[list[Profile], np.ndarray]:
    """Profiles, and which of them each of ``count`` clients has, int64 ``[count]``.

    In the proportions of ``shares``, rounded by largest remainder; who has which is drawn.
    """
    parts = np.array(list(shares.values())) * count / sum(shares.values())
    sizes = np.floor(parts).astype(np.int64)
    order = np.argsort(-(parts - sizes), kind="stable")
    sizes[order[: count - sizes.sum()]] += 1
    kind = np.empty(count, np.int64)
    kind[shuffled(draws, count)] = np.repeat(np.arange(len(sizes)), sizes)
    return [PROFILES[name] for name in shares], kind


def slowness(sigma: float, count: int, draws: Draws) -> np.ndarray:
    """LogNormal(0, sigma) of every client, float64 ``[count]``."""
    found: np.ndarray = np.exp(sigma * draws.normals(np.arange(count), 0)[:, 0])
    return found
