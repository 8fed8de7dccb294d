"""What a cohort's numbers became: sections of bytes by name, their sizes, and the numbers restored.

A payload's sections are flat arrays of bytes, little-endian whatever the machine. Which of them a
client's payload has tells how it was written; a section's name tells what it costs are booked as.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from fedpeft import philox
from fedpeft.errors import PayloadError

Shapes = tuple[tuple[int, ...], ...]

KINDS = {
    "values": "values",  # the numbers that are sent, one after another
    "dense": "values",  # all numbers, where that is smaller than saying which
    "gamma": "values",  # levels and the gaps between them, Elias-gamma
    "signs": "values",
    "trits": "values",
    "left": "values",  # powersgd's factors
    "right": "values",
    "scale": "scale",
    "seed": "seed",
    "bitmask": "mask",
    "golomb": "index",
    "varint": "index",
    "coo": "index",
    "count": "index",
}
"""Section -> what its bytes are booked as: ``values``, ``scale``, ``seed``, ``mask``, ``index``."""

LARGEST = 2.0**96
"""Numbers of this magnitude or more are refused, so that no product of a few overflows."""

ROUNDING = 1
"""The seeds' stream that values are rounded with."""
PLACES = 2
"""The seeds' stream that says which numbers are kept."""

_BLOCKS = 1 << 15
"""Blocks of four words that are drawn at once."""


class Part(ABC):
    """Some sections of K clients."""

    @abstractmethod
    def lengths(self) -> dict[str, Tensor]:
        """Section -> bytes, int64 ``[K]`` on the device; -1 for a client who has no such one."""

    @abstractmethod
    def arrays(self, k: int) -> dict[str, np.ndarray]:
        """Client k's sections, uint8."""

    @abstractmethod
    def rows(self, index: Tensor) -> Part:
        """The same of the clients in ``index``, int64 on the device."""


@dataclass(frozen=True)
class Symbols:
    """What a cohort sends: its sections, and ``matrix``, what their receiver makes of them.

    matrix: float32 ``[K, d]``.
    """

    parts: tuple[Part, ...]
    matrix: Tensor

    def restored(self) -> Tensor:
        """Float32 ``[K, d]``, bit for bit what ``decode`` gives for each client."""
        return self.matrix

    def lengths(self) -> dict[str, Tensor]:
        """Section -> bytes, int64 ``[K]``; -1 for a client whose payload has no such section."""
        return {name: size for part in self.parts for name, size in part.lengths().items()}

    def bytes(self) -> dict[str, Tensor]:
        """Bytes by kind (see KINDS), int64 ``[K]``: exactly those of the sections."""
        found: dict[str, Tensor] = {}
        for name, length in self.lengths().items():
            kind, size = KINDS[name], length.clamp(min=0)
            found[kind] = found[kind] + size if kind in found else size
        return found

    def arrays(self, k: int) -> dict[str, np.ndarray]:
        """Client k's sections, uint8 ``[bytes]`` each."""
        return {name: data for part in self.parts for name, data in part.arrays(k).items()}

    def rows(self, index: Tensor) -> Symbols:
        """The same of the clients in ``index``, int64."""
        where = index.to(self.matrix.device)
        return Symbols(tuple(part.rows(where) for part in self.parts), self.matrix[where])


@dataclass(frozen=True)
class Raw(Part):
    """One section whose bytes lie ready: uint8 ``[K, most]``, of which ``sizes[k]`` count."""

    name: str
    data: Tensor
    sizes: Tensor

    @staticmethod
    def of(name: str, values: Tensor, counts: Tensor | None = None) -> Raw:
        """The bytes of values ``[K, n]``, of which the first ``counts[k]`` are client k's.

        A count of -1 says that the client has no such section.
        """
        each = values.element_size()
        data = values.contiguous().view(torch.uint8) if values.numel() else _nothing(values)
        if counts is None:
            sizes = data.new_full((len(data),), each * values.shape[1], dtype=torch.int64)
        else:
            sizes = torch.where(counts < 0, -1, counts * each)
        return Raw(name, data, sizes)

    def lengths(self) -> dict[str, Tensor]:
        return {self.name: self.sizes}

    def arrays(self, k: int) -> dict[str, np.ndarray]:
        size = int(self.sizes[k])
        return {} if size < 0 else {self.name: self.data[k, :size].cpu().numpy()}

    def rows(self, index: Tensor) -> Raw:
        return Raw(self.name, self.data[index], self.sizes[index])


def _nothing(values: Tensor) -> Tensor:
    return torch.empty(len(values), 0, dtype=torch.uint8, device=values.device)


class Sections:
    """One client's sections, as they are taken; every fault is a PayloadError that names one."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._left = dict(arrays)

    def has(self, name: str) -> bool:
        """Whether there is such a section."""
        return name in self._left

    def take(self, name: str, size: int | None = None) -> np.ndarray:
        """A section's bytes, uint8 ``[size]``."""
        if name not in self._left:
            raise PayloadError(f"payload: section {name!r} is missing")
        data = self._left.pop(name)
        if data.dtype != np.uint8 or data.ndim != 1:
            raise PayloadError(
                f"payload: section {name!r} is {data.dtype} of {data.ndim} dimensions, not bytes"
            )
        if size is not None and len(data) != size:
            raise PayloadError(f"payload: section {name!r} has {len(data)} bytes, not {size}")
        return data

    def numbers(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        """A section as ``count`` finite numbers of a float type, float32 ``[count]``."""
        data = self.take(name, count * dtype.itemsize)
        found = torch.from_numpy(np.array(data)).view(dtype) if count else torch.empty(0)
        found = found.float()
        if not bool(found.isfinite().all()):
            raise PayloadError(f"payload: section {name!r} has NaN or Inf")
        return found

    def end(self) -> None:
        """Refuses what was not asked for."""
        if self._left:
            raise PayloadError(f"payload: sections {sorted(self._left)[:3]} do not belong there")


def size_of(shapes: Shapes) -> int:
    """d: numbers in all tensors."""
    return sum(math.prod(shape) for shape in shapes)


def share(density: float, size: int) -> Fraction:
    """density * size as its decimals say, so that 0.29 * 100 is 29."""
    return Fraction(str(density)) * size


def encodable(matrix: Tensor) -> Tensor:
    """Which rows can be encoded, bool ``[K]``: no NaN or Inf, all numbers below LARGEST."""
    if not matrix.shape[1]:
        return matrix.new_ones(len(matrix), dtype=torch.bool)
    least, most = matrix.aminmax(dim=1)
    return (least > -LARGEST) & (most < LARGEST)


def count_true(flags: Tensor) -> Tensor:
    """How many are true in each row of ``[K, n]``, int64 ``[K]``."""
    return flags.sum(dim=1, dtype=torch.int32).long()  # int64 sums take twenty times as long


def words(seeds: Tensor, stream: int, count: int) -> Iterator[Tensor]:
    """The first ``count`` words of every seed's stream in parts ``[K, some]``; see philox.words.

    As many at once as are computed at once, so that they can be made smaller in the cache.
    """
    step = 4 * max(1, _BLOCKS // max(1, len(seeds)))
    for first in range(0, max(1, count), step):
        yield philox.words(seeds, stream, min(step, count - first), first)


def check_rows(matrix: Tensor, shapes: Shapes, seeds: Tensor) -> None:
    """Whether encode can take these; see there for what it raises."""
    if matrix.dtype != torch.float32 or matrix.ndim != 2 or matrix.shape[1] != size_of(shapes):
        raise ValueError(
            f"a matrix of {tuple(matrix.shape)} {matrix.dtype}: expected float32 "
            f"[K, {size_of(shapes)}], as the shapes say"
        )
    if seeds.shape != matrix.shape[:1] or seeds.dtype != torch.int64:
        raise ValueError(f"seeds of {tuple(seeds.shape)} {seeds.dtype}: expected int64 [K]")
    fine = encodable(matrix)
    if not bool(fine.all()):
        rows = (~fine).nonzero()[:, 0].tolist()
        raise PayloadError(
            f"clients in rows {rows[:10]} have numbers that are NaN, Inf or beyond 2^96: nothing "
            f"can be sent for them. Leave them out."
        )
