"""Payloads: a stack's trees as a codec made them, counted without writing them, or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedpeft.codecs import Codec, Symbols, decode, wire
from fedpeft.comms.schema import Schema
from fedpeft.errors import PayloadError
from fedpeft.model import kind_of
from fedpeft.tree import Tree, rows

_SCHEMA = "schema"
_SLACK = 1 << 16
"""Bytes that a payload may have beyond twice its numbers as they are."""


@dataclass(frozen=True)
class Payloads:
    """One payload per client; see ``fedpeft.message.Coded``.

    header: all have it in common. parts: what became of the schema's parts. exact: stacked, what no
    codec touches. told: whether the schema itself is in the payload.
    """

    header: wire.Header
    schema: Schema
    parts: tuple[Symbols, ...]
    exact: Mapping[str, Tree]
    told: bool = False

    def sizes(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def add(kind: str, length: Tensor) -> None:
            found[kind] = found[kind] + length if kind in found else length

        for part, symbols in zip(self.schema.parts, self.parts, strict=True):
            for kind, length in symbols.sizes().items():
                add(part.kind if kind == "values" else kind, length.cpu())
        count = len(next(iter(found.values()))) if found else self._rows()
        for entry in self.schema.exact:
            value = self.exact[entry.tree][entry.name]
            size = value[0].numel() * value.element_size()
            add(kind_of(entry.name), torch.full((count,), size))
        if self.told:
            add("schema", torch.full((count,), len(self.schema.text)))
        add("header", wire.overhead(self._sections(), count))
        return found

    def rows(self, index: Sequence[int]) -> Payloads:
        return replace(
            self,
            parts=tuple(symbols.rows(index) for symbols in self.parts),
            exact={tree: rows(own, index) for tree, own in self.exact.items()},
        )

    def payload(self, k: int) -> bytes:
        arrays: dict[str, Tensor] = {}
        for number, symbols in enumerate(self.parts):
            arrays |= {f"{number}.{name}": value for name, value in symbols.arrays(k).items()}
        for number, entry in enumerate(self.schema.exact):
            arrays[f"e{number}"] = self.exact[entry.tree][entry.name][k].cpu()
        if self.told:
            arrays[_SCHEMA] = torch.frombuffer(bytearray(self.schema.text), dtype=torch.uint8)
        return wire.write(self.header, arrays)
