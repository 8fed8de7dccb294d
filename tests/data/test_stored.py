"""A recipe that names a store gets the store's clients, or is told why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fedpeft.config import Data, Model, Partition, Recipe
from fedpeft.data.build import build_population
from fedpeft.data.clients import Population
from fedpeft.data.store_writer import write_store
from fedpeft.data.stored import origin_of, stored_population, tokenizer_digest
from tests.tiny import tiny_population

Fast = PreTrainedTokenizerFast
MADE = Recipe(
    model=Model(name="somebody/bert"),
    data=Data(source="x.jsonl", max_length=16, client="who"),
    partition=Partition(kind="dirichlet", clients=4),
)


@pytest.fixture(scope="module")
def population() -> Population:
    return tiny_population((5, 9, 3, 12))


@pytest.fixture
def data(population: Population, encoder_tokenizer: Fast, tmp_path: Path) -> Data:
    """A recipe's section that names a store of MADE's."""
    write_store(population, tmp_path / "s", origin_of(MADE, encoder_tokenizer))
    return Data(source=str(tmp_path / "s"))


@pytest.mark.parametrize(
    "partition",
    [
        Partition(),
        MADE.partition,
        Partition(kind="natural", clients=0),
        Partition(kind="natural", clients=4),
    ],
    ids=str,
)
def test_the_clients_are_the_stores(
    data: Data, partition: Partition, population: Population, encoder_tokenizer: Fast
) -> None:
    for given in (data, replace(MADE.data, source=data.source), replace(data, max_length=16)):
        found = build_population(given, partition, encoder_tokenizer, seed=7)
        assert list(found.clients.names) == ["c0", "c1", "c2", "c3"]
        assert found.labels == population.labels


@pytest.mark.parametrize(
    ("edit", "partition", "parts"),
    [
        ({}, Partition(clients=5), ["partition.clients=5", "partition.clients=4", "Leave it out"]),
        ({}, Partition(kind="iid", alpha=0.1), ["partition.alpha=0.1", "partition.alpha=0.5"]),
        ({}, Partition(kind="natural", clients=3), ["partition.kind='natural'", "dirichlet"]),
        ({"max_length": 8}, Partition(), ["data.max_length=8", "data.max_length=16"]),
        ({"client": "user"}, Partition(), ["data.client='user'", "data.client='who'"]),
        ({"limit": 10}, Partition(), ["data.limit=10"]),
        ({"task": "causal_lm"}, Partition(), ["data.task=causal_lm", "data.task=classification"]),
    ],
)
def test_settings_for_other_clients_are_refused(
    data: Data,
    edit: dict[str, Any],
    partition: Partition,
    parts: list[str],
    encoder_tokenizer: Fast,
    refuses: Any,
) -> None:
    with refuses(*parts):
        stored_population(replace(data, **edit), partition, encoder_tokenizer)


def test_another_tokenizer_is_refused(data: Data, decoder_tokenizer: Fast, refuses: Any) -> None:
    changed = PreTrainedTokenizerFast(
        tokenizer_object=decoder_tokenizer.backend_tokenizer, additional_special_tokens=["<new>"]
    )
    with refuses("model.name='somebody/bert'", "has another", "Use that model"):
        stored_population(data, Partition(), changed)


def test_tokens_beyond_the_vocabulary_are_refused(
    tmp_path: Path, encoder_tokenizer: Fast, refuses: Any
) -> None:
    """A store of no tokenizer, such as a synthetic one, must still fit the model."""
    population = tiny_population((3,))
    population.examples.tokens[0] = len(encoder_tokenizer)
    write_store(population, tmp_path / "s")
    size = len(encoder_tokenizer)
    with refuses(f"has the token {size}", f"only {size}"):
        stored_population(Data(source=str(tmp_path / "s")), Partition(), encoder_tokenizer)


def test_a_tokenizer_has_one_digest(encoder_tokenizer: Fast, decoder_tokenizer: Fast) -> None:
    assert tokenizer_digest(encoder_tokenizer) == tokenizer_digest(decoder_tokenizer)  # same words
    assert len(tokenizer_digest(encoder_tokenizer)) == 16
