"""A strategy's server: ``python -m benchmarks.server_step [--clients 64] [--threads 2]``.

The server's share of a round: the time of ``groups``, ``send`` and ``receive`` over the time
of a whole FedAvg round on workload A's model and data. Clients of the other strategies take one
step each: what a server does with replies does not depend on how long they were trained for. The
second round counts, since in the first some servers only prepare.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines import ROUNDS, prepared
from benchmarks.ways import Way
from benchmarks.workload import SEED, WORKLOADS, Workload
from fedpeft.data.clients import Clients
from fedpeft.engine import play_round
from fedpeft.prepare import Prepared
from fedpeft.record import environment
from fedpeft.strategy import addressed, available, build, load

BARS = {True: 0.25, False: 0.05}
"""The largest share of a round, for strategies with an SVD and for those without."""

SVD = ("fedask", "fedmomentum", "fedsvd", "flexlora")
"""Strategies whose server decomposes a matrix per layer in every round."""


def server_seconds(whole: Prepared, name: str) -> float:
    """The server's own time in a round, in seconds: all of its exchanges."""
    local = dataclasses.replace(whole.recipe.local, steps=1)
    recipe = dataclasses.replace(whole.recipe, local=local)
    own = dataclasses.replace(whole, recipe=recipe, strategy=build(name, {}))
    strategy, federation, spent = own.strategy, own.federation(), 0.0
    state = strategy.init(own.problem)
    for number in (1, 2):
        spent = 0.0
        for _ in range(strategy.exchanges):
            began = time.perf_counter()
            sent = addressed(strategy, state, number, tuple(federation.clients()))
            spent += time.perf_counter() - began
            replies: list[Any] = list(federation.run(number, *sent))
            began = time.perf_counter()
            state = strategy.receive(state, iter(replies))
            spent += time.perf_counter() - began
    return spent


def whole_rounds(workload: Workload, clients: int, threads: int) -> tuple[Prepared, list[float]]:
    """A run of the workload's first clients, and the seconds of three whole FedAvg rounds."""
    whole = prepared(workload, Way("cohort", 1, threads))
    some = Clients.of(list(whole.population.clients)[:clients])
    whole = dataclasses.replace(
        whole, population=dataclasses.replace(whole.population, clients=some)
    )
    state, seconds = whole.strategy.init(whole.problem), []
    for number in (1, 2, 3):
        state, report = play_round(whole.strategy, state, whole.federation(), ROUNDS, SEED, number)
        seconds.append(report.seconds)
    return whole, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workload", default="A", choices=sorted(WORKLOADS))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    whole, seconds = whole_rounds(WORKLOADS[asked.workload], asked.clients, asked.threads)
    whole_round = sorted(seconds)[1]
    print(f"a round of FedAvg, {len(whole.population.clients)} clients: {whole_round:.2f} s")
    print("| strategy | server, s | share of a round | bar |\n| --- | --- | --- | --- |")
    found = {}
    for name in available():
        if name in ("centralised", "local") or load(name).walks:  # a server that adds scalars
            continue
        found[name] = server_seconds(whole, name)
        share, bar = found[name] / whole_round, BARS[name in SVD]
        verdict = "pass" if share <= bar else "FAIL"
        print(
            f"| {name} | {found[name]:.3f} | {100 * share:.1f} % | {100 * bar:.0f} %: {verdict} |"
        )
    if asked.out:
        figures = {"round": seconds, "server": found, "clients": len(whole.population.clients)}
        asked.out.write_text(
            json.dumps({"environment": environment.describe(), **figures}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
