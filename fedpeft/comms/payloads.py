"""Payloads: a stack's trees as a codec made them, counted without being written, or written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedpeft.codecs import Symbols, decode, wire
from fedpeft.codecs.settings import Codec
from fedpeft.codecs.symbols import KINDS
from fedpeft.comms.schema import Entry, Part, Schema
from fedpeft.errors import PayloadError
from fedpeft.model import kind_of
from fedpeft.tree import Tree, rows

SCHEMA = "schema"
"""The section that holds a schema."""

SLACK = 1 << 20
"""Bytes that a payload may have beyond twice its numbers as they are."""


@dataclass(frozen=True)
class Payloads:
    """One payload per client, or one for all; see ``fedpeft.message.Coded``.

    header: all have it in common. parts: what became of the schema's parts. exact: stacked trees
    that no codec touches. told: whether the schema is in the payload.
    """

    header: wire.Header
    schema: Schema
    parts: tuple[Symbols, ...]
    exact: Mapping[str, Tree]
    told: bool = False

    def sizes(self) -> dict[str, Tensor]:
        """See ``Coded.sizes``."""
        found: dict[str, Tensor] = {}

        def add(kind: str, length: Tensor) -> None:
            found[kind] = found[kind] + length if kind in found else length

        for part, symbols in zip(self.schema.parts, self.parts, strict=True):
            for kind, length in symbols.bytes().items():
                add(part.kind if kind == "values" else kind, length.cpu())
        lengths = self._lengths()
        for number, entry in enumerate(self.schema.exact):
            add(kind_of(entry.name), lengths[f"exact.{number}"])
        if self.told:
            add(SCHEMA, lengths[SCHEMA])
        add("header", wire.overhead(lengths))
        return found

    def rows(self, index: Sequence[int]) -> Payloads:
        """See ``Coded.rows``."""
        at = torch.as_tensor(list(index), dtype=torch.long)
        return replace(
            self,
            parts=tuple(symbols.rows(at) for symbols in self.parts),
            exact={tree: rows(own, index) for tree, own in self.exact.items()},
        )

    def payload(self, k: int) -> bytes:
        """See ``Coded.payload``."""
        sections: dict[str, np.ndarray] = {}
        for number, symbols in enumerate(self.parts):
            sections |= {f"{number}.{name}": data for name, data in symbols.arrays(k).items()}
        for number, entry in enumerate(self.schema.exact):
            value = self.exact[entry.tree][entry.name][k].cpu().contiguous().view(-1)
            sections[f"exact.{number}"] = value.view(torch.uint8).numpy()
        if self.told:
            sections[SCHEMA] = np.frombuffer(self.schema.text, dtype=np.uint8)
        return wire.write(self.header, sections)

    def _lengths(self) -> dict[str, Tensor]:
        """Section -> bytes, int64 ``[K]`` on the CPU; -1 for a client that has no such one."""
        found = {
            f"{number}.{name}": length.cpu()
            for number, symbols in enumerate(self.parts)
            for name, length in symbols.lengths().items()
        }
        count = max((len(length) for length in found.values()), default=1)
        for number, entry in enumerate(self.schema.exact):
            value = self.exact[entry.tree][entry.name]
            found[f"exact.{number}"] = torch.full((len(value),), value[0].nbytes)
            count = len(value)
        if self.told:
            found[SCHEMA] = torch.full((count,), len(self.schema.text))
        return found


@dataclass(frozen=True)
class Way:
    """A payload that several clients may be sent: its length by kind, and how to write it."""

    sizes: Mapping[str, int]
    write: Callable[[], bytes]


@dataclass(frozen=True)
class Ways:
    """Of some payloads, the one that each of K clients is sent. which: int64 ``[K]``."""

    options: tuple[Way, ...]
    which: Tensor

    def sizes(self) -> dict[str, Tensor]:
        """See ``Coded.sizes``."""
        kinds = sorted({kind for way in self.options for kind in way.sizes})
        return {
            kind: torch.tensor([way.sizes.get(kind, 0) for way in self.options])[self.which]
            for kind in kinds
        }

    def rows(self, index: Sequence[int]) -> Ways:
        """See ``Coded.rows``."""
        return Ways(self.options, self.which[list(index)])

    def payload(self, k: int) -> bytes:
        """See ``Coded.payload``."""
        return self.options[int(self.which[k])].write()


@dataclass(frozen=True)
class Mixed:
    """Payloads of one stack that are not of one kind, such as of unequal densities.

    own: one after another. which, place: where client k's is, int64 ``[K]`` each.
    """

    own: tuple[Payloads, ...]
    which: Tensor
    place: Tensor

    @staticmethod
    def of(own: Sequence[Payloads], index: Sequence[Tensor]) -> Mixed:
        """index: the clients of each of ``own``; together all of the stack."""
        count = sum(map(len, index))
        which, place = torch.zeros(2, count, dtype=torch.int64)
        for number, at in enumerate(index):
            which[at], place[at] = number, torch.arange(len(at))
        return Mixed(tuple(own), which, place)

    def sizes(self) -> dict[str, Tensor]:
        """See ``Coded.sizes``; 0 where a client's payload has nothing of a kind."""
        found: dict[str, Tensor] = {}
        for number, one in enumerate(self.own):
            mine = self.which == number
            for kind, length in one.sizes().items():
                found.setdefault(kind, torch.zeros_like(self.which))[mine] = length[
                    self.place[mine]
                ]
        return found

    def rows(self, index: Sequence[int]) -> Mixed:
        """See ``Coded.rows``."""
        return Mixed(self.own, self.which[list(index)], self.place[list(index)])

    def payload(self, k: int) -> bytes:
        """See ``Coded.payload``."""
        return self.own[int(self.which[k])].payload(int(self.place[k]))


@dataclass(frozen=True)
class Counted:
    """Payloads that are elsewhere: only their lengths are known."""

    lengths: Mapping[str, Tensor]

    def sizes(self) -> dict[str, Tensor]:
        """See ``Coded.sizes``."""
        return dict(self.lengths)

    def rows(self, index: Sequence[int]) -> Counted:
        """See ``Coded.rows``."""
        return Counted({kind: length[list(index)] for kind, length in self.lengths.items()})

    def payload(self, k: int) -> bytes:
        """Raises TypeError."""
        raise TypeError("only the lengths of these payloads are at hand")


def suited(codec: Codec, part: Part) -> Codec:
    """The codec of a part: DARE drops nothing of a new head, whose changes are large."""
    if codec.codec == "dare" and part.kind == "head":
        return Codec("dense", codec.values, block=codec.block, levels=codec.levels)
    return codec


def booked(schema: Schema, payload: bytes, sections: Mapping[str, np.ndarray]) -> Counted:
    """What a payload that was read costs by kind, as ``Payloads.sizes`` says it."""
    found: dict[str, int] = {"header": len(payload)}
    for key, data in sections.items():
        number, _, name = key.partition(".")
        if number == "exact":
            kind = kind_of(schema.exact[int(name)].name)
        elif key == SCHEMA:
            kind = SCHEMA
        else:
            kind = KINDS[name]
            kind = schema.parts[int(number)].kind if kind == "values" else kind
        found[kind] = found.get(kind, 0) + data.nbytes
        found["header"] -= data.nbytes
    return Counted({kind: torch.tensor([size]) for kind, size in found.items()})


def read(
    codec: Codec, sections: Mapping[str, np.ndarray], schema: Schema
) -> tuple[list[Tensor], dict[str, Tree]]:
    """One client's vectors ``[1, size]`` by part, and what no codec touched, one row.

    Raises PayloadError for sections that are not those of the schema.
    """
    groups: dict[str, dict[str, np.ndarray]] = {str(n): {} for n in range(len(schema.parts))}
    left: dict[str, np.ndarray] = {}
    for key, data in sections.items():
        number, dot, name = key.partition(".")
        if number in groups and dot:
            groups[number][name] = data
        else:
            left[key] = data
    vectors = [
        decode(suited(codec, part), groups[str(place)], part.shapes)[None]
        for place, part in enumerate(schema.parts)
    ]
    exact: dict[str, Tree] = {}
    for place, entry in enumerate(schema.exact):
        exact.setdefault(entry.tree, {})[entry.name] = _exact(left, f"exact.{place}", entry)
    if left:
        raise PayloadError(f"payload: sections {sorted(left)[:3]} do not belong there")
    return vectors, exact


def _exact(sections: dict[str, np.ndarray], key: str, entry: Entry) -> Tensor:
    data = sections.pop(key, None)
    wanted = entry.dtype.itemsize * int(np.prod(entry.shape, dtype=np.int64))
    if data is None or data.dtype != np.uint8 or data.size != wanted:
        raise PayloadError(f"payload: section {key!r} must hold {wanted} bytes")
    if entry.dtype == torch.bool and bool((data > 1).any()):
        raise PayloadError(f"payload: section {key!r} holds bytes that are no flags")
    found = torch.from_numpy(np.array(data)).view(entry.dtype)
    return found.reshape(1, *entry.shape)


def as_bytes(data: bytes) -> Tensor:
    """Bytes as a tensor, uint8 ``[length]``."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def sum_of(sizes: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes by kind, all rows together."""
    return {kind: int(length.sum()) for kind, length in sizes.items()}
