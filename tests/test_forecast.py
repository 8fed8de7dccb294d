"""What is forecast is what a run sends, to the byte; a budget ends a run before it is overdrawn."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpeft.codecs.settings import Codec
from fedpeft.config import Comms, Engine, Output, Recipe, Rounds, Sampling, SecureAggregation
from fedpeft.events import Watcher
from fedpeft.forecast import BytesSpentError, forecast
from fedpeft.prepare import prepare
from fedpeft.run import run
from fedpeft.strategy import Strategy, available, build
from tests.tiny import tiny_recipe, write_tiny

SETTINGS: dict[str, dict[str, Any]] = {
    "flora": {"ranks": [1, 2]},
    "hetlora": {"ranks": [1, 2]},
    "flexlora": {"ranks": [1, 2]},
    "fed_plora": {"ranks": [1, 2]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    yield folder


def recipe_of(folder: Path, out: Path, name: str = "fedavg", **changes: Any) -> Recipe:
    recipe = tiny_recipe(folder, name=name, **SETTINGS.get(name, {}))
    changes.setdefault(
        "rounds", Rounds(count=3, sampling=Sampling("uniform", fraction=0.75), failure_rate=0.2)
    )
    local = {key.removeprefix("local."): v for key, v in build_of(name).needs().items()}
    local = {key: v for key, v in local.items() if "." not in key}
    if build_of(name).walks:
        local["steps"] = 2
    return dataclasses.replace(
        recipe,
        local=dataclasses.replace(recipe.local, **local),
        engine=Engine(device="cpu", threads=1),
        output=Output(folder=str(out / "run")),
        baselines=(),
        **changes,
    )


def build_of(name: str) -> Strategy[Any]:
    return build(name, SETTINGS.get(name, {}))


def spent(recipe: Recipe) -> tuple[dict[str, int], dict[str, int]]:
    summary = run(recipe, Watcher())
    own = summary.rows[0]
    return own.down, own.up


@pytest.mark.parametrize("name", sorted(available()))
def test_a_run_sends_what_was_forecast(folder: Path, tmp_path: Path, name: str) -> None:
    recipe = recipe_of(folder, tmp_path, name)
    found = forecast(prepare(recipe))
    assert found.exact == ("pruned" not in build_of(name).asks())
    assert (found.down, found.up) == spent(recipe)
    assert sum(found.rounds) == sum(found.down.values()) + sum(found.up.values())


@pytest.mark.parametrize(
    "comms",
    [
        Comms(up=Codec("topk", positions="coo"), down=Codec("dense", "int8")),
        Comms(up=Codec("randk", "fp16"), down=Codec("topk", form="weights", positions="bitmask")),
        Comms(up=Codec("powersgd", rank=1)),
    ],
    ids=["topk-int8", "randk-flasc", "powersgd"],
)
def test_codecs_of_fixed_length_too(folder: Path, tmp_path: Path, comms: Comms) -> None:
    recipe = recipe_of(folder, tmp_path, comms=comms)
    found = forecast(prepare(recipe))
    assert found.exact and (found.down, found.up) == spent(recipe)


def test_what_depends_on_the_numbers_is_no_more_than_typical(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, tmp_path, comms=Comms(up=Codec("compeft", density=0.2)))
    found = forecast(prepare(recipe))
    _, up = spent(recipe)
    assert not found.exact
    assert abs(sum(found.up.values()) / sum(up.values()) - 1) < 0.1


def test_masked_replies_too(folder: Path, tmp_path: Path) -> None:
    secure = SecureAggregation(enabled=True)
    recipe = recipe_of(
        folder, tmp_path, secure_aggregation=secure, rounds=Rounds(count=2, weighting="equal")
    )
    found = forecast(prepare(recipe))
    assert found.exact and (found.down, found.up) == spent(recipe)


def test_a_forecast_remembers_nothing_for_the_run(folder: Path, tmp_path: Path) -> None:
    comms = Comms(up=Codec("topk"), down=Codec("topk", density=0.2))
    prepared = prepare(recipe_of(folder, tmp_path, comms=comms))
    assert forecast(prepared) == forecast(prepared)
    assert prepared.downlink is not None and not prepared.downlink.held


def test_a_budget_ends_a_run_before_it_is_overdrawn(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, tmp_path)
    first, second, _ = forecast(prepare(recipe)).rounds
    enough = dataclasses.replace(recipe, comms=Comms(budget=f"{first + second} B"))
    summary = run(enough, Watcher())
    own = summary.rows[0]
    assert summary.rounds == 2 and Path(summary.adapter).is_dir()
    assert sum(own.down.values()) + sum(own.up.values()) == first + second
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (note,) = [line["text"] for line in lines if line["kind"] == "note"]
    assert note.startswith("stopped before round 3: it would send") and "comms.budget" in note


def test_a_budget_that_pays_for_no_round_is_an_error(folder: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipe_of(folder, tmp_path), comms=Comms(budget="1 kB"))
    with pytest.raises(BytesSpentError, match=r"round 1.*1,000 of comms\.budget.*comms\.up"):
        run(recipe, Watcher())
    assert not (tmp_path / "run").exists()
