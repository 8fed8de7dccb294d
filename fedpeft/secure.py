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
from fedpeft.errors import ReplyError
from fedpeft.federation import Failure, Federation, Partial
from fedpeft.metrics import Score
from fedpeft.postprocess import flat, unflat
from fedpeft.privacy.client_level import BELOW, ClientLevel
from fedpeft.secagg.fixed import FixedPoint, Floats
from fedpeft.secagg.messages import MIN_CLIENTS
from fedpeft.strategy import Messages
from fedpeft.tree import Layout, Tree, row


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
        bits = BELOW in replies[0].scalars
        summed = Summed({tree: row(own, 0) for tree, own in replies[0].trees.items()}, bits)
        fixed = FixedPoint(
            bits=self._settings.bits,
            clip=self._level.reach(sent),
            clients=len(asked),
            length=summed.length,
            weight_max=heaviest,
            extras=(heaviest,) * (1 + bits),
        )
        words = np.zeros(fixed.size, fixed.dtype)
        there: list[str] = []
        for reply in replies:
            words += fixed.encode(summed.rows(reply)).sum(axis=0, dtype=fixed.dtype)
            there.extend(reply.clients)
        mean = summed.mean(fixed.decode(words, len(there)))
        entry = Entry(tuple(there), {"masked": words.nbytes})
        return Partial(mean, len(there), (entry,), excluded)

    def evaluate(self, round: int, *stacks: Messages) -> Iterator[dict[str, Score] | Failure]:
        """As of ``inner``: scores are not summed."""
        return self._inner.evaluate(round, *stacks)

    def memory(self) -> dict[str, dict[str, Tree]]:
        """As of ``inner``."""
        return self._inner.memory()

    def restore(self, memory: Mapping[str, Mapping[str, Tree]]) -> None:
        """As of ``inner``."""
        self._inner.restore(memory)


class Summed:
    """A reply as one vector, and the mean reply of a sum of them.

    What is summed is ``weight * update``, the weight, and where sent the weighed bit whether a
    client was clipped. trees: those of a reply, unstacked. bits: whether that bit is sent.
    """

    def __init__(self, trees: Mapping[str, Tree], bits: bool) -> None:
        self._trees = trees
        self._layout = Layout.of(flat(trees))
        self._scalars = (BELOW,) if bits else ()

    @property
    def length(self) -> int:
        """Coordinates of an update."""
        return self._layout.size

    def rows(self, reply: Messages) -> Floats:
        """Of K clients' replies, as they would leave them: float64 ``[K, size]``.

        Raises ReplyError where tensors are not those of ``trees``.
        """
        found = flat(reply.trees)
        shapes = {name: tuple(value.shape[1:]) for name, value in found.items()}
        if shapes != dict(zip(self._layout.names, self._layout.shapes, strict=True)):
            raise ReplyError("the reply's tensors are not those that strategy.expects names")
        weight = reply.scalars["weight"][:, None]
        updates = self._layout.pack(found).cpu().double() * weight
        extras = [reply.scalars[name][:, None] * weight for name in self._scalars]
        rows: Floats = torch.cat([updates, weight, *extras], dim=1).numpy()
        return rows

    def mean(self, total: Floats) -> Messages:
        """One row that stands for all whose vectors are in the sum ``[size]``."""
        values, size = torch.from_numpy(total), self._layout.size
        weight = values[size]
        trees = unflat(self._layout.unpack(values[None, :size] / weight), self._trees)
        extras = values[size + 1 :] / weight
        scalars = {name: extras[i : i + 1] for i, name in enumerate(self._scalars)}
        return Messages(("sum",), trees, {"weight": weight[None], **scalars})
