"""What a run trains and is measured on: tokenised examples, divided among named clients.

The clients of a run are a few flat arrays, in memory or mapped from a file; the data of one client
are looked up when that client is trained. So a million of them cost what their arrays cost.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, overload

import numpy as np

from fedpeft.data.examples import Examples
from fedpeft.errors import FedpeftError
from fedpeft.names import Names, Roster

Task = Literal["classification", "causal_lm"]


@dataclass(frozen=True)
class ClientData:
    """One client's private data, as example numbers into ``Population.examples``.

    train: int64 ``[n]``, at least one. holdout: int64 ``[h]``, the client's own test examples, kept
    out of training, may be empty.
    """

    name: str
    train: np.ndarray
    holdout: np.ndarray


@dataclass(frozen=True)
class Pieces:
    """N vectors of example numbers, one behind another.

    values: int64 ``[total]``. starts: int64 ``[N + 1]``; vector i is
    ``values[starts[i]:starts[i+1]]``.
    """

    values: np.ndarray
    starts: np.ndarray

    @staticmethod
    def of(vectors: Sequence[np.ndarray]) -> Pieces:
        """The given vectors, copied."""
        starts = np.cumsum([0, *map(len, vectors)], dtype=np.int64)
        return Pieces(np.concatenate([np.empty(0, np.int64), *vectors]), starts)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.starts[i] : self.starts[i + 1]]


class Clients(Sequence[ClientData]):
    """The registered clients by name, ascending; a ClientData is made when it is asked for.

    train, holdout: the clients' example numbers. below: for arrays that come from a file, how many
    examples there are; numbers are then checked as they are read, and FedpeftError is raised where
    one is out of range.
    """

    def __init__(
        self, names: Names, train: Pieces, holdout: Pieces, below: int | None = None
    ) -> None:
        self.names = names
        self.train = train
        self.holdout = holdout
        self._below = below

    @staticmethod
    def of(clients: Iterable[ClientData]) -> Clients:
        """The given clients in the order of their names. Raises ValueError for a name twice."""
        found = sorted(clients, key=lambda client: client.name)
        return Clients(
            Names.of(client.name for client in found),
            Pieces.of([client.train for client in found]),
            Pieces.of([client.holdout for client in found]),
        )

    @cached_property
    def roster(self) -> Roster:
        """Client -> number of training examples."""
        return Roster(self.names, np.diff(self.train.starts))

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, at: int) -> ClientData: ...

    @overload
    def __getitem__(self, at: slice) -> Clients: ...

    def __getitem__(self, at: int | slice) -> ClientData | Clients:
        if isinstance(at, slice):
            return Clients.of(self[i] for i in range(*at.indices(len(self))))
        name, k = self.names[at], at % len(self)
        client = ClientData(name, self.train[k], self.holdout[k])
        if self._below is not None:
            _check(client, self._below)
        return client

    def find(self, name: str) -> ClientData:
        """The client of that name. Raises FedpeftError where there is none."""
        at = self.names.find(name)
        if at < 0:
            raise FedpeftError(
                f"client {name!r} is not registered: use one of the {len(self)} names of the "
                f"population, from {self.names[0]!r} to {self.names[-1]!r}."
            )
        return self[at]


def _check(client: ClientData, below: int) -> None:
    for numbers in (client.train, client.holdout):
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < below:
            raise FedpeftError(
                f"client {client.name!r} has the example number {numbers.min()} or "
                f"{numbers.max()}, numbers must be from 0 to {below - 1}: its store is corrupt, "
                "write it again."
            )


@dataclass(frozen=True)
class Population:
    """All clients of a run and the global test set.

    examples: what the clients hold. test: the global test set (the source's own test split, or the
    union of the clients' hold-outs). labels: class names, empty for causal language modelling.
    fingerprint: a SHA-256 over all data here: equal fingerprints, equal data. files: those that
    the arrays are views of, if they are. public: what the server owns and need not protect.
    """

    task: Task
    clients: Clients
    examples: Examples
    test: Examples
    labels: tuple[str, ...]
    fingerprint: str
    files: tuple[mmap.mmap, ...] = ()
    public: Examples | None = None

    def release(self) -> None:
        """Lets go of the pages of the files that were read; they are mapped again when needed.

        So what is resident does not grow towards the whole files, cohort after cohort.
        """
        if sys.platform == "linux":
            for file in self.files:
                file.madvise(mmap.MADV_DONTNEED)
