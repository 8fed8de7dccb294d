"""Tokenised examples in two flat arrays, and the batches that cohorts train on.

Examples of any length lie one behind another in ``tokens``; a client is a vector of example
numbers. A batch of K clients is client-major: rows ``k*b .. (k+1)*b - 1`` belong to client k, so
that ``[K*b, ...]`` reshapes to ``[K, b, ...]`` without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from fedpeft.errors import FedpeftError

IGNORED = -100
"""The label of a position that no loss counts (PyTorch's convention)."""


@dataclass(frozen=True)
class Batch:
    """Model input for K clients of b rows each, padded right to the longest row.

    tokens: int64 ``[K*b, T]``. mask: int64 ``[K*b, T]``, 1 on real tokens, or None when nothing is
    padded. labels: int64; classification ``[K*b]``; causal language modelling ``[K*b, T]`` (not
    shifted, IGNORED where nothing is predicted). Absent rows (a client with fewer examples) have
    one real token and only IGNORED labels: they contribute nothing.
    """

    tokens: Tensor
    mask: Tensor | None
    labels: Tensor
    clients: int

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        return Batch(
            self.tokens.to(device, non_blocking=True),
            mask,
            self.labels.to(device, non_blocking=True),
            self.clients,
        )

    def pin(self) -> Batch:
        """The batch in page-locked memory, from which ``to`` copies without waiting."""
        mask = None if self.mask is None else self.mask.pin_memory()
        return Batch(self.tokens.pin_memory(), mask, self.labels.pin_memory(), self.clients)


@dataclass(frozen=True)
class Limits:
    """What a file says of the examples in it; checked as they are read.

    tokens: token numbers are below it. labels: class numbers are below it. longest: tokens of the
    longest example.
    """

    tokens: int
    labels: int
    longest: int

    def check(self, tokens: Tensor, labels: Tensor | None) -> None:
        """Raises FedpeftError where a token or label is out of range."""
        for what, values, below in (
            ("token", tokens, self.tokens),
            ("label", labels, self.labels),
        ):
            if values is not None and len(values):
                low, high = int(values.min()), int(values.max())
                if low < 0 or high >= below:
                    raise FedpeftError(
                        f"{what} {high if high >= below else low} is not below {below}: the store "
                        "of these examples is corrupt, write it again."
                    )


@dataclass(frozen=True)
class Examples:
    """N tokenised examples.

    tokens: int32 ``[total]``; starts: int64 ``[N + 1]``; example i is
    ``tokens[starts[i]:starts[i+1]]``, at least one token. labels: int64 ``[N]`` class numbers, or
    None for causal language modelling, where the tokens are their own labels. pad: the pad token.
    limits: of examples that lie in a file. The tensors may be views of the file.
    """

    tokens: Tensor
    starts: Tensor
    labels: Tensor | None
    pad: int
    limits: Limits | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens per example, int64 ``[N]``; all of them: see ``lengths_of``."""
        return self.starts[1:] - self.starts[:-1]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int(self.lengths.max()) if self.limits is None else self.limits.longest

    def lengths_of(self, index: np.ndarray) -> np.ndarray:
        """Tokens of the examples ``index``, int64 of any shape; reads no others."""
        starts = self.starts.numpy()
        lengths: np.ndarray = starts[index + 1] - starts[index]
        return lengths

    def batch(self, index: Tensor, at_least: int = 0) -> Batch:
        """The batch of examples ``index``, int64 ``[K, b]``; -1 marks an absent row.

        Rows are padded to the longest, and to ``at_least`` tokens.
        """
        clients, flat = index.shape[0], index.reshape(-1)
        absent = flat < 0
        at = flat.clamp(min=0)
        begin = self.starts[at]
        length = (self.starts[at + 1] - begin).masked_fill(absent, 1)
        position = torch.arange(max(at_least, int(length.max()) if len(length) else 0))
        real = position < length[:, None]  # [K*b, T]
        where = (begin[:, None] + position).clamp(max=len(self.tokens) - 1)
        tokens = torch.where(real, self.tokens[where].long(), self.pad)
        counted = real & ~absent[:, None]
        classes = None if self.labels is None else self.labels[at]
        if self.limits is not None:
            self.limits.check(tokens, classes)
        if classes is None:
            labels = torch.where(counted, tokens, IGNORED)
        else:
            labels = classes.masked_fill(absent, IGNORED)
        padded = bool((length < len(position)).any())
        return Batch(tokens, real.long() if padded else None, labels, clients)


def flatten(rows: Sequence[Sequence[int]], labels: Sequence[int] | None, pad: int) -> Examples:
    """Examples from lists of token numbers (each non-empty) and, for classification, labels."""
    lengths = torch.tensor([0, *(len(r) for r in rows)], dtype=torch.int64)
    tokens = torch.from_numpy(np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())))
    numbers = None if labels is None else torch.tensor(list(labels), dtype=torch.int64)
    return Examples(tokens, lengths.cumsum(0), numbers, pad)
