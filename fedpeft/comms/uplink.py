"""Compressed replies: each client's update goes through a codec, with error feedback where biased.

What is coded is the update, the reply minus what the client was sent (what it was not sent goes as
it is), never raw weights, whose size would drown it. Under error feedback (Seide et al., Interspeech
2014; Karimireddy et al., ICML 2019, arXiv 1901.09847) a client adds what it could not send in
earlier rounds, and keeps what it cannot send in this one::

    u = update + e;  sent: C(u);  e <- u - C(u)

e is private memory of the client, one for each schema of replies. A reply that is lost on its way
takes what it held with it. Both ends read the same numbers in a payload, bit for bit, so that in
one process nothing has to be written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedpeft.codecs import Codec, codec_id, encode, feeds_back
from fedpeft.codecs.wire import Header
from fedpeft.comms.payloads import Payloads, read
from fedpeft.comms.schema import Schema, applied, found, start
from fedpeft.message import Messages
from fedpeft.postprocess import Kept, Postprocessor
from fedpeft.streams import derive
from fedpeft.tree import Tree, finite_rows, row


@dataclass(frozen=True)
class Uplink(Postprocessor):
    """The codec of what leaves clients. It comes last of all that is done to replies there.

    base: digest of the frozen base. updates: replies are updates already, not weights (under
    client-level privacy). individual: what enters is bounded client by client.
    """

    codec: Codec
    seed: int
    base: str
    updates: bool = False
    individual: bool = False

    @property
    def remembers(self) -> bool:  # type: ignore[override]
        return feeds_back(self.codec)

    def leave(self, sent: Messages, reply: Messages, kept: Kept) -> Messages:
        schema = Schema.of({tree: row(own, 0) for tree, own in reply.trees.items()})
        before = self._before(sent)
        faulty = _faulty(reply)
        wanted = [
            (part.pack(reply.trees) - start(part, before)).masked_fill(faulty.to(_device(reply)), 0)
            for part in schema.parts
        ]
        memory = f"uplink.{schema.digest}"
        residual = self._residual(schema, wanted, before, kept, memory)
        for number, left in residual.items():
            wanted[int(number)] += left
        symbols = tuple(
            encode(self.codec, rows, part.shapes, self._seeds(reply, kept.round, schema, number))
            for number, (part, rows) in enumerate(zip(schema.parts, wanted, strict=True))
        )
        restored = [own.restored() for own in symbols]
        if residual:
            kept.remember(memory, {n: wanted[int(n)] - restored[int(n)] for n in residual})
        exact = schema.untouched(reply.trees)
        spoilt = [rows.masked_fill(faulty.to(rows.device), math.nan) for rows in restored]
        trees = applied(schema, spoilt, before, exact)
        header = Header(codec_id(self.codec), kept.round, self.base, schema.digest)
        return replace(reply, trees=trees, coded=Payloads(header, schema, symbols, exact))

    def read(self, payload: bytes, sent: Messages, like: Mapping[str, Tree], round: int) -> Messages:
        """One client's trees, stacked, from its payload; sent: what it was sent, one row.

        like: the trees that its reply must hold, unstacked. Raises PayloadError.
        """
        schema = Schema.of(like)
        vectors, exact = read(self.codec, payload, schema, self.base, round)
        return replace(sent, trees=applied(schema, vectors, self._before(sent), exact))

    def _before(self, sent: Messages) -> Mapping[str, Tree]:
        """What updates are relative to, stacked."""
        return {} if self.updates else sent.trees

    def _residual(
        self,
        schema: Schema,
        wanted: Sequence[Tensor],
        before: Mapping[str, Tree],
        kept: Kept,
        memory: str,
    ) -> Tree:
        """What clients could not send so far, by number of the part; of updates only."""
        if not feeds_back(self.codec):
            return {}
        own = {
            str(number): torch.zeros_like(rows)
            for number, (part, rows) in enumerate(zip(schema.parts, wanted, strict=True))
            if self.updates or all(found(entry, before) is not None for entry in part.entries)
        }
        return kept.recall(memory, own) if own else {}

    def _seeds(self, reply: Messages, round: int, schema: Schema, number: int) -> Tensor:
        labels = (round, schema.digest, number)
        seeds = [derive(self.seed, "uplink", client, *labels) for client in reply.clients]
        return torch.tensor(seeds, device=_device(reply))


def _device(messages: Messages) -> torch.device:
    return next(t.device for own in messages.trees.values() for t in own.values())


def _faulty(reply: Messages) -> Tensor:
    """Which rows hold NaN or Inf, bool ``[K, 1]``; what is no update goes no further than that."""
    flags = [finite_rows(own).cpu() for own in reply.trees.values() if own]
    return ~torch.stack(flags).all(dim=0)[:, None]
