"""Rows -> tokenised examples, without a Python loop over tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fedpeft.config import Data
from fedpeft.data.examples import Examples, flatten
from fedpeft.errors import FedpeftError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows.

    examples: in the order of their rows. row: int64 ``[N]``, ascending, the row that each example
    comes from; classification gives a row with text one example, causal language modelling as many
    as it has blocks. A blank row gives none.
    """

    examples: Examples
    row: np.ndarray


def encode(rows: Dataset, data: Data, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Tokenises canonical rows: whole, truncated texts for classification, else blocks.

    Raises FedpeftError when ``data.max_length`` has no room for text beside the special tokens.
    """
    texts = rows["text"][:]
    at = [i for i, text in enumerate(texts) if text.strip()]
    if data.task == "causal_lm":
        return _blocks([texts[i] for i in at], np.array(at, np.int64), data.max_length, tokenizer)
    special = tokenizer.num_special_tokens_to_add(pair=data.pair is not None)
    if data.max_length <= special:
        raise FedpeftError(
            f"data.max_length={data.max_length} has no room for text: this tokenizer adds "
            f"{special} special tokens. Raise data.max_length."
        )
    pairs = None if data.pair is None else rows["pair"][:]
    ids = _ids(tokenizer, [texts[i] for i in at], pairs and [pairs[i] for i in at], data.max_length)
    row = np.array([i for i, tokens in zip(at, ids, strict=True) if tokens], np.int64)
    labels = np.array(rows["label"][:], np.int64)[row]
    return Encoded(flatten([t for t in ids if t], labels.tolist(), pad_token(tokenizer)), row)


def take(examples: Examples, index: np.ndarray) -> Examples:
    """The examples at ``index``, int64, in that order."""
    starts = examples.starts.numpy()
    lengths = examples.lengths_of(index)
    tokens = examples.tokens[torch.from_numpy(_ranges(starts[index], lengths))]
    labels = None if examples.labels is None else examples.labels[torch.from_numpy(index)]
    return Examples(tokens, torch.from_numpy(_offsets(lengths)), labels, examples.pad)


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token, else the end-of-text token, else 0: the mask hides it in any case."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _ids(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    pairs: list[str] | None,
    max_length: int | None,
) -> list[list[int]]:
    """Token numbers per text; ``max_length`` None: all of them, without special tokens."""
    if not texts:
        return []
    encoding = tokenizer(
        texts,
        pairs,
        add_special_tokens=max_length is not None,
        truncation=max_length is not None,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def _blocks(
    texts: list[str], at: np.ndarray, size: int, tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    """Each text between bos and eos (if the tokenizer has them), cut into blocks of ``size``.

    Blocks do not cross texts. A text's last block may be shorter; of one token it predicts nothing,
    and is dropped.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    before, after = [[] if token is None else [token] for token in (bos, eos)]
    ids = [before + tokens + after for tokens in _ids(tokenizer, texts, None, None)]
    whole = flatten(ids, None, pad_token(tokenizer))
    lengths = whole.lengths.numpy()
    full, rest = lengths // size, lengths % size
    count = full + (rest >= 2)
    owner = np.repeat(np.arange(len(count)), count)
    start = whole.starts.numpy()[owner] + size * _ranges(np.zeros_like(count), count)
    end = np.minimum(start + size, whole.starts.numpy()[owner + 1])
    tokens = whole.tokens[torch.from_numpy(_ranges(start, end - start))]
    starts = torch.from_numpy(_offsets(end - start))
    return Encoded(Examples(tokens, starts, None, whole.pad), at[owner])


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``starts[i], starts[i] + 1, ...`` (``lengths[i]`` of them), one behind another, int64."""
    offsets = _offsets(lengths)
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """Where pieces of these lengths begin, and the end: int64 ``[N + 1]``."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
