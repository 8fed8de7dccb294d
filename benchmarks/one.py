"""One way on one workload in this process: ``python -m benchmarks.one WORKLOAD FOLDER ROUNDS WAY``.

Started by ``benchmarks.cohort`` and ``benchmarks.compare``; leaves ``run.json``, ``first_step``
and, where it can be compared, ``adapter.safetensors`` in FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.recorder import Recorder
from benchmarks.ways import Way
from benchmarks.workload import WORKLOADS, Workload
from fedpeft.record import environment


def play(workload: Workload, way: Way, recorder: Recorder) -> dict[str, Any]:
    """Runs the way; returns what it has to say about itself."""
    if way.family == "centralised":
        from benchmarks import loops

        loops.centralised(workload, recorder, way.batch)
    elif way.family == "loop":
        from benchmarks import loops

        return {**loops.sequential_loop(workload, recorder)}
    elif way.family == "flower":
        from benchmarks import flower_app

        flower_app.simulate(workload, recorder, way.processes, way.threads)
    elif way.family == "pfl":
        from benchmarks import pfl_app

        pfl_app.simulate(workload, recorder)
    else:
        from benchmarks import engines

        on_disk = way.family in ("worker", "workers")
        return (engines.workers if on_disk else engines.engine)(workload, way, recorder)
    return {}


def main(workload: str, folder: str, rounds: str, way: str) -> None:
    """Runs one way; of a torchrun's processes only rank 0 writes."""
    chosen = Way(**json.loads(way))
    torch.set_num_threads(chosen.threads)
    spread = "RANK" in os.environ
    own = Path(folder) if os.environ.get("RANK", "0") == "0" else Path(folder) / "rest"
    own.mkdir(exist_ok=True)
    recorder = Recorder(own, int(rounds), os.getppid() if spread else os.getpid())
    notes = play(WORKLOADS[workload], chosen, recorder)
    recorder.save({**notes, "environment": environment.describe()})


if __name__ == "__main__":
    main(*sys.argv[1:])
