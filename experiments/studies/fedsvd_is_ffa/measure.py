"""FedSVD against FFA-LoRA from the same orthonormal A: how far apart their updates are.

    python experiments/studies/fedsvd_is_ffa/measure.py [--seeds 0 1 2] [--rounds 5]

Relative difference of all layers' s B A after each round, under SGD, under SGD with per-example
clipping, and under AdamW, which a rotation of B's columns does not commute with (the control).
Writes ``results.jsonl`` beside this file and prints the table.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fedpeft.config_load import load_recipe
from fedpeft.engine import play_round
from fedpeft.lowrank import lora_pairs
from fedpeft.prepare import prepare
from fedpeft.tree import Tree

HERE = Path(__file__).parent
WAYS = {
    "SGD": [],
    "SGD, clipped per example": ["local.clip_per=example", "local.clip_norm=0.5"],
    "AdamW": ["local.optimizer=adamw", "local.lr=1e-3"],
}


def updates(adapter: Tree, scaling: dict[str, float]) -> torch.Tensor:
    """All layers' s B A in one vector."""
    pairs = lora_pairs(adapter, "fedsvd").items()
    dense = [scaling[n] * adapter[b].double() @ adapter[a].double() for n, (a, b) in pairs]
    return torch.cat([x.flatten() for x in dense])


def play(name: str, changes: list[str], rounds: int, start: Tree | None) -> tuple[Tree, list[Any]]:
    """The adapter before round 1, and the updates after each round."""
    prepared = prepare(load_recipe(str(HERE / "recipe.yaml"), [*changes, f"strategy={name}"]))
    strategy, problem, found = prepared.strategy, prepared.problem, []
    state: Any = strategy.init(problem)
    if start is not None:
        state = type(state)(start, 0)
    begun, federation = strategy.adapter(state), prepared.federation()
    for number in range(1, rounds + 1):
        recipe = prepared.recipe
        state, _ = play_round(strategy, state, federation, recipe.rounds, recipe.seed, number)
        found.append(updates(strategy.adapter(state), dict(problem.scaling)))
    return begun, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for (way, extra), seed in product(WAYS.items(), asked.seeds):
        changes = [*extra, f"seed={seed}"]
        ffa = "{name: ffa_lora, init_a: orthonormal}"
        start, wanted = play(ffa, changes, asked.rounds, None)
        _, found = play("{name: fedsvd}", changes, asked.rounds, start)
        pairs = zip(found, wanted, strict=True)
        apart = [float((x - y).norm() / y.norm()) for x, y in pairs]
        lines.append({"way": way, "seed": seed, "apart": apart})
        print(lines[-1], flush=True)
    (HERE / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print("| optimizer | after round 1 | after the last |\n| --- | --- | --- |")
    for way in WAYS:
        own = [line["apart"] for line in lines if line["way"] == way]
        first, last = (
            f"{min(a[at] for a in own):.0e} to {max(a[at] for a in own):.0e}" for at in (0, -1)
        )
        print(f"| {way} | {first} | {last} |")


if __name__ == "__main__":
    main()
