"""Differential privacy whose unit is one example: DP-SGD inside each client.

A step of client k with n_k examples (Abadi et al., arXiv 1607.00133, Algorithm 1): every example
takes part by itself with probability q_k = min(1, B / n_k), B = batch_size * accumulate; the
examples' gradients over all trainable tensors are clipped to C together; then::

    g = (sum of the clipped gradients + N(0, (z_k C)^2)) / (q_k n_k)

with noise also where the batch is empty, and the expected number of examples below, not the one
that came. What a client does with g (optimizer, proximal terms), and what the server does with the
client's adapter, is post-processing. Clients' data are disjoint: the guarantee of each is its own,
from q_k, z_k and the steps that it took part in.

Clients that walk along public directions (``Cohort.walk``) release one number a step, the same sum
of the examples' slopes, each clipped to [-C, C] (DP-ZO: Zhang et al., arXiv 2310.09639; Tang et
al., arXiv 2401.04343). The directions are public, and the event of a step is the same.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from fedpeft.config import Local, Privacy
from fedpeft.message import Messages
from fedpeft.postprocess import Kept, Postprocessor
from fedpeft.privacy.accountants import epsilon
from fedpeft.privacy.calibrate import noise_multiplier
from fedpeft.privacy.events import Event, Repeated, SampledGaussian
from fedpeft.privacy.randomness import Randomness
from fedpeft.steps import steps_of

EXACT = 8
"""Up to so many different sizes of clients, each gets the noise multiplier of its own size."""

NEAR = 5e-3
"""How near to the least that suffices a noise multiplier is found."""

GRID = 2.0**0.25
"""Beyond that, sizes within this factor share the one that suffices for all of them."""


@dataclass(frozen=True)
class NoisySteps:
    """How the clients of a cohort step.

    multipliers, expected: z_k and q_k n_k of each client, float64 ``[K]``.
    """

    clip_norm: float
    multipliers: Tensor
    expected: Tensor
    randomness: Randomness

    def release(self, total: Tensor, clients: np.ndarray) -> Tensor:
        """Noised means ``[C, P]`` from sums of clipped gradients; rows of nobody (-1) stay.

        clients: number in the cohort of who trains in each row, int64 ``[C]``.
        """
        released = total.clone()
        for at in np.flatnonzero(clients >= 0).tolist():
            k = int(clients[at])
            std = float(self.multipliers[k]) * self.clip_norm
            noise = std * self.randomness.normal(total.shape[1])
            released[at] += noise.to(total.device, total.dtype)
            released[at] /= float(self.expected[k])
        return released


class RecordLevel(Postprocessor):
    """The mechanism of a run: what a client of a given size does, and what that releases.

    sizes: the numbers of training examples that occur, by which noise is calibrated. rounds: most
    rounds of one client. As a postprocessor it keeps a client's training loss from leaving, which
    no noise covers.
    """

    def __init__(
        self, privacy: Privacy, local: Local, rounds: int, sizes: np.ndarray, randomness: Randomness
    ) -> None:
        self._privacy = privacy
        self._local = local
        self.randomness = randomness
        self._rounds = rounds
        self._bounds = _grid(np.unique(sizes))
        self._found: dict[int, float] = {}

    def rate(self, examples: int) -> float:
        """q_k."""
        return min(1.0, self._local.batch_size * self._local.accumulate / examples)

    def multiplier(self, examples: int) -> float:
        """z_k: as given, or the least that keeps the whole run within the budget."""
        if self._privacy.noise_multiplier > 0:
            return self._privacy.noise_multiplier
        at = self._bin(examples)
        if at not in self._found:
            self._found[at] = self._calibrate(at)
        return self._found[at]

    def whole(self, examples: int) -> Event:
        """What the run may release in all about a client, or a bound on it: that of its bin."""
        return self._whole(self._bin(examples), self.multiplier(examples))

    def event(self, examples: int) -> Event:
        """What one round of a client releases."""
        once = SampledGaussian(self.rate(examples), self.multiplier(examples))
        return Repeated(once, steps_of(examples, self._local))

    def plan(self, train: np.ndarray) -> np.ndarray:
        """Which examples a client uses at each step: int64 ``[steps, B]``, -1 where absent.

        Drawn from the secret randomness; B is the largest batch that came.
        """
        steps, rate = steps_of(len(train), self._local), self.rate(len(train))
        batches = [train[self.randomness.uniform(len(train)) < rate] for _ in range(steps)]
        found = np.full((steps, max(1, *map(len, batches))), -1, dtype=np.int64)
        for step, batch in enumerate(batches):
            found[step, : len(batch)] = batch
        return found

    def steps(self, sizes: list[int]) -> NoisySteps:
        """How clients of these sizes step."""
        return NoisySteps(
            self._privacy.clip_norm,
            torch.tensor([self.multiplier(n) for n in sizes], dtype=torch.float64),
            torch.tensor([self.rate(n) * n for n in sizes], dtype=torch.float64),
            self.randomness,
        )

    def leave(self, sent: Messages, reply: Messages, kept: Kept) -> Messages:
        scalars = {n: value for n, value in reply.scalars.items() if n != "loss"}
        return Messages(reply.clients, reply.trees, scalars, reply.blobs)

    def _bin(self, examples: int) -> int:
        return max(0, bisect_right(self._bounds, examples) - 1)

    def _whole(self, at: int, sigma: float) -> Event:
        """A bound for all sizes of a bin: by the highest rate and the most steps."""
        low = self._bounds[at]
        exact = len(self._bounds) <= EXACT or at + 1 == len(self._bounds)
        high = low if exact else self._bounds[at + 1] - 1
        steps = max(steps_of(low, self._local), steps_of(high, self._local)) * self._rounds
        return Repeated(SampledGaussian(self.rate(low), sigma), steps)

    def _calibrate(self, at: int) -> float:
        """The multiplier for all sizes of a bin, within 1 % above the least.

        RDP's is cheap, and above what the accountant asks for by a share that differs little from
        bin to bin: that of the first bin is tried before a search. Always of the first, so that
        the processes of a run, which ask for other clients in another order, find the same noise.
        """
        privacy, whole = self._privacy, partial(self._whole, at)
        if at > 0 and self._share < 1:
            guess = self._rough(at) * self._share * (1 + NEAR)
            if epsilon(whole(guess), privacy.delta, privacy.accountant) <= privacy.epsilon:
                return guess
        return noise_multiplier(privacy.epsilon, privacy.delta, whole, privacy.accountant, NEAR)

    @cached_property
    def _share(self) -> float:
        """What the accountant asks for in the first bin, over what RDP asks for."""
        return self.multiplier(self._bounds[0]) / self._rough(0)

    def _rough(self, at: int) -> float:
        privacy, whole = self._privacy, partial(self._whole, at)
        return noise_multiplier(privacy.epsilon, privacy.delta, whole, "rdp", NEAR)


def _grid(sizes: np.ndarray) -> list[int]:
    """Smallest sizes of the bins, ascending; the last bin holds the largest size alone."""
    if len(sizes) <= EXACT:
        return [int(n) for n in sizes]
    found = [int(sizes[0])]
    for size in sizes.tolist():
        if size >= found[-1] * GRID:
            found.append(int(size))
    if found[-1] != int(sizes[-1]):
        found.append(int(sizes[-1]))
    return found
