"""The server of a deployment: privacy and secure aggregation as in ``fedpeft run``, on its own."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from fedpeft.config import Output, Privacy, Recipe, Rounds, Sampling, SecureAggregation
from fedpeft.config_load import dump_recipe
from fedpeft.engine import Seam, play_round
from fedpeft.errors import FedpeftError
from fedpeft.flower.client_app import app
from fedpeft.flower.server_app import main
from fedpeft.model import save_adapter
from fedpeft.prepare import prepare
from fedpeft.privacy.ledger import Budget, Ledger
from tests.flower.nodes import InProcess
from tests.flower.securely import NAMES, in_process, one_by_one, recipe_of, write_keys
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.usefixtures("flower_task")


def at(recipe: Recipe, folder: Path) -> Recipe:
    return dataclasses.replace(recipe, output=Output(folder=str(folder / "run")))


def serve(recipe: Recipe, grid: InProcess, folder: Path, **config: str) -> Path:
    """Runs the server; the run folder."""
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    run_config: Any = {
        "recipe": str(folder / "recipe.yaml"),
        "join-timeout": 0.05,
        "reply-timeout": 5.0,
        "enough": 1.0,
        "identities": "",
        **config,
    }
    main(grid, Context(1, 0, {}, RecordDict(), run_config))
    return Path(recipe.output.folder)


def named(**config: str) -> dict[int, dict[str, Any]]:
    return {k: {"client": name, **config} for k, name in enumerate(NAMES)}


def test_secure_aggregation_on_real_nodes_gives_the_adapter_of_one_process(
    tiny: Path, tmp_path: Path
) -> None:
    recipe = at(recipe_of(tiny), tmp_path)
    grid = InProcess(write_keys(tmp_path / "keys"), app=app)
    folder = serve(recipe, grid, tmp_path, identities=str(tmp_path / "keys" / "all.json"))
    federation, prepared = in_process(recipe), prepare(one_by_one(recipe))
    state = prepared.strategy.init(prepared.problem)
    for number in (1, 2):
        state, _ = play_round(
            prepared.strategy, state, federation, recipe.rounds, 0, number, Seam(prepared.post)
        )
    adapter = prepared.strategy.adapter(state)
    save_adapter(prepared.network, adapter, tmp_path / "wanted", recipe.model.name)
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    wanted = load_file(tmp_path / "wanted" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys() and len(found) > 2
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {kind for kind, _ in grid.answers} == {"query", "train.secure"}


def test_secure_aggregation_needs_the_servers_list_of_keys(tiny: Path, tmp_path: Path) -> None:
    grid = InProcess(write_keys(tmp_path / "keys"), app=app)
    with pytest.raises(FedpeftError, match="needs run config identities=FILE on the server"):
        serve(at(recipe_of(tiny), tmp_path), grid, tmp_path)
    assert grid.seen == []


def test_client_level_noise_is_in_the_adapter_and_its_price_in_the_ledger(
    tiny: Path, tmp_path: Path
) -> None:
    privacy = Privacy(unit="client", noise_multiplier=4.0, clip_norm=1.0, delta=1e-3)
    rounds = Rounds(count=2, weighting="equal")
    recipe = dataclasses.replace(tiny_recipe(tiny), privacy=privacy, rounds=rounds)
    folder = serve(at(recipe, tmp_path), InProcess(named(), app=app), tmp_path)
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    size = sum(value.numel() for value in adapter.values())
    norm = sum(float(value.square().sum()) for value in adapter.values()) ** 0.5
    assert norm > 0.5 * (2 * size) ** 0.5  # of two rounds' noise, of std 1 per number each
    promise = json.loads((tmp_path / "privacy.json").read_text())
    with Ledger.open(tmp_path / "privacy.jsonl", Budget(1e6, 1e-3)) as ledger:
        assert ledger.clients() == list(NAMES)
        assert ledger.epsilon("c0") == pytest.approx(promise["epsilon"][0])
    assert promise["epsilon"][0] > 0


def test_a_server_that_starts_again_goes_on_with_its_ledger(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    privacy = Privacy(unit="record", noise_multiplier=1.0, clip_norm=0.5, delta=1e-3, max_rounds=2)
    recipe = at(dataclasses.replace(tiny_recipe(tiny), privacy=privacy), tmp_path)
    (tmp_path / "nodes").mkdir()
    config = {
        k: {"client": name, "privacy-ledger": str(tmp_path / "nodes" / f"{name}.jsonl")}
        for k, name in enumerate(NAMES)
    }
    serve(recipe, InProcess(config, app=app), tmp_path)
    before = (tmp_path / "privacy.jsonl").read_bytes()
    grid = InProcess(config, app=app)
    with caplog.at_level(logging.WARNING, "flwr.fedpeft"):
        serve(recipe, grid, tmp_path)
    assert "stopped before round 1: of 4 clients that were drawn 0 have privacy" in caplog.text
    assert (tmp_path / "privacy.jsonl").read_bytes() == before
    assert {path.name for path in tmp_path.glob("run*")} == {"run", "run-001"}
    assert {kind for kind, _ in grid.answers} == {"query"}


def test_a_run_that_is_charged_as_a_whole_is_not_begun_again(tiny: Path, tmp_path: Path) -> None:
    privacy = Privacy(unit="client", noise_multiplier=4.0, delta=1e-3, bands=-1)
    sampling = Sampling(kind="cyclic", groups=2)
    rounds = Rounds(count=2, weighting="equal", sampling=sampling)
    recipe = at(dataclasses.replace(tiny_recipe(tiny), privacy=privacy, rounds=rounds), tmp_path)
    serve(recipe, InProcess(named(), app=app), tmp_path)
    grid = InProcess(named(), app=app)
    with pytest.raises(FedpeftError, match="with privacy.bands a run is charged as a whole"):
        serve(recipe, grid, tmp_path)
    assert grid.seen == []


def test_without_protection_there_is_no_ledger(tiny: Path, tmp_path: Path) -> None:
    recipe = at(tiny_recipe(tiny), tmp_path)
    assert recipe.secure_aggregation == SecureAggregation()
    folder = serve(recipe, InProcess(named(), app=app), tmp_path)
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert not list(tmp_path.rglob("privacy.json*"))
