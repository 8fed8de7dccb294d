"""Bandits on a simulated fleet: ``python -m benchmarks.bandits [--seeds 3] [--out FILE.json]``.

No model is trained: 80 devices in the mix of FedSpine's fleet (30 Jetson TX2, 40 Xavier NX, 10 AGX)
with links of 2, 6, 12 and 24 Mbit/s, whose speed changes every 20 rounds, do synchronous rounds of
RoBERTa-base with LoRA on q and v (20 steps of 8 rows of 128 tokens). A round is as long as its
slowest client, and brings each client the gain that ``linear.hope`` gives its rank; the run ends
when the mean gain adds up to 50. Reported: virtual hours until then, and the share of them that
clients wait.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fedpeft.bandits.agents import Bandits, Policy, Seen
from fedpeft.bandits.arms import Rule
from fedpeft.bandits.linear import hope
from fedpeft.record import environment

RANKS, GOAL, PROGRESS, MOST = (2, 4, 8, 16, 32), 0.5, 50.0, 400
TERAFLOPS = [1.33] * 30 + [1.69] * 40 + [2.8] * 10
LINKS, MODES, UTILISATION = (2.0, 6.0, 12.0, 24.0), (1.0, 0.85, 0.65, 0.5), 0.25
WORK, BYTES_PER_RANK = 7.0, 2 * 2 * 294_912 / 8
"""TFLOP of a round of the whole model, bytes both ways in 16 bits for each rank."""

Way = Callable[["Fleet", int], tuple[np.ndarray, np.ndarray]]
"""``(fleet, round) -> steps of pruning, ranks`` of all devices."""


class Fleet:
    """The devices, and how much of the prunable model each has left."""

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        self.names = [f"device-{k:02d}" for k in range(len(TERAFLOPS))]
        self.link = self.draw.permutation(np.resize(LINKS, len(TERAFLOPS))) * 1e6 / 8
        self.gone = np.zeros(len(TERAFLOPS))
        self.speed = np.array(TERAFLOPS)

    def round(self, number: int, steps: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Prunes, and gives the seconds of every device."""
        if number % 20 == 1:
            self.speed = np.array(TERAFLOPS) * self.draw.choice(MODES, len(TERAFLOPS))
        self.gone = np.minimum(GOAL, 1 - (1 - self.gone) * (1 - steps))
        noise = self.draw.lognormal(0, 0.05, len(TERAFLOPS))
        work = WORK * (1 - self.gone) / (UTILISATION * self.speed)
        return noise * (work + BYTES_PER_RANK * ranks / self.link)


def fixed(rank: int, prunes: bool) -> Way:
    """The same for all: a step of a tenth, or none."""

    def way(fleet: Fleet, number: int) -> tuple[np.ndarray, np.ndarray]:
        count = len(fleet.names)
        return np.full(count, 0.1 * prunes), np.full(count, rank)

    return way


def random(fleet: Fleet, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Any arm of the grid."""
    count = len(fleet.names)
    return fleet.draw.choice([0, 1 / 30, 2 / 30, 0.1], count), fleet.draw.choice(RANKS, count)


def play(seed: int, way: Way | None, policy: Policy | None = None) -> tuple[float, float]:
    """Hours, and the share that clients wait; by ``way``, or by the bandits of ``policy``."""
    fleet, bandits, total, hours, idle = Fleet(seed), Bandits(seed), 0.0, 0.0, []
    for number in range(1, MOST + 1):
        if policy is not None:
            found = bandits.orders(policy, fleet.names)
            steps, ranks = found[0].numpy(), found[1].numpy()
        else:
            assert way is not None
            steps, ranks = way(fleet, number)
        before = fleet.gone
        times = fleet.round(number, steps, ranks)
        gains = np.array([hope(int(r), max(RANKS)) for r in ranks])
        gains = gains * fleet.draw.lognormal(0, 0.1, len(gains))
        if policy is not None:
            known = [gains, (fleet.gone - before) / policy.step, gains, 1 - fleet.gone, times]
            seen = Seen(tuple(fleet.names), *map(torch.from_numpy, known), goal=1 - GOAL)
            bandits = bandits.closed(policy, seen)
        hours += float(times.max()) / 3600
        idle.append(1 - float(times.mean() / times.max()))
        total += float(np.mean([hope(int(r), max(RANKS)) for r in ranks]))
        if total >= PROGRESS:
            break
    return hours, float(np.mean(idle))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ways: dict[str, tuple[Way | None, Policy | None]] = {
        "unpruned, rank 32": (fixed(32, False), None),
        "pruned, rank 32": (fixed(32, True), None),
        "pruned, rank 8": (fixed(8, True), None),
        "random arms": (random, None),
        "S-UCB grid": (None, Policy("grid", RANKS)),
        "S-UCB grid, no smoothing": (None, Policy("grid", RANKS, rule=Rule(bandwidth=0.0))),
        "S-UCB tree": (None, Policy("tree", RANKS)),
        "linear": (None, Policy("linear", RANKS)),
    }
    print("| policy | virtual hours | waiting |\n| --- | --- | --- |")
    found = {}
    for name, (way, policy) in ways.items():
        runs = [play(seed, way, policy) for seed in range(asked.seeds)]
        hours, idle = (float(np.mean(own)) for own in zip(*runs, strict=True))
        found[name] = {"hours": hours, "waiting": idle, "runs": runs}
        print(f"| {name} | {hours:.3f} | {100 * idle:.0f} % |", flush=True)
    if asked.out:
        figures = {"seeds": asked.seeds, "policies": found}
        figures["environment"] = environment.describe()
        asked.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
