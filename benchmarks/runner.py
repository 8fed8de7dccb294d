"""One run of one way in a process of its own, watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

from benchmarks.memory import Sampler
from benchmarks.table import Run
from benchmarks.ways import Way

Adapter = dict[str, np.ndarray]

PATIENCE = 3600
"""Seconds after which a run counts as hung."""

HERE = Path(__file__).parents[1]
"""The checkout that this file is part of."""


@dataclass(frozen=True)
class Launch:
    """What a run is started with: the checkout that it runs, and Python, for pfl its own."""

    tree: Path = HERE
    python: str = sys.executable
    pfl_python: str = sys.executable

    def environment(self, way: Way, folder: Path) -> dict[str, str]:
        """Threads for every library; caches of its own; nothing is sent anywhere."""
        threads = str(way.threads)
        return {
            **os.environ,
            "PYTHONPATH": str(self.tree),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "HF_DATASETS_CACHE": str(folder / "datasets"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }


@dataclass(frozen=True)
class Outcome:
    """What a run left: its figures, and the global adapter after the compared round."""

    run: Run
    adapter: Adapter
    environment: dict[str, Any]


def run_once(way: Way, workload: str, rounds: int, repeat: int, launch: Launch) -> Outcome:
    """One run. Raises RuntimeError with the end of its log if it fails.

    rounds: with the first, which does not count.
    """
    python = launch.pfl_python if way.family == "pfl" else launch.python
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = way.command(python, workload, folder, rounds)
        with (folder / "log").open("w") as log:
            began = time.monotonic()
            child = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=launch.environment(way, folder),
                cwd=launch.tree,
            )
            sampler = Sampler(child.pid)
            try:
                code = child.wait(PATIENCE)
            finally:
                sampler.stop()
                end(sampler.seen)
        if code != 0 or not (folder / "run.json").exists():
            raise RuntimeError(f"{way.label} ended with {code}: {tail(folder / 'log')}")
        found = json.loads((folder / "run.json").read_text())
        environment = found.pop("environment")
        run = Run(
            workload=workload,
            way=way,
            repeat=repeat,
            seconds=found.pop("seconds")[1:],
            cpu=found.pop("cpu_seconds")[1:],
            others=found.pop("others")[1:],
            startup=float((folder / "first_step").read_text()) - began,
            peak_bytes=sampler.peak,
            proportional=sampler.proportional,
            gap=None,
            notes=found,
        )
        kept = folder / "adapter.safetensors"
        return Outcome(run, load_file(kept) if kept.exists() else {}, environment)


def end(processes: set[psutil.Process]) -> None:
    """Waits for what is left of a run's tree (Ray's helpers leave late), then ends it."""
    _, alive = psutil.wait_procs(processes, timeout=15)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=15)


def tail(log: Path) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
