"""A federation of a tiny random BERT on random tokens: in memory, and as files with a recipe."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from fedpeft.cohort.federation import CohortFederation, Settings
from fedpeft.cohort.lanes import FoldLane, Lane
from fedpeft.config import Data, Engine, Local, Model, Partition, Recipe, Rounds
from fedpeft.data.clients import ClientData, Clients, Population
from fedpeft.data.examples import flatten
from fedpeft.model import Network, attach, build_network
from fedpeft.pruning.anatomy import structure_of
from fedpeft.strategy import Problem, Strategy

WORDS = 50
CLASSES = 3
PAD = 0
LORA: dict[str, Any] = {"kind": "lora", "r": 2, "target_modules": ["query", "value"]}
IA3: dict[str, Any] = {
    "kind": "ia3",
    "target_modules": ["key", "value", "output.dense"],
    "feedforward_modules": ["output.dense"],
}
LOCAL = Local(optimizer="sgd", lr=0.1, batch_size=4)


def tiny_model(seed: int = 0, layers: int = 1) -> BertForSequenceClassification:
    """Width 16, dropout off, random weights."""
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)


def tiny_population(sizes: Sequence[int], held: int = 3, seed: int = 0) -> Population:
    """Clients ``c0``, ``c1``, ... with so many training examples of 2 to 8 tokens each."""
    stream = np.random.default_rng(seed)
    total = sum(sizes) + held * len(sizes)
    rows = [stream.integers(1, WORDS, stream.integers(2, 9)).tolist() for _ in range(total)]
    examples = flatten(rows, stream.integers(0, CLASSES, total).tolist(), PAD)
    clients, start = [], 0
    for k, size in enumerate(sizes):
        own = np.arange(start, start + size + held, dtype=np.int64)
        clients.append(ClientData(f"c{k}", own[:size], own[size:]))
        start += size + held
    labels = tuple(f"label-{n}" for n in range(CLASSES))
    return Population("classification", Clients.of(clients), examples, examples, labels, "tiny")


def tiny_network(adapter: Mapping[str, Any], seed: int = 0, layers: int = 1) -> Network:
    """The tiny BERT with an adapter, its head trained with it."""
    base: nn.Module = tiny_model(seed, layers).eval().requires_grad_(False)
    model = attach(base, adapter, "classification", seed)
    return build_network(model, "classification", CLASSES, torch.device("cpu"))


@dataclass
class Tiny:
    """Everything that a federation in this process needs."""

    sizes: Sequence[int] = (5, 9, 3, 12)
    adapter: Mapping[str, Any] = field(default_factory=lambda: LORA)
    local: Local = LOCAL
    rounds: Rounds = field(default_factory=lambda: Rounds(count=3))
    seed: int = 0

    def __post_init__(self) -> None:
        self.population = tiny_population(self.sizes, seed=self.seed)
        self.network = tiny_network(self.adapter, self.seed)

    @property
    def problem(self) -> Problem:
        names, network = self.population.clients.names, self.network
        structure = partial(structure_of, network.model, network.scaling)
        known = network.initial, network.scaling, names, self.rounds.count, self.seed
        return Problem(*known, structure=structure)

    def federation(
        self,
        strategy: Strategy[Any],
        chunk: int = 8,
        lane: type[Lane] = FoldLane,
        on_chunk: Callable[[int, int], None] | None = None,
    ) -> CohortFederation:
        settings, lane_ = Settings(self.local, self.rounds, self.seed), lane(self.network.model)
        return CohortFederation(
            self.network, lane_, self.population, strategy, settings, chunk, on_chunk
        )


def write_tiny(folder: Path, sizes: Sequence[int] = (6, 11, 4, 14), seed: int = 0) -> None:
    """Writes ``model/`` (weights, tokenizer) and ``data.jsonl`` (text, label, client)."""
    words = {"[PAD]": PAD, "[UNK]": 1} | {f"w{n}": n for n in range(2, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )
    wrapped.save_pretrained(str(folder / "model"))
    tiny_model(seed).save_pretrained(str(folder / "model"))
    stream = random.Random(seed)
    with (folder / "data.jsonl").open("w") as out:
        for k, size in enumerate(sizes):
            for _ in range(size):
                text = " ".join(f"w{stream.randrange(2, WORDS)}" for _ in range(6))
                row = {"text": text, "label": stream.randrange(CLASSES), "client": f"c{k}"}
                out.write(json.dumps(row) + "\n")


def tiny_recipe(folder: Path, adapter: Mapping[str, Any] = LORA, **strategy: Any) -> Recipe:
    """The recipe of what ``write_tiny`` wrote, for Flower; strategy settings as keywords."""
    return Recipe(
        model=Model(name=str(folder / "model")),
        adapter=dict(adapter),
        data=Data(source=str(folder / "data.jsonl"), client="client", max_length=8),
        partition=Partition(kind="natural", clients=0, min_examples=1),
        strategy={"name": "fedavg", **strategy},
        rounds=Rounds(count=2),
        local=LOCAL,
        engine=Engine(kind="flower", device="cpu", workers=2),
    )
