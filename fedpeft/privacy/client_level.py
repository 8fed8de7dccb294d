"""Differential privacy whose unit is a client: all of its data, by its clipped update.

One release g per exchange, from the replies R that came (McMahan et al., arXiv 1710.06963)::

    g = (sum_{k in R} clip(update_k, S) + noise) / n,    clip(u, S) = u min(1, S / ||u||)

over all tensors of a reply together, in float64. n is the *expected* number of clients of a
round, whoever came: leaving one client out moves the sum by at most S and nothing else, and
dropouts weaken the signal, never the noise. Where nobody came, noise is released all the same. The
strategy receives g as the mean update of a round, so only strategies that are linear in their
replies can be protected.

Three places for the noise: the server adds N(0, (z S)^2) to the sum; or every client adds its share
of it, N(0, (z S)^2 / m) with m the fewest replies that a round may have (needs secure aggregation);
or every client adds N(0, (2 z S)^2), full noise for the replacement of its update (local), where
the mean is over who came. Where secure aggregation is all that is asked for, updates are clipped
for it and nobody adds noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.message import Messages, Replies
from fedpeft.postprocess import Kept, Postprocessor, applied, flat, unflat, updates
from fedpeft.privacy.clipping import adapt, clip, split
from fedpeft.privacy.matrix import coefficients, correlated, sensitivity
from fedpeft.privacy.randomness import Randomness
from fedpeft.tree import Layout, Tree, row, shared

BOUND = "privacy.clip_norm"
"""The scalar that tells clients the bound, where it adapts."""

BELOW = "privacy.below"
"""The scalar of a reply: whether the update's norm was at most the bound, before clipping."""

ROUNDING = 1e-6
"""Clients clip to this share less than the bound, so that float32 on the way does not exceed it."""


@dataclass(frozen=True)
class Bands:
    """Noise of one round that the next rounds take back, in part; see ``fedpeft.privacy.matrix``.

    The run has ``rounds``, in which nobody takes part twice within ``separation`` of them.
    """

    bands: int
    rounds: int
    separation: int

    @property
    def sensitivity(self) -> float:
        """How far one client moves the encoded releases, in units of the clip norm."""
        most = -(-self.rounds // self.separation)
        return sensitivity(self.bands, self.rounds, self.separation, most)


@dataclass(frozen=True)
class Adaptive:
    """The bound follows the ``quantile`` of the clients' norms at ``rate`` (arXiv 1905.03871)."""

    quantile: float
    rate: float
    bits_std: float


@dataclass
class ClientLevel(Postprocessor):
    """See the module.

    clip_norm: S, now. noise_multiplier: z. expected: n. least: m. place: who adds the noise.
    """

    clip_norm: float
    noise_multiplier: float
    expected: float
    least: int
    place: Literal["server", "client", "shares", "nobody"]
    randomness: Randomness
    adaptive: Adaptive | None = None
    bands: Bands | None = None
    past: list[Tensor] = field(default_factory=list, init=False)

    @property
    def always(self) -> bool:  # type: ignore[override]
        return self.place == "server"

    @property
    def tells(self) -> tuple[str, ...]:  # type: ignore[override]
        return (BELOW,) if self.adaptive else ()

    def reach(self, sent: Messages) -> float:
        """No number of what leaves a client in reply to ``sent`` is larger, noise included.

        Noise beyond 12 standard deviations, which has probability 1e-32, counts as impossible.
        """
        bound = self._bound(sent)
        return bound + 12 * self._own_std(bound)

    def announce(self, sent: Messages) -> Messages:
        if self.adaptive is None:
            return sent
        bound = torch.full((len(sent),), self.clip_norm, dtype=torch.float64)
        return replace(sent, scalars={**sent.scalars, BOUND: bound})

    def leave(self, sent: Messages, reply: Messages, kept: Kept) -> Messages:
        bound = self._bound(sent)
        layout = Layout.of(row(flat(reply.trees), 0))
        clipped = clip(layout.pack(flat(updates(sent, reply))), bound * (1 - ROUNDING))
        rows, std = clipped.rows, self._own_std(bound)
        if std > 0:
            rows = rows + std * self.randomness.normal(*rows.shape).to(rows.device)
        scalars = {"weight": reply.scalars["weight"]}
        if self.adaptive is not None:
            scalars[BELOW] = clipped.unclipped.to("cpu", torch.float64)
        trees = unflat(layout.unpack(rows.float()), reply.trees)
        return Messages(reply.clients, trees, scalars)

    def enter(
        self, sent: Sequence[Messages], like: Mapping[str, Tree], replies: Replies
    ) -> Replies:
        self._check_alike(sent)
        layout = Layout.of(flat(like))
        total = torch.zeros(layout.size, dtype=torch.float64)
        came = below = 0.0
        for stack in replies:
            rows = layout.pack(flat(stack.trees)).cpu().double()
            weight = stack.scalars["weight"]
            if self.place == "server":
                rows = clip(rows, self.clip_norm).rows
            total += weight @ rows
            came += float(weight.sum())
            below += float(weight @ stack.scalars[BELOW]) if self.adaptive else 0.0
        if self.place == "server":
            total = total + self._noise(layout.size)
        if self.adaptive is not None:
            self._adapt(self.adaptive, below, came)
        if not came and not self.always:
            return
        if self.place == "shares" and came < self.least:
            raise QuorumError(
                f"{came:g} clients' shares do not make up the noise of privacy.noise=shares; "
                f"{self.least} do. The last round's adapter is kept."
            )
        among = self.expected if self.place in ("server", "shares") else came
        moved = unflat(layout.unpack(total[None] / among), like)
        trees = applied(sent[0].rows([0]), moved)
        ready = {
            part: {name: value.to(like[part][name].dtype) for name, value in tree.items()}
            for part, tree in trees.items()
        }
        yield Messages(("release",), ready, {"weight": torch.ones(1, dtype=torch.float64)})

    def memory(self) -> dict[str, Tree]:
        kept: dict[str, Tree] = {}
        if self.adaptive is not None:
            kept["bound"] = {"clip_norm": torch.tensor(self.clip_norm, dtype=torch.float64)}
        if self.past:
            kept["noise"] = {f"{i:06d}": value for i, value in enumerate(self.past)}
        return kept

    def restore(self, memory: Mapping[str, Tree]) -> None:
        if "bound" in memory:
            self.clip_norm = float(memory["bound"]["clip_norm"])
        noise = memory.get("noise", {})
        self.past = [noise[name] for name in sorted(noise)]

    def _bound(self, sent: Messages) -> float:
        """The clip norm by which clients reply to ``sent``."""
        return float(sent.scalars[BOUND][0]) if BOUND in sent.scalars else self.clip_norm

    def _own_std(self, bound: float) -> float:
        """Standard deviation of what a client adds to each number."""
        if self.place == "client":
            return 2.0 * self.noise_multiplier * bound
        if self.place == "shares":
            return self.noise_multiplier * bound / math.sqrt(self.least)
        return 0.0

    def _noise(self, size: int) -> Tensor:
        """The server's noise on a sum, float64 ``[size]``."""
        fresh = self.randomness.normal(size)
        if self.adaptive is not None:
            z = split(self.noise_multiplier, self.adaptive.bits_std)
            return z * self.clip_norm * fresh
        std = self.noise_multiplier * self.clip_norm
        if self.bands is None:
            return std * fresh
        if self.past and len(self.past[-1]) != size:
            raise FedpeftError(
                f"privacy.bands={self.bands.bands} correlates the rounds' noise, and "
                f"this strategy's rounds release {len(self.past[-1])} and {size} numbers: set "
                f"privacy.bands=0, or use a strategy that trains the same tensors every round."
            )
        noise = correlated(fresh, self.past, coefficients(self.bands.bands).tolist())
        self.past = [*self.past, noise][-max(1, self.bands.bands - 1) :]
        return std * self.bands.sensitivity * noise

    def _adapt(self, rule: Adaptive, below: float, came: float) -> None:
        """The next round's bound, from the noised share of clients that kept under this one."""
        shifted = below - came / 2 + rule.bits_std * float(self.randomness.normal(1))
        share = shifted / self.expected + 0.5
        self.clip_norm = adapt(self.clip_norm, share, rule.quantile, rule.rate)

    @staticmethod
    def _check_alike(sent: Sequence[Messages]) -> None:
        one = len(sent) == 1 and all(
            len(sent[0]) == 1 or shared(value)
            for t in sent[0].trees.values()
            for value in t.values()
        )
        if not one:
            raise FedpeftError(
                "privacy.unit=client needs a strategy that sends all clients the same: the mean of "
                "updates from different starts moves no common model. Use privacy.unit=record."
            )
