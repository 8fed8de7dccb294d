"""Canaries: what is added, to whom, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpeft.audit.canaries import coins, cosines, directions, plant, stream_of
from fedpeft.config import Data, Partition
from fedpeft.data.build import build_population
from fedpeft.data.clients import Clients, Population
from fedpeft.data.examples import Examples, flatten
from fedpeft.data.fingerprint import sealed
from fedpeft.errors import FedpeftError
from fedpeft.model import load_tokenizer
from fedpeft.prepare import prepare_store
from fedpeft.tree import Layout, row
from tests.tiny import CLASSES, tiny_population, tiny_recipe, write_tiny


def rows(examples: Examples, index: np.ndarray) -> list[list[int]]:
    starts = examples.starts.tolist()
    return [examples.tokens[starts[i] : starts[i + 1]].tolist() for i in index.tolist()]


def texts(examples: Examples) -> set[tuple[int, ...]]:
    return {tuple(own) for own in rows(examples, np.arange(len(examples)))}


def population(task: str = "classification") -> Population:
    found = tiny_population((5, 9, 3, 12))
    if task == "classification":
        return found
    plain = dataclasses.replace(found.examples, labels=None)
    return dataclasses.replace(found, task="causal_lm", examples=plain, labels=())


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_who_is_in_is_trained_on_and_nobody_else(task: str) -> None:
    before = population(task)
    planted = plant(before, 90, stream_of(3))
    after = planted.population
    first = len(before.examples)
    assert planted.index.tolist() == list(range(first, first + 90))
    assert len(after.examples) == first + 90
    for k, (old, new) in enumerate(zip(before.clients, after.clients, strict=True)):
        own = planted.index[planted.included & (planted.owner == k)]
        assert new.name == old.name
        assert new.train.tolist() == [*old.train.tolist(), *own.tolist()]
        assert new.holdout.tolist() == old.holdout.tolist()
    assert np.bincount(planted.owner, minlength=4).min() >= 22  # nearly as many to each
    assert after.clients.roster["c1"] == len(after.clients.find("c1").train)


def test_what_was_there_stays_and_the_fingerprint_tells_it_apart() -> None:
    before = population()
    planted = plant(before, 10, stream_of(0))
    after = planted.population
    old = np.arange(len(before.examples))
    assert rows(after.examples, old) == rows(before.examples, old)
    assert before.examples.labels is not None and after.examples.labels is not None
    assert after.examples.labels[: len(old)].equal(before.examples.labels)
    assert after.test is before.test
    assert after.fingerprint == sealed(after).fingerprint != sealed(before).fingerprint
    assert plant(before, 10, stream_of(0)).population.fingerprint == after.fingerprint
    assert plant(before, 10, stream_of(1)).population.fingerprint != after.fingerprint


def test_canaries_are_random_between_the_ends_of_an_example() -> None:
    before = population()
    planted = plant(before, 200, stream_of(0))
    made = rows(planted.population.examples, planted.index)
    ends = {(own[0], own[-1], len(own)) for own in texts(before.examples)}
    assert {(own[0], own[-1], len(own)) for own in made} <= ends
    assert min(map(len, made)) >= 3
    words = {word for own in texts(before.examples) for word in own}
    inside = [word for own in made for word in own[1:-1]]
    assert set(inside) == words and np.bincount(inside).max() < 3 * len(inside) / len(words)
    assert len({tuple(own) for own in made} - texts(before.examples)) > 180
    labels = planted.population.examples.labels
    assert labels is not None and labels.dtype == torch.int64
    counts = np.bincount(labels[planted.index].numpy(), minlength=CLASSES)
    assert counts.min() > 200 / CLASSES * 0.7


def test_coins_are_fair_and_do_not_hang_on_the_label() -> None:
    assert 0.49 < coins(100_000, stream_of(0)).mean() < 0.51
    planted = plant(population(), 2000, stream_of(1))
    labels = planted.population.examples.labels
    assert labels is not None
    own = labels[planted.index].numpy()
    for label in range(CLASSES):
        assert planted.included[own == label].mean() == pytest.approx(0.5, abs=0.07)


def test_without_a_seed_every_audit_has_its_own_canaries() -> None:
    one, other = (coins(128, stream_of(None)) for _ in range(2))
    assert not np.array_equal(one, other)
    assert np.array_equal(coins(128, stream_of(5)), coins(128, stream_of(5)))


def test_the_clients_of_a_store(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    recipe = tiny_recipe(tmp_path)
    prepare_store(recipe, str(tmp_path / "store"))
    data = Data(source=str(tmp_path / "store"))
    tokenizer = load_tokenizer(recipe.model, "classification")
    before = build_population(data, Partition(), tokenizer, 0)
    assert before.examples.limits is not None
    planted = plant(before, 20, stream_of(0))
    for client in planted.population.clients:
        planted.population.examples.batch(torch.from_numpy(client.train)[None])
    joined = np.concatenate([client.train for client in planted.population.clients])
    assert set(planted.index[planted.included]) == set(joined[joined >= len(before.examples)])


def test_what_is_refused() -> None:
    with pytest.raises(FedpeftError, match="canaries=1: at least 2"):
        plant(population(), 1, stream_of(0))
    short = flatten([[1, 2], [3]], [0, 1], 0)
    clients = Clients.of(population().clients[:1])
    with pytest.raises(FedpeftError, match="no example has 3 tokens or more"):
        plant(dataclasses.replace(population(), examples=short, clients=clients), 4, stream_of(0))


LAYOUT = Layout(("a", "b"), ((40, 30), (300,)))


def test_directions_are_of_length_1_and_nearly_orthogonal() -> None:
    found = directions(50, LAYOUT, stream_of(0))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "a": (50, 40, 30),
        "b": (50, 300),
    }
    matrix = LAYOUT.pack(found).double()
    gram = matrix @ matrix.T
    torch.testing.assert_close(gram.diagonal(), torch.ones(50).double(), atol=1e-6, rtol=0)
    others = gram - torch.diag(gram.diagonal())
    assert float(others.abs().max()) < 5 / math.sqrt(LAYOUT.size)
    assert float(others.std()) * math.sqrt(LAYOUT.size) == pytest.approx(1, abs=0.1)


def test_cosines_are_those_of_flat_vectors() -> None:
    stacked = directions(5, LAYOUT, stream_of(1))
    update = {name: 3 * value for name, value in row(stacked, 2).items()}
    update["b"] = update["b"] + 0.1
    flat = np.concatenate([update["a"].numpy().ravel(), update["b"].numpy()]).astype(np.float64)
    for k, found in enumerate(cosines(update, stacked)):
        own = np.concatenate([stacked["a"][k].numpy().ravel(), stacked["b"][k].numpy()])
        wanted = own.astype(np.float64) @ flat / np.linalg.norm(own) / np.linalg.norm(flat)
        assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("factor", [0.0, math.nan])
def test_an_update_without_direction(factor: float) -> None:
    stacked = directions(3, LAYOUT, stream_of(1))
    update = {name: factor * value for name, value in row(stacked, 0).items()}
    with pytest.raises(FedpeftError, match="has no direction"):
        cosines(update, stacked)
