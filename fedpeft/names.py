"""Client names, and numbers by name, in flat arrays: a million of them are no Python objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import overload

import numpy as np


class Names(Sequence[str]):
    """N distinct names in ascending order; a string is made when it is read.

    text: uint8 ``[total]``, the names in UTF-8 one behind another (UTF-8 sorts as Python's strings
    do). starts: int64 ``[N + 1]``. Looking a name up takes log2 N steps.
    """

    def __init__(self, text: np.ndarray, starts: np.ndarray) -> None:
        self.text = text
        self.starts = starts

    @staticmethod
    def of(names: Iterable[str]) -> Names:
        """The given names. Raises ValueError unless they are distinct and ascending."""
        encoded = [name.encode() for name in names]
        for before, after in pairwise(encoded):
            if before >= after:
                raise ValueError(f"names must be distinct and ascending: {before!r}, {after!r}")
        starts = np.cumsum([0, *(len(name) for name in encoded)], dtype=np.int64)
        return Names(np.frombuffer(b"".join(encoded), np.uint8), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, at: int) -> str: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[str, ...]: ...

    def __getitem__(self, at: int | slice) -> str | tuple[str, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        if not -len(self) <= at < len(self):
            raise IndexError(f"there are {len(self)} names, none is number {at}")
        k = at % len(self)
        return self.text[self.starts[k] : self.starts[k + 1]].tobytes().decode()

    def find(self, name: str) -> int:
        """The number of a name, -1 where it is none of them."""
        wanted = name.encode("utf-8", "surrogatepass")  # any string may be asked for
        text, item = self.text.data, self.starts.item
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            found = bytes(text[item(middle) : item(middle + 1)])
            if found == wanted:
                return middle
            low, high = (middle + 1, high) if found < wanted else (low, middle)
        return -1

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.find(name) >= 0


class Roster(Mapping[str, int]):
    """A number for each name, in the order of the names. numbers: int64 ``[N]``."""

    def __init__(self, names: Names, numbers: np.ndarray) -> None:
        self.names = names
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> int:
        at = self.names.find(name)
        if at < 0:
            raise KeyError(name)
        return int(self.numbers[at])
