"""Tests of populations: hold-outs, the test set, fingerprints, pooling, real data."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedpeft.config import Data, Partition
from fedpeft.data.build import build_population, pool
from fedpeft.data.clients import ClientData, Population
from fedpeft.data.examples import Examples

Fast = PreTrainedTokenizerFast
Write = Callable[..., str]


def text(i: int) -> str:
    return " ".join(f"w{(i * 7 + j) % 50}" for j in range(1 + i % 5))


@pytest.fixture
def source(write: Write) -> str:
    """A folder: 120 training rows of 4 labels and 6 speakers, 10 test rows."""
    rows = [{"text": text(i), "label": f"l{i % 4}", "who": f"s{i % 6}"} for i in range(120)]
    write("d/test.jsonl", rows[:10])
    return str(Path(write("d/train.jsonl", rows)).parent)


def unpacked(examples: Examples) -> list[list[int]]:
    starts = examples.starts.tolist()
    return [examples.tokens[a:b].tolist() for a, b in pairwise(starts)]


def everyone(population: Population) -> np.ndarray:
    return np.concatenate([np.concatenate([c.train, c.holdout]) for c in population.clients])


PARTITIONS = [
    Partition(kind="iid", clients=5),
    Partition(kind="dirichlet", clients=5),
    Partition(kind="shard", clients=5),
    Partition(kind="pathological", clients=5),
    Partition(kind="natural", clients=6),
]


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: p.kind)
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_no_example_is_in_two_places(
    source: str, encoder_tokenizer: Fast, decoder_tokenizer: Fast, partition: Partition, task: Any
) -> None:
    tokenizer = encoder_tokenizer if task == "classification" else decoder_tokenizer
    data = Data(source=source, client="who", task=task, max_length=5)
    population = build_population(data, partition, tokenizer, 0)
    assert sorted(everyone(population)) == list(range(len(population.examples)))
    for client in population.clients:
        total = len(client.train) + len(client.holdout)
        assert len(client.holdout) == int(total * 0.2)
        assert client.train.dtype == client.holdout.dtype == np.int64
    assert population.labels == (("l0", "l1", "l2", "l3") if task == "classification" else ())


def test_examples_are_the_clients_own_rows(source: str, encoder_tokenizer: Fast) -> None:
    population = build_population(
        Data(source=source, client="who", test="test", max_length=16),
        Partition(kind="natural", clients=0),
        encoder_tokenizer,
        0,
    )
    encoded = [[1, *(6 + int(w[1:]) for w in text(i).split()), 2] for i in range(120)]
    examples, labels = unpacked(population.examples), population.examples.labels
    assert labels is not None
    for k, client in enumerate(population.clients):
        assert client.name == f"s{k}"
        numbers = sorted([*client.train, *client.holdout])
        mine = [i for i in range(120) if i % 6 == k]
        assert [examples[n] for n in numbers] == [encoded[i] for i in mine]
        assert labels[torch.tensor(numbers)].tolist() == [i % 4 for i in mine]
    assert unpacked(population.test) == encoded[:10]
    assert population.test.labels is not None
    assert population.test.labels.tolist() == [i % 4 for i in range(10)]


def test_largest_natural_clients_leave_nothing_of_the_others(
    write: Write, encoder_tokenizer: Fast
) -> None:
    rows = [
        {"text": f"w{k}", "label": k % 2, "who": f"s{k}"} for k in range(5) for _ in range(k + 2)
    ]
    data = Data(source=write("x.jsonl", rows), client="who")
    population = build_population(data, Partition(kind="natural", clients=2), encoder_tokenizer, 0)
    assert [c.name for c in population.clients] == ["s3", "s4"]
    assert {tuple(e) for e in unpacked(population.examples)} == {(1, 9, 2), (1, 10, 2)}
    assert sorted(everyone(population)) == list(range(11))


def test_blocks_stay_with_the_client_of_their_text(write: Write, decoder_tokenizer: Fast) -> None:
    rows = [{"text": " ".join([f"w{k}"] * (10 + k)), "who": f"s{k}"} for k in (2, 0, 1)]
    source = write("x.jsonl", rows)
    population = build_population(
        Data(source, client="who", task="causal_lm", max_length=4, holdout=0.4),
        Partition(kind="natural", clients=0),
        decoder_tokenizer,
        0,
    )
    examples = unpacked(population.examples)
    blocks = {"s0": 3, "s1": 3, "s2": 4}  # of 12, 13 and 14 tokens with bos and eos
    for k, client in enumerate(population.clients):
        numbers = [*client.train, *client.holdout]
        words = {token for n in numbers for token in examples[n]} - {3, 4}
        assert (client.name, words, len(numbers)) == (f"s{k}", {6 + k}, blocks[client.name])


def test_test_set_without_a_test_split_is_the_union_of_the_holdouts(
    source: str, encoder_tokenizer: Fast
) -> None:
    population = build_population(Data(source=source), PARTITIONS[0], encoder_tokenizer, 0)
    held = sorted(np.concatenate([c.holdout for c in population.clients]))
    examples = unpacked(population.examples)
    assert unpacked(population.test) == [examples[n] for n in held]
    assert population.examples.labels is not None
    assert population.test.labels is not None
    assert torch.equal(population.test.labels, population.examples.labels[torch.tensor(held)])


@pytest.mark.parametrize(("share", "held"), [(0.0, 0), (0.3, 3), (0.29, 2), (0.99, 9)])
def test_holdout_share_is_rounded_down(
    write: Write, encoder_tokenizer: Fast, share: float, held: int
) -> None:
    rows = [{"text": text(i), "label": i % 2} for i in range(20)]
    write("test.jsonl", rows)
    data = Data(source=write("train.jsonl", rows), test="test", holdout=share)
    population = build_population(data, Partition(clients=2), encoder_tokenizer, 0)
    assert [len(c.holdout) for c in population.clients] == [held, held]


def test_one_example_always_stays_for_training(write: Write, encoder_tokenizer: Fast) -> None:
    rows = [{"text": text(i), "label": i % 2} for i in range(5)]
    data = Data(source=write("x.jsonl", rows), holdout=0.9999999999)
    population = build_population(data, Partition(clients=3, min_examples=1), encoder_tokenizer, 0)
    assert [(len(c.train), len(c.holdout)) for c in population.clients] == [(1, 1), (1, 1), (1, 0)]


def test_a_client_keeps_its_holdout_whoever_else_takes_part(
    source: str, encoder_tokenizer: Fast
) -> None:
    def build(clients: int) -> dict[str, list[list[int]]]:
        population = build_population(
            Data(source=source, client="who"),
            Partition(kind="natural", clients=clients),
            encoder_tokenizer,
            0,
        )
        examples = unpacked(population.examples)
        return {c.name: [examples[n] for n in c.holdout] for c in population.clients}

    few, all_ = build(3), build(0)
    assert few == {name: all_[name] for name in few}


def test_clients_of_equal_size_hold_out_different_places(
    source: str, encoder_tokenizer: Fast
) -> None:
    data = Data(source=source, client="who")
    population = build_population(data, PARTITIONS[-1], encoder_tokenizer, 0)
    places = set()
    for client in population.clients:
        numbers = np.sort(np.concatenate([client.train, client.holdout]))
        places.add(tuple(np.searchsorted(numbers, client.holdout)))
    assert len(places) == 6


def test_fingerprint_changes_with_everything(source: str, encoder_tokenizer: Fast) -> None:
    data, partition = Data(source=source, test="test"), PARTITIONS[1]
    first = build_population(data, partition, encoder_tokenizer, 0)
    assert build_population(data, partition, encoder_tokenizer, 0).fingerprint == first.fingerprint
    others = [
        build_population(data, partition, encoder_tokenizer, 1),
        build_population(data, replace(partition, clients=6), encoder_tokenizer, 0),
        build_population(replace(data, holdout=0.3), partition, encoder_tokenizer, 0),
        build_population(replace(data, test=None), partition, encoder_tokenizer, 0),
        build_population(replace(data, max_length=4), partition, encoder_tokenizer, 0),
        pool(first),
    ]
    prints = {p.fingerprint for p in [first, *others]}
    assert len(prints) == 1 + len(others)
    assert all(len(p) == 64 for p in prints)


PRINT_FINGERPRINTS = """
import sys
from transformers import PreTrainedTokenizerFast
from fedpeft.config import Data, Partition
from fedpeft.data.build import build_population
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
for kind, clients in zip(sys.argv[3::2], sys.argv[4::2]):
    data = Data(source=sys.argv[2], client="who", limit=100)
    population = build_population(data, Partition(kind=kind, clients=int(clients)), tokenizer, 5)
    print(population.fingerprint)
"""


def test_every_process_builds_the_same_population(
    source: str, encoder_tokenizer: Fast, tmp_path: Path
) -> None:
    encoder_tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = Data(source=source, client="who", limit=100)
    here = [build_population(data, p, encoder_tokenizer, 5).fingerprint for p in PARTITIONS]
    kinds = [word for p in PARTITIONS for word in (p.kind, str(p.clients))]
    there = subprocess.run(
        [sys.executable, "-c", PRINT_FINGERPRINTS, str(tmp_path / "tokenizer"), source, *kinds],
        env={**os.environ, "PYTHONHASHSEED": "12345", "HF_DATASETS_CACHE": str(tmp_path / "other")},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert there.stdout.split() == here, there.stderr


def test_pool_holds_the_same_data(source: str, encoder_tokenizer: Fast) -> None:
    population = build_population(Data(source=source), PARTITIONS[1], encoder_tokenizer, 0)
    pooled = pool(population)
    (client,) = pooled.clients
    assert client.name == "everyone"
    assert list(client.train) == sorted(np.concatenate([c.train for c in population.clients]))
    assert list(client.holdout) == sorted(np.concatenate([c.holdout for c in population.clients]))
    assert pooled.examples is population.examples
    assert pooled.test is population.test
    assert isinstance(client, ClientData)


def test_rows_without_text_are_dropped_and_counted(
    write: Write, encoder_tokenizer: Fast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": text(i) if i % 4 else " ", "label": i % 2} for i in range(20)]
    write("test.jsonl", [{"text": None, "label": 1}, {"text": "w1", "label": 1}])
    with caplog.at_level(logging.WARNING, "fedpeft"):
        population = build_population(
            Data(source=write("train.jsonl", rows), test="test"),
            Partition(clients=3),
            encoder_tokenizer,
            0,
        )
    assert len(population.examples) == 15
    assert len(population.test) == 1
    assert caplog.messages == [
        "dropped 5 of 20 training rows without usable text",
        "dropped 1 of 2 test rows without usable text",
    ]


def test_no_usable_text_at_all(write: Write, encoder_tokenizer: Fast, refuses: Any) -> None:
    source = write("x.jsonl", [{"text": " ", "label": i} for i in range(3)])
    with refuses("data.text='text'", "none of the 3 training rows", "column that holds the text"):
        build_population(Data(source=source), Partition(), encoder_tokenizer, 0)


def test_nothing_to_measure_on(source: str, encoder_tokenizer: Fast, refuses: Any) -> None:
    with refuses("data.holdout=0.0", "no test split", "data.test"):
        build_population(Data(source=source, holdout=0.0), PARTITIONS[0], encoder_tokenizer, 0)
    with refuses("data.holdout=0.01", "Raise data.holdout"):
        build_population(Data(source=source, holdout=0.01), PARTITIONS[0], encoder_tokenizer, 0)


def test_banking77(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "all-MiniLM-L6-v2")
    population = build_population(
        Data(source=str(shared / "data" / "banking77"), test="test"),
        Partition(kind="dirichlet", clients=20),
        tokenizer,
        0,
    )
    assert (len(population.examples), len(population.test)) == (10003, 3080)
    assert len(population.labels) == 77
    assert sorted(everyone(population)) == list(range(10003))
    assert population.labels[0] == "Refund_not_showing_up"
    examples = unpacked(population.examples)
    assert (
        tokenizer.decode(examples[0], skip_special_tokens=True) == "i am still waiting on my card?"
    )
    assert all(2 < len(example) <= 64 for example in examples)


def test_shakespeare_by_speaker(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    source = str(shared / "data" / "tinyshakespeare")
    population = build_population(
        Data(source, train="by_speaker.jsonl", client="speaker", task="causal_lm", max_length=128),
        Partition(kind="natural", clients=20),
        tokenizer,
        0,
    )
    names = [client.name for client in population.clients]
    assert len(names) == 20
    assert "GLOUCESTER" in names
    assert int(population.examples.lengths.max()) == 128
    first = population.examples.tokens[:128]
    assert int(first[0]) == tokenizer.bos_token_id
