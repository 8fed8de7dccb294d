"""The ways that a workload is run, with the variants that each is given to find its best."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.workload import Workload

FAMILIES = ("centralised", "cohort", "loop", "sequential", "flower", "pfl")
"""centralised: the pooled data, hand-written. cohort, sequential: fedpeft's engines. loop: client
by client, hand-written. flower: Flower's simulation. pfl: pfl-research's."""

BATCHES = (32, 64, 128)
"""Batch sizes of the centralised run, of which the fastest counts."""


@dataclass(frozen=True)
class Way:
    """One variant: ``processes`` workers with ``threads`` threads each; 0 where it has no meaning.

    batch: of the centralised run. chunk: clients per fused batch (0: fedpeft chooses).
    """

    family: str
    processes: int
    threads: int
    batch: int = 0
    chunk: int = 0

    @property
    def label(self) -> str:
        """A short name, unique among the variants of a family."""
        extra = f", batch {self.batch}" if self.batch else ""
        extra += f", chunk {self.chunk}" if self.chunk else ""
        return f"{self.family} ({self.processes} x {self.threads}{extra})"

    def command(self, workload: str, folder: Path, rounds: int) -> list[str]:
        """The command that runs it in a process of its own."""
        launcher = [sys.executable]
        if self.family == "pfl" and self.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc-per-node={self.processes}"]
        way = json.dumps(asdict(self))
        return [*launcher, "-m", "benchmarks.one", workload, str(folder), str(rounds), way]


def installed(family: str) -> bool:
    """Whether the package that a way needs is there (pfl is optional)."""
    return family != "pfl" or importlib.util.find_spec("pfl") is not None


def variants(family: str, workload: Workload, threads: int, chunk: int) -> list[Way]:
    """A family's variants on ``threads`` threads in all.

    One process with all threads; for small steps also with one thread; for the simulators that run
    clients concurrently, also one process per thread.
    """
    counts = sorted({threads, 1} if workload.overhead else {threads})
    if family == "centralised":
        return [Way(family, 1, n, batch=b) for n in counts for b in BATCHES]
    if family == "cohort":
        return [Way(family, 1, n, chunk=chunk) for n in counts]
    if family in ("flower", "pfl"):
        shapes = sorted({(1, threads), (threads, 1)})
        return [Way(family, processes, n) for processes, n in shapes]
    return [Way(family, 1, n) for n in counts]
