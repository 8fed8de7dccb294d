"""Clients' own models of a run: loaded again, and what the run's evaluation used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedpeft.cli.app import app
from fedpeft.config import Engine, Output, Recipe, Rounds
from fedpeft.errors import FedpeftError
from fedpeft.events import Watcher
from fedpeft.exports import NOTE, export_clients
from fedpeft.pruned import load
from fedpeft.run import run
from tests.tiny import tiny_recipe, write_tiny

LORA = {"kind": "lora", "r": 4, "target_modules": ["query", "key", "value", "dense"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run of FedSpine on four clients."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    recipe = tiny_recipe(folder, LORA, name="fedspine", step=0.9, target=0.5)
    recipe = dataclasses.replace(
        recipe,
        rounds=Rounds(count=4),
        engine=Engine(device="cpu", threads=1),
        output=Output(folder=str(folder / "run")),
        baselines=(),
    )
    run(recipe, Watcher())
    return recipe


def test_every_client_gets_its_own_smaller_model(made: Recipe, tmp_path: Path) -> None:
    found = export_clients(Path(made.output.folder), tmp_path / "out", [])
    assert found == json.loads((tmp_path / "out" / NOTE).read_text())
    assert [own["client"] for own in found.values()] == ["c0", "c1", "c2", "c3"]
    rows, sizes = torch.arange(2, 8)[None], {}
    for place, own in found.items():
        model = load(tmp_path / "out" / place)
        with torch.no_grad():
            logits = model(input_ids=rows).logits
        assert logits.shape == (1, 3) and bool(logits.isfinite().all())
        sizes[own["gone"]] = sum(p.numel() for p in model.parameters())
    assert max(sizes) >= 0.4 and all(isinstance(gone, float) for gone in sizes)
    assert len(sizes) == 1 or sizes[max(sizes)] < sizes[min(sizes)]


def test_the_command_writes_the_clients_that_are_named(made: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = CliRunner().invoke(app, ["export", made.output.folder, str(out), "c2"])
    assert found.exit_code == 0 and "1 models" in found.output
    assert {p.name for p in out.iterdir()} == {"000002", NOTE}


def test_wrong_names_and_used_folders_are_refused(made: Recipe, tmp_path: Path) -> None:
    run_folder = Path(made.output.folder)
    with pytest.raises(FedpeftError, match="client 'c9' is not in"):
        export_clients(run_folder, tmp_path / "out", ["c9"])
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(FedpeftError, match="is not empty"):
        export_clients(run_folder, tmp_path / "used", [])
