"""What a round costs a device, where no fleet is there to say: a deterministic model of both.

A stand-in for measured times. Speeds and bandwidths are log-normal around a typical device, drawn
by client under the run's seed, and stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.streams import numpy_stream

SPEED, BANDWIDTH, SPREAD = 3.3e11, 1.25e6, 0.6
"""FLOP/s (a Jetson TX2 at a quarter of its peak), bytes/s (10 Mbit/s), and sigma of both logs."""


@dataclass(frozen=True)
class Device:
    """A client's device: FLOP/s that it reaches, bytes/s of its link."""

    speed: float
    bandwidth: float

    def seconds(self, flops: float, size: float) -> float:
        """The time of so much work, and of so many bytes both ways."""
        return flops / self.speed + size / self.bandwidth


def device(client: str, seed: int) -> Device:
    """The device of a client."""
    speed, bandwidth = numpy_stream(seed, "device", client).lognormal(0.0, SPREAD, 2).tolist()
    return Device(SPEED * speed, BANDWIDTH * bandwidth)


def seconds(clients: Sequence[str], seed: int, flops: Tensor, sizes: Tensor) -> Tensor:
    """The times of clients, float64 ``[K]``, for so much work and so many bytes each."""
    costs = zip(clients, flops.tolist(), sizes.tolist(), strict=True)
    own = [device(client, seed).seconds(work, size) for client, work, size in costs]
    return torch.tensor(own, dtype=torch.float64)
