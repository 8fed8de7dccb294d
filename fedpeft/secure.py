"""Secure aggregation in one process: a federation whose replies are seen only as their sum.

The arithmetic is that of the protocol (``fedpeft.secagg``), bit for bit: updates in fixed point,
summed modulo 2^bits, decoded; keys and masks, which cancel, are left out, and so are their bytes.
``fedpeft.flower.secure`` plays the protocol itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from fedpeft.comms.ledger import Entry
from fedpeft.config import SecureAggregation
from fedpeft.federation import Failure, Federation, Partial
from fedpeft.metrics import Score
from fedpeft.postprocess import flat, unflat
from fedpeft.privacy.client_level import BELOW, ClientLevel
from fedpeft.secagg.fixed import FixedPoint
from fedpeft.secagg.messages import MIN_CLIENTS
from fedpeft.strategy import Messages
from fedpeft.tree import Layout, Tree, numel, row


class SecureFederation:
    """``inner``, of whose clients the server learns sums; see ``fedpeft.federation.Federation``.

    level: what clips the updates before they are summed. equal: whether all weigh one, else what
    they have examples.
    """

    def __init__(
        self, inner: Federation, settings: SecureAggregation, level: ClientLevel, equal: bool
    ) -> None:
        self._inner = inner
        self._settings = settings
        self._level = level
        self._equal = equal

    def clients(self) -> Mapping[str, int]:
        """As of ``inner``."""
        return self._inner.clients()

    def run(self, round: int, *stacks: Messages) -> Iterator[Messages | Failure | Partial]:
        """One Partial with all clients' sum, as a mean; failures where no sum comes about.

        As in the protocol, fewer than three replies, or fewer than the threshold's share of the
        clients asked, give no sum. Nor do fewer than must share the noise.
        """
        asked = [name for stack in stacks for name in stack.clients]
        excluded: dict[str, str] = {}
        replies: list[Messages] = []
        for reply in self._inner.run(round, *stacks):
            if isinstance(reply, Failure):
                excluded[reply.client] = reply.reason
            elif isinstance(reply, Messages):
                replies.append(reply)
            else:
                raise TypeError("a federation under secure aggregation must give single replies")
        there = [name for reply in replies for name in reply.clients]
        least = max(MIN_CLIENTS, math.ceil(self._settings.threshold * len(asked)))
        if self._level.place == "shares":
            least = max(least, self._level.least)
        if len(there) < least:
            why = f"no secure sum: {len(there)} of {len(asked)} clients, {least} are needed"
            yield from (Failure(name, why) for name in there)
            yield from (Failure(name, reason) for name, reason in excluded.items())
            return
        yield self._sum(stacks[0], replies, asked, excluded)

    def _sum(
        self,
        sent: Messages,
        replies: Sequence[Messages],
        asked: Sequence[str],
        excluded: Mapping[str, str],
    ) -> Partial:
        sizes = self._inner.clients()
        heaviest = 1.0 if self._equal else float(max(sizes[name] for name in asked))
        fixed = FixedPoint(
            bits=self._settings.bits,
            clip=self._level.reach(sent),
            clients=len(asked),
            length=numel(row(flat(replies[0].trees), 0)),
            weight_max=heaviest,
            extras=(heaviest,) * (2 if BELOW in replies[0].scalars else 1),
        )
        vectors = Vectors(fixed, replies[0])
        words = np.zeros(vectors.fixed.size, vectors.fixed.dtype)
        count = 0
        for reply in replies:
            words += vectors.encode(reply).sum(axis=0, dtype=vectors.fixed.dtype)
            count += len(reply)
        mean = vectors.mean(words, count)
        there = tuple(name for reply in replies for name in reply.clients)
        return Partial(mean, count, (Entry(there, {"masked": words.nbytes}),), excluded)

    def evaluate(self, round: int, *stacks: Messages) -> Iterator[dict[str, Score] | Failure]:
        """As of ``inner``: scores are not summed."""
        return self._inner.evaluate(round, *stacks)

    def memory(self) -> dict[str, dict[str, Tree]]:
        """As of ``inner``."""
        return self._inner.memory()

    def restore(self, memory: Mapping[str, Mapping[str, Tree]]) -> None:
        """As of ``inner``."""
        self._inner.restore(memory)


class Vectors:
    """What is summed of a reply: ``weight * update``, the weight, and the weighed bit where sent.

    like: a reply, for its names and shapes.
    """

    def __init__(self, fixed: FixedPoint, like: Messages) -> None:
        self.fixed = fixed
        self._trees = like.trees
        self._layout = Layout.of(row(flat(like.trees), 0))
        self._scalars = tuple(name for name in (BELOW,) if name in like.scalars)

    def encode(self, reply: Messages) -> np.ndarray:
        """Integers ``[K, size]``."""
        weight = reply.scalars["weight"][:, None]
        rows = self._layout.pack(flat(reply.trees)).cpu().double() * weight
        extras = [reply.scalars[name][:, None] * weight for name in self._scalars]
        found: np.ndarray = self.fixed.encode(torch.cat([rows, weight, *extras], dim=1).numpy())
        return found

    def mean(self, words: np.ndarray, count: int) -> Messages:
        """One row that stands for ``count`` clients, of whose integers ``words`` is the sum."""
        total = torch.from_numpy(self.fixed.decode(words, count))
        weight = total[self._layout.size]
        trees = unflat(self._layout.unpack(total[None, : self._layout.size] / weight), self._trees)
        extras = total[self._layout.size + 1 :] / weight
        scalars = {name: extras[i : i + 1] for i, name in enumerate(self._scalars)}
        return Messages(("sum",), trees, {"weight": weight[None], **scalars})
