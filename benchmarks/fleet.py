"""What a fleet's clock costs: ``python -m benchmarks.fleet [--clients 1000] [--threads 1]``.

The clock's own time (who takes part, bytes and durations, events and their log, books, the line
for the record and the checkpoint's part) over the wall time of the whole round that it is part of,
on workload B's model and data with so many clients in a round. In the first round clients' lengths
are read. Python's collector is frozen after the set-up: one pass over the libraries' objects takes
longer than the clock does, and would fall on whichever code happens to allocate.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines import prepared
from benchmarks.ways import Way
from benchmarks.workload import WORKLOADS
from fedpeft import asynchrony, timed
from fedpeft.fleet.settings import Fleet
from fedpeft.prepare import Prepared
from fedpeft.record import environment
from fedpeft.timed import Timed

BAR = 0.02
"""The largest share of a round that the clock may take."""

PARTS: tuple[tuple[type, str], ...] = (
    (timed.Timed, "begin"),
    (timed.Timed, "memory"),
    (timed._Turn, "lost"),
    (timed._Turn, "line"),
    (asynchrony.Windows, "_arrived"),
    (asynchrony.Windows, "_line"),
)
"""What the clock does in a round."""


class Stopwatch:
    """Seconds spent in PARTS since ``seconds`` was last set to 0."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for owner, name in PARTS:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(*given: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*given)
            finally:
                self.seconds += time.perf_counter() - began

        return wrapped


def shares(whole: Prepared, fleet: Fleet, rounds: int, watch: Stopwatch) -> list[dict[str, float]]:
    """Of each round: the clock's seconds, and the whole round's."""
    own = dataclasses.replace(whole, recipe=dataclasses.replace(whole.recipe, fleet=fleet))
    clock, federation = Timed(own), own.federation()
    state, found = own.strategy.init(own.problem), []
    for number in range(1, rounds + 1):
        watch.seconds, began = 0.0, time.perf_counter()
        names = clock.begin(state, number)
        state, _ = clock.play(state, federation, number, names, own.post)
        clock.memory()
        line = time.perf_counter()
        json.dumps(clock.line)
        watch.seconds += time.perf_counter() - line
        found.append({"clock": watch.seconds, "round": time.perf_counter() - began})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    count = asked.clients
    workload = dataclasses.replace(WORKLOADS["B"], population=count, cohort=count)
    whole, watch, found = prepared(workload, Way("cohort", 1, asked.threads)), Stopwatch(), {}
    policies = {
        "sync": Fleet("jetson80"),
        "fedbuff": Fleet("jetson80", policy="fedbuff", buffer=count, concurrency=count),
    }
    gc.collect()
    gc.freeze()
    print("| policy | round | clock, ms | round, s | share | bar |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, fleet in policies.items():
        found[name] = shares(whole, fleet, asked.rounds, watch)
        for number, own in enumerate(found[name], start=1):
            share = own["clock"] / own["round"]
            verdict = "pass" if share <= BAR else "FAIL"
            print(
                f"| {name} | {number} | {1e3 * own['clock']:.1f} | {own['round']:.2f} | "
                f"{100 * share:.2f} % | {100 * BAR:.0f} %: {verdict} |"
            )
        spent, whole_run = (sum(own[part] for own in found[name]) for part in ("clock", "round"))
        print(f"{name}, all rounds: {100 * spent / whole_run:.2f} %")
    if asked.out:
        figures = {"policies": found, "clients": count, "threads": asked.threads}
        asked.out.write_text(
            json.dumps({"environment": environment.describe(), **figures}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
