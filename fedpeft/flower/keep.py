"""What a client keeps between rounds: in the site's state on disk, or in Flower's context.

With node config ``state=DIR`` it is on disk (``fedpeft.site.state``) before an answer leaves, and
goes by the round that is asked for; without, and in simulations, it is in Flower's context, which
ends with the node.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import final

from flwr.app import ArrayRecord, RecordDict

from fedpeft.config import Output
from fedpeft.flower.node import Node
from fedpeft.flower.records import Header, decode_tree, encode_tree
from fedpeft.site.state import Store, locked
from fedpeft.tree import Tree

_MEMORY = "memory."


class Memory(ABC):
    """A client's memory for the length of one request."""

    @abstractmethod
    def recall(self) -> dict[str, Tree]:
        """Name -> tree."""

    @abstractmethod
    def kept(self) -> bool:
        """Whether anything was ever kept, of this run where that is known."""

    @abstractmethod
    def remember(self, memory: Mapping[str, Tree]) -> None:
        """Keeps these trees; others stay as they are."""

    @abstractmethod
    def redo(self) -> None:
        """The request's exchange is trained now, whether or not it was before."""

    @abstractmethod
    def save(self, output: Output) -> None:
        """Called before the answer leaves. output: of the recipe, for when the server saves."""


@final
class ContextMemory(Memory):
    """In Flower's context, which Flower keeps."""

    def __init__(self, state: RecordDict) -> None:
        self._state = state

    def recall(self) -> dict[str, Tree]:
        return recall(self._state)

    def kept(self) -> bool:
        return bool(self.recall())

    def remember(self, memory: Mapping[str, Tree]) -> None:
        remember(self._state, memory)

    def redo(self) -> None:
        pass

    def save(self, output: Output) -> None:
        pass


@final
class SavedMemory(Memory):
    """On the site's disk, as of the request's round and exchange.

    trains: whether the request is one for training; else it is for after the round. A request that
    fails leaves what was there before.
    """

    def __init__(self, store: Store, own: Header, trains: bool) -> None:
        self._store = store
        self._at = own.round, own.exchange
        self._trains = trains
        self._memory: dict[str, Tree] | None = None
        self._changed = False

    def recall(self) -> dict[str, Tree]:
        if self._memory is None:
            kept = self._store
            self._memory = kept.before(self._at) if self._trains else kept.after(self._at[0])
        return dict(self._memory)

    def kept(self) -> bool:
        return self._store.begun()

    def remember(self, memory: Mapping[str, Tree]) -> None:
        if memory:
            self._memory = {**self.recall(), **memory}
            self._changed = True

    def redo(self) -> None:
        """Versions of this exchange and later ones are of another course of the run."""
        self.recall()
        self._store.discard_from(self._at)

    def save(self, output: Output) -> None:
        if self._changed:
            self._store.save(self._at, self.recall(), output.checkpoint_every, output.keep)


@contextmanager
def memory_of(node: Node, own: Header, trains: bool) -> Iterator[Memory]:
    """What the node's client keeps, for one request; no other process has it meanwhile."""
    folder = node.config.get("state")
    if node.simulated or not folder or not own.run:
        yield ContextMemory(node.state)
        return
    path = Path(str(folder))
    with locked(path):
        yield SavedMemory(Store(path, own.run, own.client), own, trains)


def recall(state: RecordDict) -> dict[str, Tree]:
    """The client's private memory in Flower's context, name -> tree."""
    return {
        key.removeprefix(_MEMORY): decode_tree(record, key)
        for key, record in state.items()
        if key.startswith(_MEMORY) and isinstance(record, ArrayRecord)
    }


def remember(state: RecordDict, memory: Mapping[str, Tree]) -> None:
    """Writes the client's private memory into Flower's context."""
    for name, tree in memory.items():
        state[f"{_MEMORY}{name}"] = encode_tree(tree)
