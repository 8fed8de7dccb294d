"""A pool in this process: the real Worker, what crosses is pickled, last in is first out."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from fedpeft.prepare import Prepared
from fedpeft.workers.pool import Pool, WorkerLost
from fedpeft.workers.wire import Common
from fedpeft.workers.worker import Digests, Done, Task, Worker


class FakePool(Pool):
    """``size`` workers that share what ``prepared`` holds, each with memory of its own.

    deaths: how often each worker still dies on the task it is given.
    """

    def __init__(self, prepared: Prepared, size: int, deaths: Sequence[int] = ()) -> None:
        self.size = size
        self.deaths = [*deaths, *[0] * (size - len(deaths))]
        self.sent: list[bytes] = []
        self.replaced: list[int] = []
        self.order: list[int] = []
        self._prepared = prepared
        self._workers = [self._fresh() for _ in range(size)]
        self._tasks: list[tuple[int, bytes, bytes]] = []

    def _fresh(self) -> Worker:
        worker = Worker(self._prepared.recipe, Digests.of(self._prepared))
        worker._prepared = self._prepared, self._prepared.federation()
        return worker

    def put(self, common: Common) -> Any:
        self.sent.append(pickle.dumps(common))
        return self.sent[-1]

    def submit(self, worker: int, common: Any, task: Task) -> Any:
        self.sent.append(pickle.dumps(task))
        self._tasks.append((worker, common, self.sent[-1]))
        return len(self._tasks) - 1

    def first(self, waiting: Sequence[Any]) -> Any:
        return waiting[-1]

    def result(self, handle: Any) -> Done:
        worker, common, task = self._tasks[handle]
        if self.deaths[worker]:
            self.deaths[worker] -= 1
            raise WorkerLost("killed")
        self.order.append(worker)
        done = self._workers[worker].work(pickle.loads(common), pickle.loads(task))
        found = pickle.loads(pickle.dumps(done))
        assert isinstance(found, Done)
        return found

    def replace(self, worker: int) -> None:
        self.replaced.append(worker)
        self._workers[worker] = self._fresh()
