"""A workload as files and a recipe, for engines whose processes each load model and data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.ways import Way
from benchmarks.workload import CLASSES, SEED, Workload, client_name
from fedpeft.config import Data, Model, Partition, Recipe, Rounds, Sampling


def write_recipe(workload: Workload, way: Way, folder: Path) -> Recipe:
    """Writes ``model/`` and ``data/`` and gives their recipe; BERT workloads only.

    The model is transformers' own classifier of the workload's shape, and a round's clients are
    drawn, so the adapter is not that of the other ways; the work is the same.
    """
    _write_model(workload, folder / "model")
    (folder / "data").mkdir()
    _write_data(workload, folder / "data" / "train.jsonl", workload.examples)
    _write_data(workload, folder / "data" / "test.jsonl", 1)
    size = workload.cohort
    return Recipe(
        seed=SEED,
        model=Model(name=str(folder / "model")),
        adapter={"kind": "lora", "r": workload.rank, "target_modules": list(workload.targets)},
        data=Data(
            source=str(folder / "data"),
            test="test",
            client="client",
            max_length=workload.tokens,
            holdout=0.0,
        ),
        partition=Partition(kind="natural", clients=0, min_examples=1),
        rounds=Rounds(weighting="equal", sampling=Sampling(kind="fixed", size=size)),
        local=way.local(workload),
        engine=way.engine(workload),
    )


def _write_model(workload: Workload, folder: Path) -> None:
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{n}": n for n in range(2, workload.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )
    wrapped.save_pretrained(str(folder))
    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=workload.vocabulary,
        hidden_size=workload.hidden,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads,
        intermediate_size=workload.feed_forward,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
        pad_token_id=0,
    )
    BertForSequenceClassification(config).save_pretrained(str(folder))


def _write_data(workload: Workload, path: Path, each: int) -> None:
    """``each`` rows of every client."""
    stream = np.random.default_rng(SEED)
    with path.open("w") as out:
        for client in range(workload.population):
            tokens = stream.integers(2, workload.vocabulary, size=(each, workload.tokens))
            labels = stream.integers(CLASSES, size=each)
            for row, label in zip(tokens, labels, strict=True):
                text = " ".join(f"w{n}" for n in row)
                line = {"text": text, "label": int(label), "client": client_name(client)}
                out.write(json.dumps(line) + "\n")
