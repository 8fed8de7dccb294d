"""How many processes train, and what of it a run records."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fedpeft.config import Engine
from fedpeft.prepare import Prepared, prepare
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
