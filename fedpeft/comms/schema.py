"""What a message's trees hold, and how they are laid out for a codec.

Both ends of a wire must mean the same numbers. A schema says which tensors there are; its digest
stands in every payload. A client that may not know the schema is sent it, once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fedpeft.errors import PayloadError
from fedpeft.model import kind_of
from fedpeft.tree import Tree, shared

_DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_MOST = 10_000
"""Tensors of a schema, at most."""


class Entry(NamedTuple):
    """A tensor: the name of its tree, its own, its shape and its dtype."""

    tree: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Part:
    """Tensors that a codec works on as one vector: the floating-point ones of a tree and a kind.

    kind: as in the byte ledger. entries: in the vector's order, by name, each row-major.
    """

    kind: str
    entries: tuple[Entry, ...]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The tensors' shapes."""
        return tuple(entry.shape for entry in self.entries)

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    def pack(self, trees: Mapping[str, Tree]) -> Tensor:
        """Stacked trees as float32 ``[K, size]``."""
        found = [trees[e.tree][e.name].unsqueeze(-1).flatten(1).float() for e in self.entries]
        return torch.cat(found, dim=1)

    def unpack(self, rows: Tensor) -> dict[str, Tree]:
        """The part of the stacked trees that ``pack`` was given; float32."""
        sizes = [math.prod(shape) for shape in self.shapes]
        found: dict[str, Tree] = {}
        for entry, values in zip(self.entries, rows.split(sizes, dim=1), strict=True):
            found.setdefault(entry.tree, {})[entry.name] = values.reshape(len(rows), *entry.shape)
        return found


@dataclass(frozen=True)
class Schema:
    """Names, shapes and dtypes of trees, sorted by tree and name; and trees that hold nothing."""

    entries: tuple[Entry, ...]
    empty: tuple[str, ...] = ()

    @staticmethod
    def of(trees: Mapping[str, Tree]) -> Schema:
        """Of unstacked trees."""
        return Schema(
            tuple(
                Entry(tree, name, tuple(trees[tree][name].shape), trees[tree][name].dtype)
                for tree in sorted(trees)
                for name in sorted(trees[tree])
            ),
            tuple(sorted(tree for tree, own in trees.items() if not own)),
        )

    @cached_property
    def text(self) -> bytes:
        """The schema as JSON: ``[[[tree, name, shape, dtype], ...], [empty tree, ...]]``."""
        plain = [
            [e.tree, e.name, list(e.shape), str(e.dtype).removeprefix("torch.")]
            for e in self.entries
        ]
        return json.dumps([plain, list(self.empty)], separators=(",", ":")).encode()

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits; parties with equal digests mean the same tensors."""
        return hashlib.sha256(self.text).hexdigest()[:16]

    @staticmethod
    def parse(text: bytes) -> Schema:
        """The schema of ``text``. Raises PayloadError where it is none; allocates no tensor."""
        try:
            plain, empty = json.loads(text)
            found = Schema(tuple(_entry(item) for item in plain), tuple(map(str, empty)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise PayloadError(f"the schema cannot be read: {str(error)[:100]}") from None
        if len(found.entries) > _MOST or found.text != text:
            raise PayloadError("the schema is not in its canonical form, or too long")
        if list(found.entries) != sorted(set(found.entries), key=lambda e: (e.tree, e.name)):
            raise PayloadError("the schema's tensors are not distinct and sorted")
        return found

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What codecs work on, each by itself; sorted by tree and kind."""
        found: dict[tuple[str, str], list[Entry]] = {}
        for entry in self.entries:
            if entry.dtype.is_floating_point:
                found.setdefault((entry.tree, kind_of(entry.name)), []).append(entry)
        return tuple(Part(key[1], tuple(found[key])) for key in sorted(found))

    @cached_property
    def exact(self) -> tuple[Entry, ...]:
        """Whole numbers and flags, which travel as they are."""
        return tuple(e for e in self.entries if not e.dtype.is_floating_point)

    def untouched(self, trees: Mapping[str, Tree]) -> dict[str, Tree]:
        """Of stacked trees, what travels as it is."""
        kept: dict[str, Tree] = {}
        for entry in self.exact:
            kept.setdefault(entry.tree, {})[entry.name] = trees[entry.tree][entry.name]
        return kept

    @property
    def dense(self) -> int:
        """Bytes of all numbers as they are."""
        return sum(math.prod(e.shape) * e.dtype.itemsize for e in self.entries)

    def join(self, vectors: Sequence[Tensor], exact: Mapping[str, Tree]) -> dict[str, Tree]:
        """Stacked trees from the parts' rows ``[K, size]``; floats are float32 still."""
        found: dict[str, Tree] = {entry.tree: {} for entry in self.entries}
        found |= {tree: {} for tree in self.empty}
        whole = [part.unpack(rows) for part, rows in zip(self.parts, vectors, strict=True)]
        for trees in [*whole, exact]:
            for tree, own in trees.items():
                found[tree].update(own)
        return {tree: {name: own[name] for name in sorted(own)} for tree, own in found.items()}


def found(entry: Entry, trees: Mapping[str, Tree]) -> Tensor | None:
    """The stacked tensor of that place in ``trees``, if there is one of that shape."""
    value = trees.get(entry.tree, {}).get(entry.name)
    return value if value is not None and value.shape[1:] == entry.shape else None


def start(part: Part, before: Mapping[str, Tree]) -> Tensor:
    """What an update of the part is relative to, float32: one row where all are alike.

    Where ``before`` holds nothing like it, zero: the number itself is the update.
    """
    values = [found(entry, before) for entry in part.entries]
    count = max((1 if shared(v) else len(v) for v in values if v is not None), default=1)
    device = next((v.device for v in values if v is not None), None)
    rows = [
        torch.zeros(count, math.prod(entry.shape), device=device)
        if value is None
        else value[:count].unsqueeze(-1).flatten(1).float().expand(count, -1)
        for entry, value in zip(part.entries, values, strict=True)
    ]
    return torch.cat(rows, dim=1)


def applied(
    schema: Schema,
    moved: Sequence[Tensor],
    before: Mapping[str, Tree],
    exact: Mapping[str, Tree],
) -> dict[str, Tree]:
    """Stacked trees from the parts' updates ``[K, size]``, in the schema's dtypes."""
    rows = [start(p, before).to(v.device) + v for p, v in zip(schema.parts, moved, strict=True)]
    trees = schema.join(rows, exact)
    for entry in schema.entries:
        trees[entry.tree][entry.name] = trees[entry.tree][entry.name].to(entry.dtype)
    return trees


def _entry(item: list[object]) -> Entry:
    tree, name, shape, dtype = item
    if not (isinstance(tree, str) and isinstance(name, str) and isinstance(shape, list)):
        raise ValueError(f"no tensor: {item!r}")
    if any(type(n) is not int or not 0 <= n < 2**31 for n in shape) or len(shape) > 8:
        raise ValueError(f"no shape: {shape!r}")
    return Entry(tree, name, tuple(shape), _DTYPES[str(dtype)])
