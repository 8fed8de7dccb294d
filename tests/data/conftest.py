from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedpeft.errors import FedpeftError

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the ``datasets`` library caches of the tests' files goes with the tests' files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture
def refuses() -> Refuses:
    """Expects a FedpeftError whose message holds every one of the given parts."""

    @contextmanager
    def expect(*parts: str) -> Iterator[None]:
        with pytest.raises(FedpeftError) as caught:
            yield
        message = str(caught.value)
        assert not [part for part in parts if part not in message], message

    return expect


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as a file of the named kind; gives its path."""

    def rows_to(name: str, rows: Sequence[dict[str, Any]]) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            with path.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix == ".parquet":
            datasets.Dataset.from_list(list(rows)).to_parquet(path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(list(rows)))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return rows_to


WORDS = ["[PAD]", "[CLS]", "[SEP]", "<s>", "</s>", "[UNK]", *(f"w{i}" for i in range(50))]


def _word_level(*, framed: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if framed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B [SEP]",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
    return tokenizer


@pytest.fixture(scope="session")
def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Word w<i> is token 6 + i; texts become [CLS]=1 ... [SEP]=2; pad 0."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_word_level(framed=True), pad_token="[PAD]", unk_token="[UNK]"
    )


@pytest.fixture(scope="session")
def decoder_tokenizer() -> PreTrainedTokenizerFast:
    """Word w<i> is token 6 + i; bos 3, eos 4, no pad token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_word_level(framed=False),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="[UNK]",
    )


@pytest.fixture(scope="session")
def bare_tokenizer() -> PreTrainedTokenizerFast:
    """The words alone: no special token but the unknown word."""
    return PreTrainedTokenizerFast(tokenizer_object=_word_level(framed=False), unk_token="[UNK]")
