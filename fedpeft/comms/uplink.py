"""Compressed replies: each client's update goes through a codec, with error feedback where biased.

What is coded is the update, the reply minus what the client was sent (what it was not sent goes as
it is), never raw weights, whose size would drown it. Under error feedback (Seide et al.,
Interspeech 2014; Karimireddy et al., ICML 2019, arXiv 1901.09847) a client adds what it could not
send in earlier rounds, and keeps what it cannot send in this one::

    u = update + e;  sent: C(u);  e <- u - C(u)

e is private memory of the client, one for each schema of replies. A reply that is lost on its way
takes what it held with it. Both ends read the same numbers in a payload, bit for bit, so that in
one process nothing has to be written.

With ``comms.up.densities`` each client encodes with the density that it was ordered
(``fedpeft.comms.densities``), and what it keeps carries over from one to the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedpeft.codecs import encode, wire
from fedpeft.codecs.settings import Codec, feeds_back
from fedpeft.codecs.wire import Header
from fedpeft.comms.densities import DENSITY, Densities, groups
from fedpeft.comms.payloads import SLACK, Mixed, Payloads, booked, read, suited
from fedpeft.comms.schema import Schema, applied, found, start
from fedpeft.config import Comms, Recipe
from fedpeft.errors import PayloadError
from fedpeft.message import PAYLOAD, Coded, Message, Messages
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
        if not schema.entries:
            return reply
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
        exact = schema.untouched(reply.trees)
        bare = replace(reply, trees=exact)
        coded, restored = self._coded(self._orders(sent), bare, wanted, schema, kept.round)
        if residual:
            kept.remember(memory, {n: wanted[int(n)] - restored[int(n)] for n in residual})
        spoilt = [rows.masked_fill(faulty.to(rows.device), math.nan) for rows in restored]
        trees = applied(schema, spoilt, before, exact)
        return replace(reply, trees=trees, coded=coded)

    def read(
        self, reply: Message, sent: Messages, like: Mapping[str, Tree], round: int
    ) -> Messages:
        """On the server: one client's reply with its trees as they are in the payload, one row.

        sent: what it was sent, one row. like: the trees that its reply must hold, unstacked. Raises
        PayloadError for a reply without a payload, or with one that cannot be read.
        """
        blobs = dict(reply.blobs)
        payload = blobs.pop(PAYLOAD, None)
        schema = Schema.of(like)
        if not schema.entries:
            return Messages.stack(sent.clients, [reply])
        if payload is None or reply.trees:
            raise PayloadError("the reply must hold a payload, and no other tensors")
        header, sections = wire.read(payload, 2 * schema.dense + SLACK)
        wire.expect(
            header, codec=self.codec.codec, base=self.base, schema=schema.digest, round=round
        )
        [(codec, _)] = self._orders(sent)
        vectors, exact = read(codec, sections, schema)
        trees = applied(schema, vectors, self._before(sent), exact)
        one = Messages.stack(sent.clients, [Message({}, reply.scalars, blobs)])
        return replace(one, trees=trees, coded=booked(schema, payload, sections))

    def _orders(self, sent: Messages) -> list[tuple[Codec, Tensor]]:
        """The codecs that a stack of clients encodes with, and whose they are: int64 ``[k]``.

        Raises PayloadError for a density that is not of the recipe, or where one is missing.
        """
        options = self.codec.densities
        if not options:
            return [(self.codec, torch.arange(len(sent)))]
        if DENSITY not in sent.scalars:
            raise PayloadError(
                f"the request has no scalar {DENSITY!r}, and comms.up.densities={options} leaves "
                f"it to the server to order one: both need the same recipe and fedpeft"
            )
        found = groups(sent)
        for value, _ in found:
            if value not in options:
                raise PayloadError(
                    f"the request orders {DENSITY}={value}, which is none of "
                    f"comms.up.densities={options}: a client obeys no other"
                )
        return [(replace(self.codec, density=value), at) for value, at in found]

    def _coded(
        self,
        orders: Sequence[tuple[Codec, Tensor]],
        bare: Messages,
        wanted: Sequence[Tensor],
        schema: Schema,
        round: int,
    ) -> tuple[Coded, list[Tensor]]:
        """Payloads, and what is read in them by number of the part; clients of a codec at once.

        bare: the replies with those trees alone that no codec touches.
        """
        if len(orders) == 1:
            one = self._payloads(orders[0][0], bare, wanted, schema, round)
            return one, [symbols.restored() for symbols in one.parts]
        restored = [torch.empty_like(rows) for rows in wanted]
        made = list[Payloads]()
        for codec, at in orders:
            own = bare.rows(at.tolist())
            made.append(self._payloads(codec, own, [rows[at] for rows in wanted], schema, round))
            for rows, symbols in zip(restored, made[-1].parts, strict=True):
                rows[at] = symbols.restored()
        return Mixed.of(made, [at for _, at in orders]), restored

    def _payloads(
        self, codec: Codec, bare: Messages, wanted: Sequence[Tensor], schema: Schema, round: int
    ) -> Payloads:
        symbols = tuple(
            encode(suited(codec, part), rows, part.shapes, self._seeds(bare, round, schema, number))
            for number, (part, rows) in enumerate(zip(schema.parts, wanted, strict=True))
        )
        header = Header(codec.codec, self.base, schema.digest, round=round)
        return Payloads(header, schema, symbols, bare.trees)

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
        return torch.tensor(seeds)


def uplinks_of(recipe: Recipe, base: str) -> list[Postprocessor]:
    """What is done for the recipe's codec of replies, the server's half first; maybe nothing."""
    found, uplink = list[Postprocessor](), uplink_of(recipe, base)
    if recipe.comms.up.densities:
        found.append(Densities(recipe.comms.up.densities, recipe.seed))
    return found if uplink is None else [*found, uplink]


def uplink_of(recipe: Recipe, base: str) -> Uplink | None:
    """The recipe's, if it has one; base: digest of the frozen base."""
    if recipe.comms.up.codec == "none":
        return None
    bounded = recipe.privacy.unit == "client"
    return Uplink(recipe.comms.up, recipe.seed, base, updates=bounded, individual=bounded)


def keeps_for_codecs(comms: Comms) -> bool:
    """Whether clients keep something between rounds for the sake of codecs."""
    up = comms.up.codec != "none" and feeds_back(comms.up)
    return up or comms.down.codec != "none"


def _device(messages: Messages) -> torch.device:
    return next(t.device for own in messages.trees.values() for t in own.values())


def _faulty(reply: Messages) -> Tensor:
    """Which rows hold NaN or Inf, bool ``[K, 1]``; what is no update goes no further than that."""
    flags = [finite_rows(own).cpu() for own in reply.trees.values() if own]
    return ~torch.stack(flags).all(dim=0)[:, None]
