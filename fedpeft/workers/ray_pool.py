"""The pool of workers as Ray actors: a GPU each, or a share of the CPU's threads.

Ray is loaded with this module, and this module only by runs with more than one worker. Between the
run and its workers, processes of one user, Ray pickles; tensors go as numpy arrays (``wire``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from fedpeft import cluster
from fedpeft.config import Recipe
from fedpeft.errors import FedpeftError
from fedpeft.prepare import Prepared
from fedpeft.workers.pool import Pool, WorkerLost
from fedpeft.workers.wire import Common
from fedpeft.workers.worker import Digests, Done, Task, Worker

PATIENCE = 1800.0
"""Seconds in which all workers must have been placed and have loaded model and data."""


@dataclass(frozen=True)
class Needs:
    """How many workers, and what each takes of the cluster."""

    workers: int
    cpus: int
    gpus: int

    @staticmethod
    def of(prepared: Prepared) -> Needs:
        """A GPU and a core each; without GPUs, an equal share of this process's threads."""
        if prepared.network.device.type == "cuda":
            return Needs(prepared.workers, 1, 1)
        return Needs(prepared.workers, max(1, torch.get_num_threads() // prepared.workers), 0)

    def recipe(self, prepared: Prepared) -> Recipe:
        """The recipe of a worker: its own device and threads, and the run's chunk."""
        engine = dataclasses.replace(
            prepared.recipe.engine,
            chunk=prepared.chunk,
            device="cuda:0" if self.gpus else "cpu",
            threads=self.cpus,
            workers=1,
        )
        return dataclasses.replace(prepared.recipe, engine=engine)


@contextmanager
def opened(prepared: Prepared) -> Iterator[RayPool]:
    """The workers of a run, ready to train; Ray is started, or the cluster joined, as needed.

    Afterwards no worker is left, whatever happened inside. Raises FedpeftError where the cluster
    has too little for them, or a worker cannot prepare what the run has prepared.
    """
    needs = Needs.of(prepared)
    local_gpus = torch.cuda.device_count() if needs.gpus else 0
    with cluster.connected(needs.workers * needs.cpus, local_gpus, needs.cpus):
        pool = RayPool(needs.recipe(prepared), Digests.of(prepared), needs)
        try:
            pool.start()
            yield pool
        finally:
            pool.close()


class RayPool(Pool):
    """See ``fedpeft.workers.pool.Pool``; ``start`` comes first and ``close`` last."""

    def __init__(self, recipe: Recipe, digests: Digests, needs: Needs) -> None:
        self.size = needs.workers
        self._needs = needs
        self._given = recipe, digests
        self._kind = ray.remote(num_cpus=needs.cpus, num_gpus=needs.gpus)(Worker)
        self._actors: list[Any] = []

    def start(self) -> None:
        """Starts the workers and waits until all are ready."""
        lacking = self._lacking(self.size)
        if lacking:
            raise FedpeftError(
                f"engine.workers={self.size}: Ray's cluster has too little: {lacking}. Lower "
                f"engine.workers, or join a larger cluster (RAY_ADDRESS, see fedpeft.workers)."
            )
        self._actors = [self._begin() for _ in range(self.size)]
        try:
            ray.get([actor.ready.remote() for actor in self._actors], timeout=PATIENCE)
        except GetTimeoutError as error:
            raise FedpeftError(
                f"engine.workers={self.size}: not all workers were ready within {PATIENCE:g} "
                f"seconds. If others use the cluster, lower engine.workers."
            ) from error
        except RayTaskError as error:
            raise _own(error) from error
        except RayError as error:
            raise FedpeftError(
                f"engine.workers={self.size}: a worker died as it loaded model and data: "
                f"{_short(error)} If memory ran out, lower engine.workers."
            ) from error

    def put(self, common: Common) -> Any:
        return ray.put(common)

    def submit(self, worker: int, common: Any, task: Task) -> Any:
        return self._actors[worker].work.remote(common, task)

    def first(self, waiting: Sequence[Any]) -> Any:
        ready, _ = ray.wait(list(waiting), num_returns=1)
        return ready[0]

    def result(self, handle: Any) -> Done:
        try:
            found = ray.get(handle)
        except RayTaskError as error:
            raise _own(error) from error
        except RayError as error:
            raise WorkerLost(_short(error)) from error
        assert isinstance(found, Done)
        return found

    def replace(self, worker: int) -> None:
        """A fresh actor; where a node is gone and there is no room for one, the next worker."""
        ray.kill(self._actors[worker])
        if self._lacking(1 + len({*self._actors} - {self._actors[worker]})):
            self._actors[worker] = self._actors[(worker + 1) % self.size]
        else:
            self._actors[worker] = self._begin()

    def close(self) -> None:
        """Ends all workers at once."""
        for actor in self._actors:
            ray.kill(actor)

    def _begin(self) -> Any:
        return self._kind.remote(*self._given)

    def _lacking(self, workers: int) -> str:
        """What the cluster as a whole lacks for so many workers; empty if nothing."""
        has: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        wanted = {"CPU": workers * self._needs.cpus, "GPU": workers * self._needs.gpus}
        short = {kind: n for kind, n in wanted.items() if n > has.get(kind, 0)}
        return ", ".join(
            f"{n} {kind}s needed, {has.get(kind, 0):g} there" for kind, n in short.items()
        )


def _own(error: RayTaskError) -> BaseException:
    """What a worker raised: fedpeft's own errors as they were, others with their traceback."""
    return error.cause if isinstance(error.cause, FedpeftError) else error


def _short(error: RayError) -> str:
    """The last line of Ray's account: how the process ended."""
    return str(error).strip().splitlines()[-1][:300]
