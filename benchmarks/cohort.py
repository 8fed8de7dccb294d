"""fedpeft's cohort engine against its peers: ``python -m benchmarks.cohort``.

Every run is a fresh process; the ways take turns, so that drift of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import history
from benchmarks.bars import bars
from benchmarks.flops import flops_per_token, peak_tflops
from benchmarks.runner import Adapter, Launch, Outcome, run_once
from benchmarks.table import Arithmetic, Run, best, render, rows
from benchmarks.ways import FAMILIES, Way, available, variants
from benchmarks.workload import ON_CPU, ON_GPU, WORKLOADS, Workload


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks.cohort", description=__doc__)
    parser.add_argument("--workload", choices=[*WORKLOADS, "all", "gpu"], default="all")
    parser.add_argument("--shrink", action="store_true", help="a GPU workload, tiny, on the CPU")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way's best variant")
    parser.add_argument("--ways", default=",".join(FAMILIES), help="of " + ", ".join(FAMILIES))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="in all, for each way")
    parser.add_argument("--chunk", type=int, default=0, help="clients per batch (0: automatic)")
    parser.add_argument("--pfl-python", default=sys.executable, help="a Python that has pfl")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device (0: by name)")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/history.jsonl")
    parser.add_argument("--out", type=Path, help="JSON file for every figure")
    found = parser.parse_args(given)
    for family in found.ways.split(","):
        if family not in FAMILIES:
            parser.error(f"--ways: {family!r} is none of {', '.join(FAMILIES)}")
    return found


def chosen(options: argparse.Namespace) -> list[Workload]:
    """The workloads that the command line names."""
    if options.workload in ("all", "gpu"):
        found = list(ON_CPU if options.workload == "all" else ON_GPU)
    else:
        found = [WORKLOADS[options.workload]]
    return [WORKLOADS[f"{w.name}-small"] for w in found if w in ON_GPU] if options.shrink else found


def measure(
    workload: Workload, families: Sequence[str], options: argparse.Namespace
) -> tuple[list[Run], dict[str, Any]]:
    """All runs of a workload, and where they ran."""
    tried = [
        way
        for family in families
        for way in variants(family, workload, options.threads, options.chunk)
    ]
    launch = Launch(pfl_python=options.pfl_python)
    found: list[Outcome] = []
    for repeat in range(options.repeats):
        for way in tried if repeat == 0 else going_on(tried, found, workload):
            print(f"{workload.name} {repeat + 1}/{options.repeats} {way.label} ...", flush=True)
            try:
                found.append(run_once(way, workload.name, options.rounds + 1, repeat, launch))
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                continue
            print("   ", *(f"{s:.3f}" for s in found[-1].run.seconds), flush=True)
    return compared(found), found[0].environment if found else {}


def going_on(tried: Sequence[Way], found: Sequence[Outcome], workload: Workload) -> list[Way]:
    """What runs again: the best variant of each family; where steps are small, on one core too."""
    fastest = {one.way for one in best(rows([o.run for o in found])).values()}
    ran = {o.run.way for o in found}
    return [
        way
        for way in tried
        if way in fastest or (workload.overhead and way.cores == 1 and way in ran)
    ]


def compared(found: Sequence[Outcome]) -> list[Run]:
    """The runs with the gap of each adapter from the loop's (the first's, if it did not run)."""
    federated = [o for o in found if o.adapter]
    loops = [o for o in federated if o.run.way.family == "loop"]
    reference = [*loops, *federated][0].adapter if federated else {}
    return [replace(o.run, gap=gap(o.adapter, reference)) for o in found]


def gap(left: Adapter, right: Adapter) -> float | None:
    """The largest absolute difference, None if either is empty; they must have the same names."""
    if not left or not right:
        return None
    if left.keys() != right.keys():
        raise ValueError(f"adapters differ in names: {sorted(left.keys() ^ right.keys())[:4]}")
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


def report(
    workload: Workload, runs: Sequence[Run], environment: dict[str, Any], options: Any
) -> None:
    """Prints the table and the bars; records them if asked."""
    table = rows(runs)
    peak = peak_tflops(environment, options.peak_tflops)
    arithmetic = Arithmetic(workload.tokens_per_round, flops_per_token(workload), peak)
    print(f"\n{workload.name}\n{render(table, arithmetic)}\n", flush=True)
    print(*bars(workload.name, table), sep="\n", flush=True)
    if options.record and table:
        history.append(history.lines(workload.name, table, environment))


def main(given: Sequence[str]) -> None:
    """Measures, prints the tables, writes the JSON after each workload."""
    options = arguments(given)
    wanted = options.ways.split(",")
    families = [family for family in wanted if available(family, options.pfl_python)]
    absent = [family for family in wanted if family not in families]
    runs: list[Run] = []
    for workload in chosen(options):
        own, environment = measure(workload, families, options)
        runs += own
        report(workload, own, environment, options)
        print(*(f"{family}: not to be had here" for family in absent), "", sep="\n", flush=True)
        if options.out:
            content = {
                "schema": 2,
                "date": datetime.date.today().isoformat(),
                "command": command(options),
                "environment": environment,
                "not_available": absent,
                "runs": [asdict(run) for run in runs],
            }
            options.out.write_text(json.dumps(content, indent=1) + "\n")


def command(options: argparse.Namespace) -> str:
    """The command that measures the same again, without paths of this machine."""
    words = ["python -m benchmarks.cohort"]
    for name, value in vars(options).items():
        if value is True:
            words.append(f"--{name}")
        elif value is not False and name not in ("out", "pfl_python"):
            words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(words)


if __name__ == "__main__":
    main(sys.argv[1:])
