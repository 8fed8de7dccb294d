"""Recipes and stores: what a store records of the recipe that made it, and who may read it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedpeft.config import Data, Partition, Recipe
from fedpeft.data.clients import Population
from fedpeft.data.store import Head, Origin, open_store, read_head
from fedpeft.errors import FedpeftError


def origin_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Origin:
    """What a store of this recipe's population records."""
    settings = {
        "data": {k: v for k, v in asdict(recipe.data).items() if k != "source"},
        "partition": asdict(recipe.partition),
    }
    return Origin(recipe.model.name, tokenizer_digest(tokenizer), settings)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary: equal digests, equal meaning of token numbers."""
    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(words.encode("ascii")).hexdigest()[:16]


def stored_population(
    data: Data, partition: Partition, tokenizer: PreTrainedTokenizerBase
) -> Population:
    """The population of the store ``data.source``.

    Task, clients, hold-outs and test set are the store's. Raises FedpeftError for settings that
    ask for others, and for a tokenizer that did not make these tokens.
    """
    path = Path(data.source).expanduser()
    head = read_head(path)
    given = {"data": asdict(data), "partition": asdict(partition)}
    defaults = {"data": asdict(Data()), "partition": asdict(Partition())}
    natural = partition.kind == "natural" and partition.clients in (
        0,
        head.count("names-starts") - 1,
    )
    for section in ("data", "partition"):
        own = (head.settings or {}).get(section, {})
        if section == "data" or not natural:
            _check_section(section, given[section], defaults[section], own)
    if data.task != head.task:
        raise FedpeftError(
            f"data.task={data.task}, but the store {str(path)!r} is for {head.task}: set "
            f"data.task={head.task}."
        )
    _check_tokens(head, tokenizer, path)
    return open_store(path)


def _check_section(
    section: str, given: Mapping[str, Any], default: Mapping[str, Any], own: Mapping[str, Any]
) -> None:
    """Each setting is the default, or what the store was made with."""
    for key, value in given.items():
        made = own.get(key, default[key])
        if key not in ("source", "task") and value not in (default[key], made):
            raise FedpeftError(
                f"{section}.{key}={value!r}: data.source is a store, whose clients are as they "
                f"were written ({section}.{key}={made!r}). Leave it out, or write another store."
            )


def _check_tokens(head: Head, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    if head.tokenizer and head.tokenizer != tokenizer_digest(tokenizer):
        raise FedpeftError(
            f"data.source={str(path)!r}: the store's tokens are of the tokenizer of model.name="
            f"{head.model!r}, and the recipe's model has another. Use that model, or write a store "
            "for this one."
        )
    if head.vocabulary > len(tokenizer):
        raise FedpeftError(
            f"data.source={str(path)!r}: the store has the token {head.vocabulary - 1}, the "
            f"model's tokenizer only {len(tokenizer)}. Use the model that the store was made for, "
            "or write a store for this one."
        )
