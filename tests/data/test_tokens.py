"""Tests of tokenising: truncation, pairs, blocks, blank rows, and taking examples."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from fedpeft.config import Data
from fedpeft.data.examples import Examples, flatten
from fedpeft.data.tokens import encode, pad_token, take

Fast = PreTrainedTokenizerFast


def unpacked(examples: Examples) -> list[list[int]]:
    starts = examples.starts.tolist()
    return [examples.tokens[a:b].tolist() for a, b in pairwise(starts)]


def rows_of(*texts: str, **columns: list[Any]) -> Dataset:
    return Dataset.from_dict({"text": list(texts), **columns})


def test_classification_truncates_and_drops_blank_rows(encoder_tokenizer: Fast) -> None:
    rows = rows_of("w0 w1", " \n", "w1 w2 w3 w4", "", label=[3, 1, 2, 0])
    encoded = encode(rows, Data(max_length=4), encoder_tokenizer)
    assert unpacked(encoded.examples) == [[1, 6, 7, 2], [1, 7, 8, 2]]
    assert encoded.row.tolist() == [0, 2]
    assert encoded.examples.labels is not None
    assert encoded.examples.labels.tolist() == [3, 2]
    assert encoded.examples.tokens.dtype == torch.int32
    assert encoded.examples.starts.dtype == torch.int64


def test_classification_of_pairs(encoder_tokenizer: Fast) -> None:
    rows = rows_of("w0", "w1 w2 w3", pair=["w5", "w6"], label=[0, 1])
    encoded = encode(rows, Data(pair="other", max_length=6), encoder_tokenizer)
    assert unpacked(encoded.examples) == [[1, 6, 2, 11, 2], [1, 7, 8, 2, 12, 2]]


def test_causal_lm_blocks(decoder_tokenizer: Fast) -> None:
    rows = rows_of("w0 w1 w2", "", "w3 w4", "w5 w6 w7", "w8")
    encoded = encode(rows, Data(task="causal_lm", max_length=4), decoder_tokenizer)
    # bos 3 and eos 4 around each text; the lone last token of rows 0 and 3 is dropped
    assert unpacked(encoded.examples) == [[3, 6, 7, 8], [3, 9, 10, 4], [3, 11, 12, 13], [3, 14, 4]]
    assert encoded.row.tolist() == [0, 2, 3, 4]
    assert encoded.examples.labels is None


def test_causal_lm_long_texts(bare_tokenizer: Fast) -> None:
    words = " ".join(f"w{i % 50}" for i in range(37))
    encoded = encode(rows_of("w1", words), Data(task="causal_lm", max_length=5), bare_tokenizer)
    blocks = unpacked(encoded.examples)
    assert [len(block) for block in blocks] == [5, 5, 5, 5, 5, 5, 5, 2]
    assert [token for block in blocks for token in block] == [6 + i % 50 for i in range(37)]
    assert encoded.row.tolist() == [1] * 8  # a text of one token predicts nothing


def test_pad_token(encoder_tokenizer: Fast, decoder_tokenizer: Fast, bare_tokenizer: Fast) -> None:
    assert pad_token(encoder_tokenizer) == 0
    assert pad_token(decoder_tokenizer) == 4  # no pad token: the end of text
    assert pad_token(bare_tokenizer) == 0


@pytest.mark.parametrize(("pair", "length", "special"), [(None, 2, 2), ("other", 3, 3)])
def test_max_length_without_room_for_text(
    encoder_tokenizer: Fast, refuses: Any, pair: str | None, length: int, special: int
) -> None:
    rows = rows_of("w1", pair=["w2"], label=[0])
    with refuses(f"data.max_length={length}", f"{special} special tokens", "Raise"):
        encode(rows, Data(max_length=length, pair=pair), encoder_tokenizer)


def test_no_row_with_text(encoder_tokenizer: Fast, decoder_tokenizer: Fast) -> None:
    assert len(encode(rows_of(" ", label=[0]), Data(), encoder_tokenizer).row) == 0
    assert len(encode(rows_of(" "), Data(task="causal_lm"), decoder_tokenizer).row) == 0


def test_take() -> None:
    examples = flatten([[1], [2, 3, 4], [5, 6]], [7, 8, 9], pad=0)
    taken = take(examples, np.array([2, 0, 2]))
    assert unpacked(taken) == [[5, 6], [1], [5, 6]]
    assert taken.labels is not None
    assert taken.labels.tolist() == [9, 7, 9]
    assert unpacked(take(examples, np.array([], np.int64))) == []
