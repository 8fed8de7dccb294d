"""The ways that a workload is run, with the variants that each is given to find its best."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.workload import Workload
from fedpeft.config import Engine, Local, Privacy

FAMILIES = {
    "centralised": "the pooled data, hand-written",
    "cohort": "fedpeft's engine of this name",
    "loop": "client by client, hand-written",
    "sequential": "fedpeft's engine of this name",
    "flower": "Flower's simulation",
    "pfl": "pfl-research's simulation",
    "bf16": "cohort under bf16 autocast",
    "clipped": "cohort with each example's gradient clipped to norm 1",
    "private": "cohort by DP-SGD: record-level privacy, noise and Poisson batches included",
    "compiled": "cohort with engine.compile=default",
    "worker": "cohort from a recipe on disk, one process with one thread",
    "workers": "the same in several processes with one thread each",
}

COMPARABLE = ("cohort", "sequential", "loop", "compiled")
"""fedpeft's ways, and the loop, that must give the same adapter."""


@dataclass(frozen=True)
class Way:
    """One variant: ``processes`` workers with ``threads`` threads each; 0 where it has no meaning.

    batch: of the centralised run. chunk: clients per fused batch (0: fedpeft chooses). The fields
    are the same in all revisions of this repository, so that one can start another's.
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

    @property
    def cores(self) -> int:
        """Threads in all."""
        return self.processes * self.threads

    @property
    def comparable(self) -> bool:
        """Whether the adapter must be the loop's."""
        return self.family in COMPARABLE

    def local(self, workload: Workload) -> Local:
        """The recipe's ``local`` of a way of fedpeft."""
        local = workload.local
        if self.family == "bf16":
            return dataclasses.replace(local, precision="bf16")
        if self.family == "clipped":
            return dataclasses.replace(local, clip_norm=1.0, clip_per="example")
        return local

    @property
    def privacy(self) -> Privacy:
        """The recipe's ``privacy`` of a way of fedpeft."""
        if self.family == "private":
            return Privacy(unit="record", noise_multiplier=1.0, clip_norm=1.0)
        return Privacy()

    def engine(self, workload: Workload) -> Engine:
        """The recipe's ``engine`` of a way of fedpeft; ``threads`` are those of all workers."""
        return Engine(
            kind="sequential" if self.family == "sequential" else "cohort",
            chunk=self.chunk,
            device=workload.device,
            threads=self.cores,
            workers=self.processes,
            compile="default" if self.family == "compiled" else "none",
        )

    def command(self, python: str, workload: str, folder: Path, rounds: int) -> list[str]:
        """The command that runs it in a process of its own."""
        launcher = [python]
        if self.family == "pfl" and self.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc-per-node={self.processes}"]
        way = json.dumps(dataclasses.asdict(self))
        return [*launcher, "-m", "benchmarks.one", workload, str(folder), str(rounds), way]


def available(family: str, pfl_python: str) -> bool:
    """Whether this machine can go the way; ``pfl_python`` is the Python that pfl runs in."""
    if family == "pfl":
        return _has_pfl(pfl_python)
    if family == "bf16":
        return torch.cpu._is_avx512_bf16_supported()
    if family == "workers":
        return importlib.util.find_spec("fedpeft.workers") is not None
    return True


def _has_pfl(python: str) -> bool:
    if python == sys.executable:
        return importlib.util.find_spec("pfl") is not None
    return subprocess.run([python, "-c", "import pfl"], capture_output=True).returncode == 0


def variants(family: str, workload: Workload, threads: int, chunk: int) -> list[Way]:
    """A family's variants on ``threads`` threads in all; none where it has no meaning.

    One process with all threads; for small steps also with one thread; for the simulators that run
    clients concurrently, also one process per thread, or several per GPU.
    """
    counts = sorted({threads, 1} if workload.overhead else {threads})
    if family == "centralised":
        return [Way(family, 1, n, batch=b) for n in counts for b in workload.batches]
    if workload.precision == "bf16" and family in ("bf16", "worker", "workers"):
        return []
    if family == "worker":
        return [Way(family, 1, 1, chunk=chunk)]
    if family == "workers":
        return [Way(family, max(2, threads), 1, chunk=chunk)]
    if family in ("flower", "pfl"):
        return [Way(family, processes, n) for processes, n in _shapes(family, workload, threads)]
    own = chunk if family not in ("loop", "sequential") else 0
    return [Way(family, 1, n, chunk=own) for n in counts]


def _shapes(family: str, workload: Workload, threads: int) -> list[tuple[int, int]]:
    """Processes and threads of each; pfl's processes cannot share a GPU (NCCL refuses)."""
    if workload.device == "cuda":
        actors = workload.actors if family == "flower" else (1,)
        return [(n, max(1, threads // n)) for n in actors]
    shapes = {(1, threads), (threads, 1)}
    return sorted(shapes | {(1, 1)} if family == "pfl" and workload.overhead else shapes)
