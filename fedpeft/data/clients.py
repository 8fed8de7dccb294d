"""What a run trains and is measured on: tokenised examples, divided among named clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedpeft.data.examples import Examples

Task = Literal["classification", "causal_lm"]


@dataclass(frozen=True)
class ClientData:
    """One client's private data, as example numbers into ``Population.train``.

    train: int64 ``[n]``, at least one. holdout: int64 ``[h]``, the client's own test examples, kept
    out of training, may be empty.
    """

    name: str
    train: np.ndarray
    holdout: np.ndarray


@dataclass(frozen=True)
class Population:
    """All clients of a run and the global test set.

    examples: what the clients hold. test: the global test set (the source's own test split, or the
    union of the clients' hold-outs). labels: class names, empty for causal language modelling.
    fingerprint: a SHA-256 over everything above: equal fingerprints, equal data.
    """

    task: Task
    clients: tuple[ClientData, ...]
    examples: Examples
    test: Examples
    labels: tuple[str, ...]
    fingerprint: str
