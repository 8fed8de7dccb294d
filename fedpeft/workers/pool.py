"""A pool of workers: who does which shard, and what happens when one dies.

Shards are handed out at once and their results read in the shards' order: which worker is first,
or whether one had to be replaced, changes nothing in the result.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from fedpeft.workers.wire import Common
from fedpeft.workers.worker import Done, Task

log = logging.getLogger(__name__)

RETRIES = 2
"""How often a shard is begun again after its worker died."""


class WorkerLost(Exception):
    """A worker died, or its result was lost with it; the text says how."""


class Pool(Protocol):
    """``size`` workers, numbered from 0. Handles (of results, of what is shared) are opaque."""

    size: int

    def put(self, common: Common) -> Any:
        """Makes ``common`` known to all workers; it goes when the handle goes."""

    def submit(self, worker: int, common: Any, task: Task) -> Any:
        """Queues a task; returns at once."""

    def first(self, waiting: Sequence[Any]) -> Any:
        """Waits until one of the tasks is done; of several, any."""

    def result(self, handle: Any) -> Done:
        """The result of a task that is done. Raises WorkerLost, or what the worker raised."""

    def replace(self, worker: int) -> None:
        """Puts a fresh worker in the place of one that died."""


def play(pool: Pool, common: Common, tasks: Sequence[Task]) -> Iterator[Done | WorkerLost]:
    """Each task's result in their order; WorkerLost where every try ended so.

    At most as many tasks as workers: task i goes to worker i.
    """
    shared = pool.put(common)
    waiting = {i: pool.submit(i, shared, task) for i, task in enumerate(tasks)}
    tries = [1] * len(tasks)
    done: dict[int, Done | WorkerLost] = {}
    for due in range(len(tasks)):
        while due not in done:
            handle = pool.first(list(waiting.values()))
            (i,) = [i for i, other in waiting.items() if other == handle]
            del waiting[i]
            try:
                done[i] = pool.result(handle)
            except WorkerLost as error:
                log.warning("worker %d died on %s, try %d: %s", i, tasks[i].name, tries[i], error)
                pool.replace(i)
                if tries[i] > RETRIES:
                    done[i] = error
                    continue
                tries[i] += 1
                waiting[i] = pool.submit(i, shared, tasks[i])
        yield done.pop(due)
