"""fedpeft's cohort engine against its peers: ``python -m benchmarks.cohort``.

Every run is a fresh process; the ways take turns, so that drift of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

from benchmarks.memory import Sampler
from benchmarks.table import Run, bars, best, render, rows
from benchmarks.ways import FAMILIES, Way, installed, variants
from benchmarks.workload import WORKLOADS

Adapter = dict[str, np.ndarray]

PATIENCE = 3600
"""Seconds after which a run counts as hung."""


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks.cohort", description=__doc__)
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way's best variant")
    parser.add_argument("--ways", default=",".join(FAMILIES), help="of " + ", ".join(FAMILIES))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="in all, for each way")
    parser.add_argument("--chunk", type=int, default=0, help="clients per batch (0: automatic)")
    parser.add_argument("--out", type=Path, help="JSON file for every figure")
    found = parser.parse_args(given)
    for family in found.ways.split(","):
        if family not in FAMILIES:
            parser.error(f"--ways: {family!r} is none of {', '.join(FAMILIES)}")
    return found


@dataclass(frozen=True)
class Outcome:
    """What a run left: its figures, and the global adapter after the compared round."""

    run: Run
    adapter: Adapter
    environment: dict[str, Any]


def run_once(way: Way, workload: str, rounds: int, repeat: int) -> Outcome:
    """One run in a process of its own. Raises RuntimeError with the end of its log if it fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        threads = str(way.threads)
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        variables = {**os.environ, **quiet, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with (folder / "log").open("w") as log:
            began = time.monotonic()
            child = subprocess.Popen(
                way.command(workload, folder, rounds), stdout=log, stderr=log, env=variables
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
        adapter = load_file(kept) if kept.exists() else {}
        return Outcome(run, adapter, environment)


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


def gap(left: Adapter, right: Adapter) -> float | None:
    """The largest absolute difference, None if either is empty; they must have the same names."""
    if not left or not right:
        return None
    if left.keys() != right.keys():
        raise ValueError(f"adapters differ in names: {sorted(left.keys() ^ right.keys())[:4]}")
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


def measure(
    workload: str, families: Sequence[str], options: argparse.Namespace
) -> tuple[list[Run], dict[str, Any]]:
    """All runs of a workload, and where they ran.

    After the first repeat only the best variant of a family goes on.
    """
    tried = [
        way
        for family in families
        for way in variants(family, WORKLOADS[workload], options.threads, options.chunk)
    ]
    found: list[Outcome] = []
    for repeat in range(options.repeats):
        fastest = {one.way for one in best(rows([o.run for o in found])).values()}
        for way in [w for w in tried if repeat == 0 or w in fastest]:
            print(f"{workload} {repeat + 1}/{options.repeats} {way.label} ...", flush=True)
            try:
                found.append(run_once(way, workload, options.rounds + 1, repeat))
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                continue
            print("   ", *(f"{s:.3f}" for s in found[-1].run.seconds), flush=True)
    return compared(found), found[0].environment if found else {}


def compared(found: Sequence[Outcome]) -> list[Run]:
    """The runs with the gap of each adapter from the loop's (the first's, if it did not run)."""
    federated = [o for o in found if o.adapter]
    loops = [o for o in federated if o.run.way.family == "loop"]
    reference = [*loops, *federated][0].adapter if federated else {}
    return [replace(o.run, gap=gap(o.adapter, reference)) for o in found]


def main(given: Sequence[str]) -> None:
    """Measures, prints the tables, writes the JSON after each workload."""
    options = arguments(given)
    wanted = options.ways.split(",")
    families = [family for family in wanted if installed(family)]
    absent = [family for family in wanted if family not in families]
    runs: list[Run] = []
    for workload in ["A", "B"] if options.workload == "all" else [options.workload]:
        own, environment = measure(workload, families, options)
        runs += own
        table = rows(own)
        print(f"\n{workload}\n{render(table)}", *bars(workload, table), sep="\n", flush=True)
        print(*(f"{family}: not installed" for family in absent), "", sep="\n", flush=True)
        if options.out:
            content = {
                "schema": 1,
                "date": datetime.date.today().isoformat(),
                "command": command(options),
                "environment": environment,
                "not_installed": absent,
                "runs": [asdict(run) for run in runs],
            }
            options.out.write_text(json.dumps(content, indent=1) + "\n")


def command(options: argparse.Namespace) -> str:
    """The command that measures the same again, without paths of this machine."""
    words = [f"--{name} {value}" for name, value in vars(options).items() if name != "out"]
    return " ".join(["python -m benchmarks.cohort", *words])


if __name__ == "__main__":
    main(sys.argv[1:])
