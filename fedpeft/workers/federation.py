"""WorkersFederation: a round's clients divided over several processes, one base model each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from fedpeft.cohort.clients import Memory
from fedpeft.federation import Failure, Partial
from fedpeft.metrics import Score
from fedpeft.prepare import Prepared
from fedpeft.strategy import Messages
from fedpeft.tree import Tree
from fedpeft.workers.pool import RETRIES, Pool, WorkerLost, play
from fedpeft.workers.shards import divide
from fedpeft.workers.wire import (
    Parcel,
    pack_memory,
    pack_messages,
    split,
    unpack_memory,
    unpack_messages,
)
from fedpeft.workers.worker import Averaged, Item, Kind, Task

Shard = tuple[tuple[str, ...], list[Item]]
"""A shard's clients and what came of them."""

_NOTHING: Mapping[str, np.ndarray] = {}


class WorkersFederation:
    """The clients of ``prepared``, trained by a pool; see ``fedpeft.federation.Federation``.

    The result is that of one process up to the rounding of float32, and the same bits for the same
    number of workers. (With dropout the draws depend on who shares a chunk, so on the number of
    workers too.) What clients keep is kept here; strategies that need it get it with each shard.
    Replies of strategies that are not linear come back whole.

    on_chunk: called after each shard with (clients done in it, tokens trained in it).
    """

    def __init__(
        self, prepared: Prepared, pool: Pool, on_chunk: Callable[[int, int], None] | None = None
    ) -> None:
        self._pool = pool
        self._keeps = prepared.remembers
        self._own = prepared.federation()
        self._on_chunk = on_chunk
        self._memory: Memory = {}

    def clients(self) -> Mapping[str, int]:
        """Client -> number of training examples, sorted by name."""
        return self._own.clients()

    def run(self, round: int, *stacks: Messages) -> Iterator[Messages | Failure | Partial]:
        """Trains the clients; shard by shard, one Partial for linear strategies, else stacks."""
        for shard, items in self._play("train", round, stacks):
            for item in items:
                if isinstance(item, Averaged):
                    replies = unpack_messages(item.replies)
                    yield Partial(replies, item.clients, item.up, item.excluded, item.zeros)
                elif isinstance(item, Parcel):
                    yield unpack_messages(item)
                elif isinstance(item, Failure):
                    yield item
            if self._on_chunk is not None:
                self._on_chunk(len(shard), sum(self._own.tokens(name) for name in shard))

    def evaluate(self, round: int, *stacks: Messages) -> Iterator[dict[str, Score] | Failure]:
        """Scores on the clients' own hold-outs, shard by shard."""
        yield from self._scores(self._play("holdout", round, stacks))

    def evaluate_test(
        self, round: int, index: Mapping[str, np.ndarray], *stacks: Messages
    ) -> Iterator[dict[str, Score] | Failure]:
        """As ``evaluate``, but on examples of the test set: ``index`` has each client's."""
        yield from self._scores(self._play("test", round, stacks, index))

    def memory(self) -> Memory:
        """Private memory of all clients, as of now."""
        return dict(self._memory)

    def restore(self, memory: Mapping[str, Mapping[str, Tree]]) -> None:
        """Puts back what ``memory`` gave."""
        self._memory = {client: dict(kept) for client, kept in memory.items()}

    @staticmethod
    def _scores(shards: Iterator[Shard]) -> Iterator[dict[str, Score] | Failure]:
        for _, items in shards:
            yield from (item for item in items if isinstance(item, dict | Failure))

    def _play(
        self,
        kind: Kind,
        round: int,
        stacks: Sequence[Messages],
        index: Mapping[str, np.ndarray] = _NOTHING,
    ) -> Iterator[Shard]:
        """The shards' clients and what came of them, stack by stack in the order of the shards."""
        for messages in stacks:
            yield from self._play_one(kind, round, messages, index)

    def _play_one(
        self, kind: Kind, round: int, messages: Messages, index: Mapping[str, np.ndarray]
    ) -> Iterator[Shard]:
        names = messages.clients
        shards = divide(names, [self._own.tokens(name) for name in names], self._pool.size)
        common, own = split(messages)
        tasks = []
        for number, shard in enumerate(shards):
            part = own.rows(shard)
            kept = {n: self._memory[n] for n in part.clients if n in self._memory}
            memory = pack_memory(kept) if self._keeps else {}
            name = f"shard {number}"
            tested = {n: index[n] for n in part.clients if n in index}
            tasks.append(Task(kind, name, round, pack_messages(part), memory, tested))
        for task, done in zip(tasks, play(self._pool, common, tasks), strict=True):
            clients = task.own.clients
            if isinstance(done, WorkerLost):
                yield clients, [Failure(client, _lost(done)) for client in clients]
                continue
            self._memory.update(unpack_memory(done.memory))
            yield clients, done.items


def _lost(error: WorkerLost) -> str:
    return (
        f"its worker died {RETRIES + 1} times in a row: {error}. If memory ran out, lower "
        f"engine.chunk or engine.workers."
    )
