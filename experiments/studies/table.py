"""The table of a study, from its ``results.jsonl``: ``python experiments/studies/table.py STUDY``.

Per cell: test accuracy in per cent, mean ± sample standard deviation over seeds, and the difference
to the cell named by ``--against`` over the seeds that both have; bytes of one client in all rounds.
A ``*`` in that name is the cell's own up to its first comma: ``--against "*, epsilon inf"``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, in per cent."""
    mean = 100 * statistics.mean(values)
    return (
        f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"
    )


def read(study: str) -> dict[str, list[dict[str, Any]]]:
    """Cell -> its runs, in the order of ``cells.json``; runs of other settings are passed over."""
    cells = json.loads((HERE / study / "cells.json").read_text())
    found = defaultdict(list)
    for text in (HERE / study / "results.jsonl").read_text().splitlines():
        line = json.loads(text)
        if cells.get(line["cell"]) == line["changes"]:
            found[line["cell"]].append(line)
    return {cell: sorted(found[cell], key=lambda r: r["seed"]) for cell in cells if found[cell]}


def rows_of(runs: dict[str, list[dict[str, Any]]], against: str, clients: int) -> list[list[str]]:
    """The lines of the table: its head, the references of the first cell, then the cells."""
    first = next(iter(runs.values()))
    personal = any(run["clients"] for run in first)
    rest = {n for run in first for n in run["accuracy"] if n != "own"}
    lines = [["cell", "accuracy %", "seeds", f"less {against}", "MB down", "MB up"]]
    for who in ("untrained", "local", "centralised"):
        if who in rest:
            own = spread([r["accuracy"][who] for r in first])
            lines.append([who, own, str(len(first)), "", "", ""])
            if personal:
                lines[-1].insert(2, spread([r["clients"][who] for r in first]))
    for cell, own_runs in runs.items():
        other = against.replace("*", cell.split(",")[0])
        base = {r["seed"]: r["accuracy"]["own"] for r in runs.get(other, [])}
        gains = [r["accuracy"]["own"] - base[r["seed"]] for r in own_runs if r["seed"] in base]
        down, up = (
            statistics.mean(sum(r[f"bytes_{way}"].values()) for r in own_runs) / clients / 1e6
            for way in ("down", "up")
        )
        accuracy = spread([r["accuracy"]["own"] for r in own_runs])
        gain = spread(gains) if gains and cell != other else ""
        sent = [f"{down:.2f}", f"{up:.2f}"]
        if "strategy.name=centralised" in own_runs[0]["changes"]:
            sent = ["", ""]
        lines.append([cell, accuracy, str(len(own_runs)), gain, *sent])
        if personal:
            lines[-1].insert(2, spread([r["clients"]["own"] for r in own_runs]))
    if personal:
        lines[0].insert(2, "on own hold-outs %")
    return lines


def show(lines: list[list[str]]) -> None:
    """Prints a table in Markdown, its head first."""
    head, *table = lines
    for line in (head, ["---"] * len(head), *table):
        print("| " + " | ".join(line) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("study")
    parser.add_argument("--against", default="fedavg")
    parser.add_argument("--clients", type=int, default=10, help="to divide the bytes by")
    asked = parser.parse_args()
    show(rows_of(read(asked.study), asked.against, asked.clients))


if __name__ == "__main__":
    main()
