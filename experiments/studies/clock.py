"""The table of a study under a fleet's clock: ``python experiments/studies/clock.py STUDY``.

Per cell, means over seeds (± sample standard deviation): test accuracy after the last round, in per
cent; virtual seconds of the whole run; seconds until the test accuracy first reached each of
``--targets`` (measured every few rounds; linear between two measurements), with how often where not
every seed did; how much sooner that was than in the cell ``--against``, by seed; the mean idle
fraction, of all rounds and of the last half; what pruning clients had lost at the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent


def reached(curve: list[list[float]], target: float) -> float:
    """When a curve of [seconds, accuracy], from (0, 0), first was at a target; NaN: never."""
    before, low = 0.0, 0.0
    for now, high in curve:
        if high >= target:
            return before + (now - before) * (target - low) / max(high - low, 1e-12)
        before, low = now, high
    return math.nan


def spread(values: list[float], places: int = 0, times: float = 1.0) -> str:
    """Mean ± standard deviation of what is a number; how many, where some are not."""
    known = [times * v for v in values if not math.isnan(v)]
    if not known:
        return "never" if values else ""
    text = f"{statistics.mean(known):.{places}f}"
    if len(known) > 1:
        text += f" ± {statistics.stdev(known):.{places}f}"
    return text + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")


def seconds(values: list[float]) -> str:
    """As ``spread``, with two places where all are short."""
    return spread(values, 0 if max(v for v in [0.0, *values] if v == v) > 20 else 2)


def rows_of(
    runs: dict[str, list[dict[str, Any]]], against: str, targets: list[float]
) -> list[list[str]]:
    """The lines of the table, its head first. A ``*`` in ``against``: what is behind its comma."""
    head = ["cell", "seeds", "accuracy %", "virtual s"]
    for target in targets:
        head += [f"s to {100 * target:g} %", "times sooner"]
    lines = [[*head, "idle %", "idle %, last half", "pruned %"]]
    for cell, own in runs.items():
        base = against.replace("*", cell.split(",")[-1].strip())
        other = {r["seed"]: r for r in runs.get(base, [])}
        line = [
            cell,
            str(len(own)),
            spread([r["accuracy"]["own"] for r in own], 1, 100),
            seconds([sum(r["fleet"]["rounds"]) for r in own]),
        ]
        for target in targets:
            when = {r["seed"]: reached(r["fleet"]["curve"], target) for r in own}
            both = [
                reached(other[seed]["fleet"]["curve"], target) / own_time
                for seed, own_time in when.items()
                if seed in other and cell != base
            ]
            line += [seconds([*when.values()]), spread(both, 2)]
        idle = [r["fleet"]["idle"] for r in own]
        gone = [f.get("gone_mean", 0.0) for r in own for f in r["fleet"]["figures"]]
        line.append(spread([statistics.mean(v) for v in idle], 0, 100))
        line.append(spread([statistics.mean(v[len(v) // 2 :]) for v in idle], 0, 100))
        lines.append([*line, spread(gone, 0, 100)])
    return lines


def _table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("table", HERE / "table.py")
    assert spec is not None and spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("study")
    parser.add_argument("--against", required=True)
    parser.add_argument("--targets", nargs="+", type=float, required=True)
    asked = parser.parse_args()
    if not (HERE / asked.study / "results.jsonl").exists():
        parser.error(f"{asked.study}: no study with results in {HERE}. Run run.py {asked.study}.")
    table = _table()
    runs: dict[str, list[dict[str, Any]]] = table.read(asked.study)
    if any("fleet" not in run for own in runs.values() for run in own):
        parser.error(f"{asked.study} was run without a fleet, so without a clock: use table.py.")
    if "*" not in asked.against and asked.against not in runs:
        parser.error(f"--against {asked.against!r} is no cell with results: {', '.join(runs)}")
    table.show(rows_of(runs, asked.against, asked.targets))


if __name__ == "__main__":
    main()
