"""Compressed broadcasts: clients are sent how the model changed since the version that they hold.

The server keeps, beside the exact model w of the strategy, the one that clients have, r. In each
exchange ``r <- r + C(w - r)``: what a codec leaves out is in the next difference, so its error does
not pile up. A client is sent the changes since the version that it holds; r itself, uncompressed,
where it holds none or that is shorter. All of them train from the same r.
Clients train from r; what they reply is moved by ``w - r``, so that the strategy receives updates
of its own model.

With ``form: weights`` there is nothing to refer to: ``r = C(w)``, as in FLASC (Kuo et al., arXiv
2406.05233), whose clients start from the largest weights and zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from fedpeft.codecs import encode, wire
from fedpeft.codecs.settings import Codec
from fedpeft.codecs.wire import Header
from fedpeft.comms.payloads import (
    SCHEMA,
    SLACK,
    Payloads,
    Way,
    Ways,
    as_bytes,
    booked,
    read,
    suited,
    sum_of,
)
from fedpeft.comms.schema import Schema, applied, start
from fedpeft.errors import FedpeftError, PayloadError
from fedpeft.message import Messages, Replies
from fedpeft.postprocess import Postprocessor, flat
from fedpeft.streams import derive
from fedpeft.tree import Tree, broadcast, row, shared

PLAIN = Codec(codec="dense")
"""How a version is sent to who does not hold the one before."""

MEMORY = "downlink."
"""Of the names among a client's memories: what it was sent last, by schema."""

VERSION, VERSIONS, CLIENTS, PAST = "version", "versions", "clients", "past."
"""Entries beside the tensors: the version; which versions who holds; payloads by version."""

SPACE = 64
"""Bytes that are made room for by a schema alone, at most, per byte of the trainable tensors."""

MOST = 1 << 32
"""Bytes of a payload, at most."""

Memory = dict[str, Tree]
"""Name -> tree, of one client."""


@dataclass(frozen=True)
class Held:
    """Of one schema, what clients hold.

    version: the newest; 0 is what clients have by themselves. trees: its, unstacked. clients:
    client -> version it holds. past: version -> the payload that leads to it from the one before,
    as far back as the way along them is shorter than the whole.
    """

    version: int
    trees: Mapping[str, Tree]
    clients: Mapping[str, int]
    past: Mapping[int, bytes]


NOTHING = Held(0, {}, {}, {})


@dataclass(frozen=True)
class _Asked:
    """What some clients of an exchange were sent: which version, and what the strategy meant."""

    digest: str
    version: int
    wanted: Mapping[str, Tree]
    clients: tuple[str, ...]

    def means(self, schema: Schema, wanted: Mapping[str, Tree]) -> bool:
        """Whether another group's trees are the same."""
        return self.digest == schema.digest and not _gap(wanted, self.wanted)


@dataclass
class Downlink(Postprocessor):
    """The codec of what clients are sent. It comes first of all that is done on the server.

    base: digest of the frozen base. initial: every trainable tensor as initialised, which clients
    have by themselves: version 0. For strategies that send all clients of a group the same.
    """

    codec: Codec
    seed: int
    base: str
    initial: Tree
    remembers: bool = field(default=True, init=False)
    held: dict[str, Held] = field(default_factory=dict, init=False)
    waiting: list[_Asked] = field(default_factory=list, init=False)
    gaps: dict[str, Mapping[str, Tree]] = field(default_factory=dict, init=False)

    def announce(self, sent: Messages) -> Messages:
        self._check_alike(sent)
        wanted = {tree: row(own, 0) for tree, own in sent.trees.items()}
        schema = Schema.of(wanted)
        if not schema.entries:
            return sent
        own = self.held.get(schema.digest, NOTHING)
        if not any(asked.means(schema, wanted) for asked in self.waiting):
            own = self._next(schema, wanted, own)
            self.held[schema.digest] = own
        self.waiting.append(_Asked(schema.digest, own.version, wanted, sent.clients))
        self.gaps.update(dict.fromkeys(sent.clients, _gap(wanted, own.trees)))
        return replace(
            sent,
            trees={tree: broadcast(tensors, len(sent)) for tree, tensors in own.trees.items()},
            coded=self._ways(schema, own, sent.clients),
        )

    def enter(
        self, sent: Sequence[Messages], like: Mapping[str, Tree], replies: Replies
    ) -> Iterator[Messages]:
        gaps, self.gaps = self.gaps, {}
        for reply in replies:
            gap = gaps.get(sent[0].clients[0] if len(sent) == 1 else reply.clients[0], {})
            yield replace(reply, trees=_moved(reply.trees, gap))

    def arrived(self, clients: Sequence[str]) -> None:
        there = set(clients)
        for asked in self.waiting:
            own = self.held[asked.digest]
            now = dict.fromkeys((n for n in asked.clients if n in there), asked.version)
            self.held[asked.digest] = replace(own, clients={**own.clients, **now})
        self.waiting = []

    def memory(self) -> dict[str, Tree]:
        found: dict[str, Tree] = {}
        for digest, own in self.held.items():
            names = sorted(own.clients)
            found[digest] = {
                VERSION: torch.tensor(own.version),
                CLIENTS: as_bytes("\n".join(names).encode()),
                VERSIONS: torch.tensor([own.clients[n] for n in names], dtype=torch.int64),
                **{f"{PAST}{version}": as_bytes(data) for version, data in own.past.items()},
                **flat(own.trees),
            }
        return found

    def restore(self, memory: Mapping[str, Tree]) -> None:
        for digest, tree in memory.items():
            names = bytes(tree[CLIENTS].tolist()).decode().split("\n")
            held = dict(zip(names, tree[VERSIONS].tolist(), strict=False))  # "" where nobody is
            past = {
                int(key.removeprefix(PAST)): bytes(data.tolist())
                for key, data in tree.items()
                if key.startswith(PAST)
            }
            self.held[digest] = Held(int(tree[VERSION]), _unflat(tree), held, past)

    def read(self, payload: bytes, memory: Mapping[str, Tree]) -> tuple[dict[str, Tree], Memory]:
        """On a client: the trees (one row) that it was sent, and what to keep of them.

        memory: what the client keeps. Raises PayloadError for what cannot be read, and for a change
        of a version that the client does not hold.
        """
        trees: dict[str, Tree] = {}
        kept: Memory = {}
        for piece in wire.pieces(payload, MOST):
            trees, name, own = self._read(piece, {**memory, **kept})
            kept[name] = own
        return trees, kept

    def _read(
        self, payload: bytes, memory: Mapping[str, Tree]
    ) -> tuple[dict[str, Tree], str, Tree]:
        header, sections = wire.read(payload, MOST)
        name = f"{MEMORY}{header.schema}"
        before = memory.get(name)
        text = sections.pop(SCHEMA, None)
        if text is None and before is None:
            raise PayloadError("payload: it says not what it holds, and this client does not know")
        known = bytes(before[SCHEMA].tolist()) if before is not None else b""
        schema = Schema.parse(known if text is None else text.tobytes())
        if not header.reference:  # it introduces the schema
            most = SPACE * sum(value.nbytes for value in self.initial.values()) + SLACK
            if schema.dense > most:
                raise PayloadError(
                    f"payload: tensors of {schema.dense} bytes are declared, and at most {most} "
                    f"are allowed"
                )
            kept = {VERSION: torch.tensor(0), SCHEMA: as_bytes(schema.text)}
            return {}, name, kept | flat(self._start(schema))
        whole, start_of = bool(header.flags & wire.FLAG_WEIGHTS), dict[str, Tree]()
        if not whole:
            if before is None or int(before[VERSION]) != header.reference - 1:
                raise PayloadError(
                    f"payload: it changes version {header.reference - 1} of what clients were "
                    f"sent, which this one does not hold: it needs the whole"
                )
            start_of = _unflat(before)
        codec = PLAIN if whole and self.codec.form == "update" else self.codec
        wire.expect(header, codec=codec.codec, base=self.base, schema=schema.digest, round=0)
        vectors, exact = read(codec, sections, schema)
        trees = applied(schema, vectors, _stacked(start_of), exact)
        kept = {
            VERSION: torch.tensor(header.reference),
            SCHEMA: as_bytes(schema.text),
            **{key: value[0] for key, value in flat(trees).items()},
        }
        return trees, name, kept

    def _next(self, schema: Schema, wanted: Mapping[str, Tree], before: Held) -> Held:
        """The next version."""
        version = before.version + 1
        if self.codec.form == "weights":
            coded, trees = self._coded(self.codec, schema, wanted, {}, version)
            return Held(version, trees, before.clients, {})
        start_of = before.trees if before.version else self._start(schema)
        if not before.version and _gap(wanted, start_of):
            return Held(version, wanted, {}, {})
        coded, trees = self._coded(self.codec, schema, wanted, start_of, version)
        past = {**before.past, version: coded.payload(0)}
        return Held(version, trees, before.clients, _short(past, schema.dense))

    def _coded(
        self,
        codec: Codec,
        schema: Schema,
        wanted: Mapping[str, Tree],
        before: Mapping[str, Tree],
        version: int,
        told: bool = False,
    ) -> tuple[Payloads, Mapping[str, Tree]]:
        """The payload that leads from ``before``, or nothing, to a version, and whither."""
        stacked, start_of, symbols = _stacked(wanted), _stacked(before), []
        for number, part in enumerate(schema.parts):
            seed = derive(self.seed, "downlink", schema.digest, version, number)
            rows = part.pack(stacked) - start(part, start_of)
            symbols.append(encode(suited(codec, part), rows, part.shapes, torch.tensor([seed])))
        exact = schema.untouched(stacked)
        trees = applied(schema, [own.restored() for own in symbols], start_of, exact)
        flags = 0 if before else wire.FLAG_WEIGHTS
        header = Header(codec.codec, self.base, schema.digest, reference=version, flags=flags)
        payloads = Payloads(header, schema, tuple(symbols), exact, told)
        return payloads, {tree: row(own, 0) for tree, own in trees.items()}

    def _ways(self, schema: Schema, own: Held, clients: Sequence[str]) -> Ways:
        """How each client is brought to the newest version."""
        codec = self.codec if self.codec.form == "weights" else PLAIN
        wholes = [
            self._coded(codec, schema, own.trees, {}, own.version, told)[0]
            for told in (False, True)
        ]
        options: list[Way] = [Way(sum_of(one.sizes()), partial(one.payload, 0)) for one in wholes]
        least = sum(options[0].sizes.values())
        places: dict[int, int] = {}
        for at in sorted({own.clients.get(client, 0) for client in clients}):
            places[at] = 0 if at else 1
            steps = [own.past.get(version) for version in range(at + 1, own.version + 1)]
            along = [step for step in steps if step is not None]
            if len(along) < len(steps):
                continue
            if not at:
                along.insert(0, self._introduction(schema))
            if sum(map(len, along)) < least:
                places[at] = len(options)
                options.append(Way(_cost(schema, along), partial(b"".join, along)))
        which = [places[own.clients.get(client, 0)] for client in clients]
        return Ways(tuple(options), torch.tensor(which))

    def _start(self, schema: Schema) -> dict[str, Tree]:
        """What clients have before anything was sent: tensors as initialised, else zeros."""
        found: dict[str, Tree] = {}
        for entry in schema.entries:
            own = self.initial.get(entry.name)
            if own is None or tuple(own.shape) != entry.shape:
                own = torch.zeros(entry.shape)
            found.setdefault(entry.tree, {})[entry.name] = own.cpu().to(entry.dtype)
        return found

    def _introduction(self, schema: Schema) -> bytes:
        """The payload that tells who holds nothing what the others are about."""
        header = Header("none", self.base, schema.digest)
        return wire.write(header, {SCHEMA: np.frombuffer(schema.text, dtype=np.uint8)})

    @staticmethod
    def _check_alike(sent: Messages) -> None:
        trees = sent.trees.values()
        if len(sent) > 1 and not all(shared(value) for own in trees for value in own.values()):
            raise FedpeftError(
                "comms.down.codec needs a strategy that sends all clients of a group the same: set "
                "comms.down.codec=none."
            )


def _stacked(trees: Mapping[str, Tree]) -> dict[str, Tree]:
    """The trees of one client as a stack of one."""
    return {tree: broadcast(own, 1) for tree, own in trees.items()}


def _short(past: Mapping[int, bytes], most: int) -> dict[int, bytes]:
    """The newest of ``past`` that are not longer than ``most`` together."""
    found: dict[int, bytes] = {}
    for version in sorted(past, reverse=True):
        most -= len(past[version])
        if most < 0:
            break
        found[version] = past[version]
    return found


def _cost(schema: Schema, payloads: Sequence[bytes]) -> dict[str, int]:
    """Bytes of several payloads by kind."""
    found: dict[str, int] = {}
    for payload in payloads:
        sections = wire.read(payload, MOST)[1]
        for kind, size in sum_of(booked(schema, payload, sections).sizes()).items():
            found[kind] = found.get(kind, 0) + size
    return found


def _unflat(tree: Tree) -> dict[str, Tree]:
    """The opposite of ``flat``; names without a slash are passed over."""
    found: dict[str, Tree] = {}
    for key, value in tree.items():
        part, slash, name = key.partition("/")
        if slash:
            found.setdefault(part, {})[name] = value
    return found


def _gap(wanted: Mapping[str, Tree], after: Mapping[str, Tree]) -> dict[str, Tree]:
    """How far what was meant is from what was sent, float64; where they differ."""
    found: dict[str, Tree] = {}
    for tree, own in wanted.items():
        for name, value in own.items():
            if not torch.equal(value, after[tree][name]):
                found.setdefault(tree, {})[name] = value.double() - after[tree][name].double()
    return found


def _moved(trees: Mapping[str, Tree], gap: Mapping[str, Tree]) -> dict[str, Tree]:
    """Replies moved by ``gap``, where they hold the like of it."""
    found = {tree: dict(own) for tree, own in trees.items()}
    for tree, own in gap.items():
        for name, move in own.items():
            value = found.get(tree, {}).get(name)
            if value is not None and value.shape[1:] == move.shape:
                moved = value.double() + move.to(value.device)
                found[tree][name] = moved.to(value.dtype)
    return found
