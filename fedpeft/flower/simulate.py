"""A run on Flower's simulation runtime: one node per client, actors of Ray that train them.

Flower starts the simulation; the run itself stays in the caller's thread, so that its errors,
Ctrl-C and result are the caller's own. Flower 1.41 deprecates this entry point in favour of a
daemon that never runs in the caller's process; until there is another, this is the one place to
mend.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from queue import Empty, Queue
from typing import Any, TypeVar

import ray
import torch
from flwr.app import Context
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.server.superlink.fleet.vce.backend.backend import BackendConfig
from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from flwr.supercore import telemetry

from fedpeft import cluster
from fedpeft.config import Recipe
from fedpeft.errors import FedpeftError
from fedpeft.flower.backend import ReplacingBackend
from fedpeft.flower.client_app import simulated
from fedpeft.flower.courier import Patience
from fedpeft.flower.digests import Digests
from fedpeft.flower.federation import FlowerFederation

T = TypeVar("T")

GRACE = 3.0
"""Seconds that clients who still train at the end of a run (an error, Ctrl-C) may go on."""


@dataclass(frozen=True)
class Shares:
    """How a machine is divided: actors, and CPU cores and GPUs for each."""

    actors: int
    cpus: int
    gpus: float


def divide(recipe: Recipe, nodes: int, workers: int) -> Shares:
    """The machine's cores and GPUs in equal parts: ``workers`` of them, or (0) one per core."""
    cores = _cores()
    actors = min(workers or cores, nodes)
    gpus = 0 if recipe.engine.device == "cpu" else torch.cuda.device_count()
    return Shares(actors, max(1, cores // actors), int(1e4 * gpus / actors) / 1e4)


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def run_in_simulation(
    recipe: Recipe,
    nodes: int,
    workers: int,
    body: Callable[[FlowerFederation], T],
    digests: Digests | None = None,
    patience: Patience | None = None,
) -> T:
    """What ``body`` returns, given the federation of the recipe's clients on simulated nodes.

    nodes: the number of clients. workers: clients that train at the same time (0: one per CPU
    core). digests, patience: as in FlowerFederation; a client that takes longer than its reply may
    is killed. Exceptions of ``body`` come through. Whatever happens, no process is left behind.
    """
    if ray.is_initialized():
        raise FedpeftError(
            "engine.kind=flower starts Ray itself, but Ray is running in this process: call "
            "ray.shutdown() first."
        )
    patience = patience or Patience()
    simulation = _Simulation(divide(recipe, nodes, workers), nodes, patience.reply)
    with _quiet(simulation):
        try:
            grid = simulation.start()
            check = simulation.check
            return body(FlowerFederation(grid, recipe, nodes, digests, patience, alive=check))
        finally:
            simulation.stop()


class _Simulation:
    """Flower's simulation in a thread of its own; it lives from ``start`` to ``stop``."""

    def __init__(self, shares: Shares, nodes: int, seconds: float) -> None:
        self._shares = shares
        self._nodes = nodes
        self._seconds = seconds  # that a client may take
        self._grid: Queue[Grid] = Queue()
        self._over = threading.Event()
        self._crash: BaseException | None = None
        self._thread = threading.Thread(target=self._simulate, name="flower-simulation")

    @property
    def over(self) -> bool:
        """Whether the run has ended, and errors are of no more interest."""
        return self._over.is_set()

    def start(self) -> Grid:
        """Starts Ray and Flower; returns the grid of the nodes."""
        cluster.start(self._shares.actors * self._shares.cpus, None, self._shares.cpus)
        self._thread.start()
        while True:
            self.check()
            try:
                return self._grid.get(timeout=0.1)
            except Empty:
                continue

    def check(self) -> None:
        """Raises FedpeftError if the simulation has died."""
        if not self._thread.is_alive():
            raise FedpeftError(
                f"Flower's simulation ended before the run did: {self._crash!r}. Lower "
                f"engine.workers if memory ran out, or use engine.kind=cohort."
            )

    def stop(self) -> None:
        """Ends the simulation and Ray; clients that still train after ``GRACE`` are cut short."""
        self._over.set()
        try:
            if self._thread.ident is not None:
                self._thread.join(GRACE)
        finally:
            with redirect_stdout(io.StringIO()):  # Ray reports each death there
                while self._thread.is_alive():
                    for process in cluster.processes("ray::ClientAppActor"):
                        process.kill()
                    self._thread.join(1.0)
            cluster.stop()

    def _simulate(self) -> None:
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            self._grid.put(grid)
            self._over.wait()

        config: BackendConfig = {
            "client_resources": {"num_cpus": self._shares.cpus, "num_gpus": self._shares.gpus}
        }
        # Flower looks its backend up under this name, and has no other place to give one.
        raybackend.RayBackend = partial(  # type: ignore[misc,assignment]
            ReplacingBackend, seconds=self._seconds, over=self._over
        )
        try:
            run_simulation(server, simulated, self._nodes, backend_config=config)
        except BaseException as error:
            self._crash = error
        finally:
            raybackend.RayBackend = RayBackend  # type: ignore[misc]


@contextmanager
def _quiet(simulation: _Simulation) -> Iterator[None]:
    """No telemetry of Flower's from now on; of its log only warnings and errors that matter."""

    def worth_showing(record: logging.LogRecord) -> bool:
        deprecated = "`run_simulation` function is deprecated" in record.getMessage()
        return record.levelno >= logging.WARNING and not deprecated and not simulation.over

    logger = logging.getLogger("flwr")
    telemetry.create_event = _no_event
    logger.addFilter(worth_showing)
    try:
        yield
    finally:
        logger.removeFilter(worth_showing)


def _no_event(event_type: telemetry.EventType, event_details: dict[str, Any] | None) -> str:
    """In place of Flower's, which looks at the machine, writes a file and opens a connection."""
    return "disabled"
