"""The studies: every cell is a recipe that loads, a run gives a line, tables say what lines do."""

from __future__ import annotations

import importlib.util
import json
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
    asked = shlex.split(next(ln for ln in text.splitlines() if "table.py" in ln).strip("`"))
    against = asked[asked.index("--against") + 1] if "--against" in asked else "fedavg"
    clients = int(asked[asked.index("--clients") + 1]) if "--clients" in asked else 10
    for line in table.rows_of(table.read(name), against, clients):
        assert "| " + " | ".join(line) + " |" in text


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
    finally:
        torch.set_num_threads(threads)
    assert {"own", "untrained"} == set(lines[0]["accuracy"]) and set(lines[2]["accuracy"]) == {
        "own"
    }
    assert sum(lines[2]["bytes_up"].values()) < sum(lines[0]["bytes_up"].values())
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
