"""How long a transfer takes: latency + 8 bytes / bandwidth, the bandwidth drawn per transfer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpeft.fleet.draws import Draws, shuffled

MBIT = 1e6
SLOWEST = 1e4
"""No link is slower, bits per second."""


@dataclass(frozen=True)
class Link:
    """A kind of link: median bits per second down and up, and the round trip in seconds."""

    down: float
    up: float
    trip: float


LINKS = {
    "wifi": Link(35 * MBIT, 26 * MBIT, 0.020),
    "lte": Link(20 * MBIT, 8 * MBIT, 0.050),
    "5g": Link(120 * MBIT, 20 * MBIT, 0.025),
    "3g": Link(2 * MBIT, 0.7 * MBIT, 0.120),
    "lan": Link(1000 * MBIT, 1000 * MBIT, 0.001),
    "sat": Link(50 * MBIT, 5 * MBIT, 0.600),
}
"""Presets of our own; the medians of ``wifi`` are those of FLASH's 19 traced users."""

JITTER = 0.4
"""Deviation of the logarithm of a bandwidth from transfer to transfer, in the presets."""

GROUPS = (24 * MBIT, 12 * MBIT, 6 * MBIT, 2 * MBIT)
"""Medians of jetson80's four distances from the access point; an assumption."""

GROUP_JITTER, GROUP_RANGE = 0.3, (1 * MBIT, 30 * MBIT)

BAD, TO_BAD, TO_GOOD = 0.2, 0.1, 0.5
"""Gilbert's two states: share of the bandwidth in the bad one, probabilities of a change."""


@dataclass(frozen=True)
class Network:
    """The links of N clients.

    down, up: median bits per second, float64 ``[N]``. latency: seconds of a transfer, ``[N]``.
    jitter: of the logarithm. bounds: what a drawn bandwidth is clipped to.
    """

    down: np.ndarray
    up: np.ndarray
    latency: np.ndarray
    draws: Draws
    jitter: float = JITTER
    bounds: tuple[float, float] = (SLOWEST, np.inf)

    def seconds(
        self, clients: np.ndarray, round: int, down: np.ndarray, up: np.ndarray, bad: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of the transfers of ``down`` and ``up`` bytes (``[K]`` each), float64 ``[K]`` each.

        bad: bool ``[K]``, whose link is in the bad state.
        """
        noise = np.exp(self.jitter * self.draws.normals(clients, round, 2))
        share = np.where(bad, BAD, 1.0)
        rates = [
            np.maximum(np.clip(median[clients] * noise[:, k], *self.bounds) * share, SLOWEST)
            for k, median in enumerate((self.down, self.up))
        ]
        late = self.latency[clients]
        return late + 8.0 * down / rates[0], late + 8.0 * up / rates[1]


def uniform(link: Link, count: int, draws: Draws) -> Network:
    """Every client on a link of one kind."""
    ones = np.ones(count)
    return Network(link.down * ones, link.up * ones, 0.5 * link.trip * ones, draws)


def grouped(count: int, draws: Draws) -> Network:
    """Clients in four groups by distance, as even as they go; who is where is drawn."""
    median = np.empty(count)
    median[shuffled(draws, count)] = np.array(GROUPS)[np.arange(count) % len(GROUPS)]
    late = np.full(count, 0.5 * LINKS["wifi"].trip)
    return Network(median, median, late, draws, GROUP_JITTER, GROUP_RANGE)


def gilbert(bad: np.ndarray, round: int, draws: Draws) -> np.ndarray:
    """The states of all links a round later: bool ``[N]``."""
    u = draws.uniforms(np.arange(len(bad)), round)[:, 0]
    return np.where(bad, u >= TO_GOOD, u < TO_BAD)
