"""The studies: every cell is a recipe that loads, a run gives a line, tables say what lines do."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fedpeft.config import Engine, Evaluation
from fedpeft.config_load import dump_recipe, load_recipe
from tests.tiny import tiny_recipe, write_tiny

STUDIES = Path(__file__).parents[1] / "experiments" / "studies"
NAMES = sorted(path.parent.name for path in STUDIES.glob("*/cells.json"))
DONE = sorted(
    path.parent.name
    for path in STUDIES.glob("*/cells.json")
    if (path.parent / "results.jsonl").exists()
)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"study_{name}", STUDIES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_is_a_recipe_that_loads(name: str) -> None:
    cells: dict[str, list[str]] = json.loads((STUDIES / name / "cells.json").read_text())
    assert cells
    for changes in cells.values():
        load_recipe(str(STUDIES / name / "recipe.yaml"), changes)


@pytest.mark.parametrize("name", DONE)
def test_the_table_in_the_readme_is_that_of_the_results(name: str) -> None:
    table, text = script("table"), (STUDIES / name / "README.md").read_text()
    said = [ln.strip("`") for ln in text.splitlines() if "table.py" in ln or "clock.py" in ln]
    asked = shlex.split(said[0])
    if "clock.py" in said[0]:
        targets = [float(value) for value in asked[asked.index("--targets") + 1 :]]
        own = (asked[asked.index("--against") + 1], targets)
        for line in script("clock").rows_of(table.read(name), *own):
            assert "| " + " | ".join(line) + " |" in text
        return
    against = asked[asked.index("--against") + 1] if "--against" in asked else "fedavg"
    clients = int(asked[asked.index("--clients") + 1]) if "--clients" in asked else 10
    for line in table.rows_of(table.read(name), against, clients):
        assert "| " + " | ".join(line) + " |" in text


def test_times_to_a_target_are_between_two_measurements_and_compared_by_seed() -> None:
    clock = script("clock")
    assert clock.reached([[10, 0.2], [20, 0.6], [30, 0.5]], 0.4) == pytest.approx(15)
    assert clock.reached([[10, 0.2]], 0.1) == pytest.approx(5)
    assert math.isnan(clock.reached([[10, 0.2], [20, 0.3]], 0.4))

    def line(seed: int, pace: float) -> dict[str, Any]:
        curve = [[10 * pace, 0.2], [20 * pace, 0.6]]
        fleet = {"rounds": [10 * pace] * 2, "idle": [0.5, 0.25], "curve": curve, "figures": []}
        return {"seed": seed, "accuracy": {"own": 0.6}, "fleet": fleet}

    runs = {"slow": [line(0, 2.0), line(1, 4.0)], "fast": [line(0, 1.0), line(1, 1.0)]}
    head, slow, fast = clock.rows_of(runs, "slow", [0.4, 0.7])
    assert len(head) == len(slow) == len(fast)
    assert slow[3:6] == ["60 ± 28", "45 ± 21", ""] and slow[6:8] == ["never", ""]
    assert fast[4:6] == ["15.00 ± 0.00", "3.00 ± 1.41"] and fast[-3:] == ["38 ± 0", "25 ± 0", ""]


def test_a_run_gives_a_line_and_the_table_its_mean_and_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, table = script("run"), script("table")
    for module in (run, table):
        monkeypatch.setattr(module, "HERE", tmp_path)
    write_tiny(tmp_path)
    (tmp_path / "study").mkdir()
    recipe = replace(tiny_recipe(tmp_path), engine=Engine(device="cpu"))
    recipe = replace(recipe, baselines=(), evaluation=Evaluation(clients=False))
    (tmp_path / "study" / "recipe.yaml").write_text(dump_recipe(recipe))
    cells = {"fedavg": ["baselines=[untrained]"], "frozen": ["strategy.name=ffa_lora"]}
    (tmp_path / "study" / "cells.json").write_text(json.dumps(cells))
    threads = torch.get_num_threads()
    try:
        lines: list[dict[str, Any]] = [
            run.play("study", cell, changes, seed)
            for cell, changes in cells.items()
            for seed in (0, 1)
        ]
        clock = run.play("study", "timed", ["fleet={preset: rpi4}"], 0)["fleet"]
    finally:
        torch.set_num_threads(threads)
    assert {"own", "untrained"} == set(lines[0]["accuracy"]) and set(lines[2]["accuracy"]) == {
        "own"
    }
    assert sum(lines[2]["bytes_up"].values()) < sum(lines[0]["bytes_up"].values())
    assert "fleet" not in lines[0] and len(clock["rounds"]) == len(clock["idle"]) == 2
    assert clock["curve"][-1][0] == pytest.approx(sum(clock["rounds"]), abs=1e-3)
    other = {**lines[0], "seed": 9, "changes": ["local.lr=1"]}
    text = "".join(json.dumps(line) + "\n" for line in [*lines, other])
    (tmp_path / "study" / "results.jsonl").write_text(text)
    _, *rows = table.rows_of(table.read("study"), "fedavg", 4)
    assert [row[0] for row in rows] == ["untrained", "fedavg", "frozen"]
    assert [row[2] for row in rows] == ["2", "2", "2"], "a run of other settings does not count"
    assert rows[2][3], "the difference to fedavg, seed by seed"
    assert table.spread([0.5, 0.7]) == "60.0 ± 14.1" and table.spread([0.5]) == "50.0"


def test_a_star_compares_a_cell_with_its_own_reference() -> None:
    scores = {"a, inf": 0.9, "a, 1": 0.8, "b, inf": 0.7, "b, 1": 0.4}
    sent: dict[str, Any] = {"changes": [], "clients": {}, "bytes_down": {}, "bytes_up": {}}
    runs = {cell: [{"seed": 0, "accuracy": {"own": x}, **sent}] for cell, x in scores.items()}
    _, *rows = script("table").rows_of(runs, "*, inf", 1)
    assert [row[3] for row in rows] == ["", "-10.0", "", "-30.0"]
