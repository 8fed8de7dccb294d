"""What averaging the factors misses: ||E|| / ||dW*|| of FedIT, by local steps and skew.

    python experiments/studies/fedit_error/measure.py [--seeds 0 1 2] [--rounds 3]

dW* = sum_k p_k s B_k A_k is the mean of the clients' updates, E = dW* - s B A what the means of
the factors miss of it; Frobenius norms over all LoRA layers together, after each round. Adds to
``results.jsonl`` beside this file what is not there yet, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fedpeft.config_load import load_recipe
from fedpeft.lowrank import lora_pairs
from fedpeft.prepare import Prepared, prepare
from fedpeft.strategy import Messages, gather, weighted_mean
from fedpeft.tree import Tree

HERE = Path(__file__).parent
SKEWS = {
    "mixed": ["partition.kind=iid"],
    "one label each": ["partition.kind=pathological", "partition.classes=1"],
}
STEPS = (1, 4, 16)


def missed(merged: Tree, replies: list[Messages], scaling: dict[str, float]) -> float:
    """||E|| / ||dW*|| of one round."""
    own, p = gather(replies, "adapter")
    lost = whole = 0.0
    for layer, (a, b) in lora_pairs(merged, "fedavg").items():
        mean = torch.einsum("k,kor,kri->oi", p, own[b].double(), own[a].double())
        error = mean - merged[b].double() @ merged[a].double()
        lost += scaling[layer] ** 2 * float(error.square().sum())
        whole += scaling[layer] ** 2 * float(mean.square().sum())
    return (lost / whole) ** 0.5


def play(prepared: Prepared, rounds: int) -> list[float]:
    """The share that is missed in each round of FedAvg."""
    strategy, problem = prepared.strategy, prepared.problem
    federation, state, found = prepared.federation(), strategy.init(problem), []
    for number in range(1, rounds + 1):
        sent = strategy.send(state, number, tuple(federation.clients()))
        replies: list[Any] = list(federation.run(number, sent))
        merged = weighted_mean(iter(replies), "adapter")
        found.append(missed(merged, replies, dict(problem.scaling)))
        state = strategy.receive(state, iter(replies))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results = HERE / "results.jsonl"
    kept = results.read_text().splitlines() if results.exists() else []
    lines: list[dict[str, Any]] = [json.loads(line) for line in kept]
    done = {(line["skew"], line["steps"], line["seed"]) for line in lines}
    for (skew, partition), steps, seed in product(SKEWS.items(), STEPS, asked.seeds):
        if (skew, steps, seed) in done:
            continue
        changes = [*partition, f"local.steps={steps}", f"seed={seed}"]
        prepared = prepare(load_recipe(str(HERE / "recipe.yaml"), changes))
        missing = [round(x, 6) for x in play(prepared, asked.rounds)]
        lines.append({"skew": skew, "steps": steps, "seed": seed, "missed": missing})
        with results.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(lines[-1], flush=True)
    print("| clients' labels | local steps | round 1 | round 3 |\n| --- | --- | --- | --- |")
    for skew, steps in product(SKEWS, STEPS):
        own = [ln["missed"] for ln in lines if (ln["skew"], ln["steps"]) == (skew, steps)]
        cells = [[100 * m[at] for m in own] for at in (0, -1)]
        shown = [f"{statistics.mean(c):.2f} ± {statistics.stdev(c):.2f} %" for c in cells]
        print(f"| {skew} | {steps} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
