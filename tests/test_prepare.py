"""How many processes train, and what of it a run records."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from fedpeft import tree
from fedpeft.config import Engine, Recipe
from fedpeft.errors import FedpeftError
from fedpeft.prepare import Prepared, prepare
from fedpeft.strategy import Cohort, Messages
from tests.tiny import tiny_recipe, write_tiny


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    engine = Engine(device="cpu", threads=1)
    return prepare(dataclasses.replace(tiny_recipe(folder), engine=engine))


def on(prepared: Prepared, engine: Engine, device: str) -> Prepared:
    """As prepared with another engine and the network on another device."""
    network = dataclasses.replace(prepared.network, device=torch.device(device))
    recipe = dataclasses.replace(prepared.recipe, engine=engine)
    return dataclasses.replace(prepared, network=network, recipe=recipe)


@pytest.mark.parametrize(
    ("engine", "device", "gpus", "wanted"),
    [
        (Engine(), "cpu", 4, 1),
        (Engine(), "cuda", 4, 4),
        (Engine(), "cuda", 1, 1),
        (Engine(device="cuda:2"), "cuda:2", 4, 1),
        (Engine(workers=1), "cuda", 4, 1),
        (Engine(workers=16), "cuda", 4, 16),
        (Engine(workers=2), "cpu", 0, 2),
        (Engine(kind="sequential"), "cuda", 4, 1),
        (Engine(kind="flower", workers=5), "cuda", 4, 1),
    ],
)
def test_one_worker_per_gpu_unless_the_recipe_says_otherwise(
    prepared: Prepared,
    monkeypatch: pytest.MonkeyPatch,
    engine: Engine,
    device: str,
    gpus: int,
    wanted: int,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert on(prepared, engine, device).workers == wanted


def test_the_number_of_workers_is_recorded(prepared: Prepared) -> None:
    assert prepared.resolved().engine.workers == 1
    assert on(prepared, Engine(workers=3), "cpu").resolved().engine.workers == 3
    flower = on(prepared, Engine(kind="flower"), "cpu")
    assert flower.resolved().engine.workers == 0  # one per core: Flower's own meaning


@pytest.fixture
def with_public(tmp_path: Path) -> Recipe:
    """All rows again, as a split of the server's own; clients hold nothing back."""
    write_tiny(tmp_path)
    shutil.copy(tmp_path / "data.jsonl", tmp_path / "own.jsonl")
    recipe = tiny_recipe(tmp_path, name="fed_sb", start="public")
    data = dataclasses.replace(recipe.data, public="own", holdout=0.0, test="own")
    return dataclasses.replace(recipe, data=data, engine=Engine(device="cpu", threads=1))


def test_the_gradient_on_public_data_is_that_of_whoever_holds_the_same_rows(
    with_public: Recipe,
) -> None:
    """The mean over all rows: the clients' gradients, weighted by their examples."""
    whole = prepare(with_public)
    public = whole.problem.public_gradients()
    plain = dataclasses.replace(with_public, strategy={"name": "centralised"})
    plain = dataclasses.replace(plain, data=dataclasses.replace(plain.data, public=None))
    pooled = prepare(plain)
    assert whole.population.fingerprint != pooled.population.fingerprint
    assert whole.population.public is not None and pooled.population.public is None
    (everyone,) = pooled.population.clients
    found: list[tree.Tree] = []

    def work(messages: Messages, cohort: Cohort) -> Messages:
        found.append(cohort.weight_gradients(messages.trees["adapter"]))
        return messages.reply({}, weight=cohort.weights)

    object.__setattr__(pooled.strategy, "train", work)
    sent = pooled.strategy.send(pooled.strategy.init(pooled.problem), 1, (everyone.name,))
    list(pooled.federation().run(1, sent))
    for name, gradient in tree.row(found[0], 0).items():
        assert torch.allclose(public[name], gradient, rtol=1e-4, atol=1e-6)
        assert float(public[name].norm()) > 0


def test_a_public_split_that_is_not_there_is_refused_under_its_own_name(
    with_public: Recipe,
) -> None:
    data = dataclasses.replace(with_public.data, public="onw")
    with pytest.raises(FedpeftError, match=r"data\.public='onw'"):
        prepare(dataclasses.replace(with_public, data=data))
