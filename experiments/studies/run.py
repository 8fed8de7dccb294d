"""Runs a study: each of its cells with each of its seeds, as ``fedpeft run`` would run them.

    python experiments/studies/run.py STUDY [--jobs 2] [--only CELL ...] [--seeds 0 1 2]

A study is a folder here: ``recipe.yaml``, what its cells have in common, and ``cells.json``, cell
-> what it changes, as ``key=value``. Every run is a line of ``results.jsonl`` there; runs that are
there already are not made again, so a study that was stopped goes on. ``environment.json`` says on
what it ran. ``table.py`` turns the lines into a table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fedpeft.config_load import load_recipe
from fedpeft.events import Watcher
from fedpeft.record.environment import describe
from fedpeft.run import run

HERE = Path(__file__).parent


def play(study: str, cell: str, changes: list[str], seed: int) -> dict[str, Any]:
    """One run, on one thread: scores of every row of its table, bytes, seconds."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        common = ["engine.threads=1", "output.checkpoint_every=100000"]
        own = [f"seed={seed}", f"output.folder={folder}/run"]
        recipe = load_recipe(str(HERE / study / "recipe.yaml"), [*common, *changes, *own])
        summary = run(recipe, Watcher())
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        clock = virtual([json.loads(line) for line in lines])
    name = str(recipe.strategy["name"])
    rows = {("own" if row.name == name else row.name): row for row in summary.rows}
    return {
        "cell": cell,
        "seed": seed,
        "changes": changes,
        "rounds": summary.rounds,
        "accuracy": {who: round(row.score.accuracy, 5) for who, row in rows.items()},
        "clients": {who: round(row.mean, 5) for who, row in rows.items() if row.mean == row.mean},
        "bytes_down": rows["own"].down,
        "bytes_up": rows["own"].up,
        "seconds": round(summary.seconds, 1),
        **({"fleet": clock} if clock["rounds"] else {}),
    }


def virtual(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the fleet's clock said, round by round, and [seconds, test accuracy] when measured."""
    rounds = [line for line in lines if line["kind"] == "fleet"]
    at = {line["round"]: line["time"] for line in rounds}
    scores = [
        (line["round"], line["score"]["accuracy"])
        for line in lines
        if line["kind"] == "evaluation" and line["scope"] == "test"
    ]
    trained = [line for line in lines if line["kind"] == "round"]
    return {
        "rounds": [round(line["seconds"], 4) for line in rounds],
        "idle": [round(line["idle"], 4) for line in rounds if line["idle"] is not None],
        "curve": [[round(at[n], 4), round(own, 5)] for n, own in scores if n in at],
        "figures": [line["figures"] for line in trained if "figures" in line][-1:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("study")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--only", nargs="*", default=[], help="these cells only")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    asked = parser.parse_args()
    folder = HERE / asked.study
    cells: dict[str, list[str]] = json.loads((folder / "cells.json").read_text())
    results = folder / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    done = {(line["cell"], line["seed"], *line["changes"]) for line in map(json.loads, lines)}
    (folder / "environment.json").write_text(json.dumps(describe(), indent=1) + "\n")
    waiting = [
        (asked.study, cell, changes, seed)
        for seed in asked.seeds
        for cell, changes in cells.items()
        if (not asked.only or cell in asked.only) and (cell, seed, *changes) not in done
    ]
    with ProcessPoolExecutor(asked.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        runs = {pool.submit(play, *one): one for one in waiting}
        for ready in as_completed(runs):
            if (error := ready.exception()) is not None:  # the others go on, and are kept
                print(*runs[ready][1:], f"FAILED: {type(error).__name__}: {error}", flush=True)
                continue
            line = ready.result()
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line["cell"], line["seed"], line["accuracy"], f"{line['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
