"""Canaries: examples, or directions in the update space, whose presence a fair coin decided.

An audit that knows the coins' results and guesses them from what a training gave out measures what
the training leaked. The coins come from the operating system's generator, or from a stream that
was given to repeat an audit; nothing else may know them.
"""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpeft.data.clients import Clients, Pieces, Population
from fedpeft.data.examples import Examples
from fedpeft.data.fingerprint import sealed
from fedpeft.errors import FedpeftError
from fedpeft.streams import numpy_stream
from fedpeft.tree import Layout, Tree

SHORTEST = 3
"""Tokens of the shortest example that a canary may be modelled on: both ends stay as they are."""


@dataclass(frozen=True)
class Planted:
    """A population with canaries in it.

    population: the canaries are the last examples, and those that are in belong to a client's
    training examples. index: their example numbers, int64 ``[m]``. included: bool ``[m]``, who is
    in. owner: the number of the client that has, or would have had, each canary, int64 ``[m]``.
    """

    population: Population
    index: np.ndarray
    included: np.ndarray
    owner: np.ndarray


def stream_of(seed: int | None) -> np.random.Generator:
    """A generator for canaries and coins; without a seed, seeded by the operating system."""
    if seed is None:
        return np.random.Generator(np.random.PCG64(secrets.randbits(128)))
    return numpy_stream(seed, "canaries")


def coins(count: int, stream: np.random.Generator) -> np.ndarray:
    """``count`` fair coins, bool ``[count]``."""
    found: np.ndarray = stream.integers(0, 2, count) == 1
    return found


def plant(population: Population, count: int, stream: np.random.Generator) -> Planted:
    """The population with ``count`` canaries, each in or out by a fair coin.

    A canary has the length and the two end tokens (they may be the tokenizer's own) of an example
    of the population, drawn at random; between them, tokens drawn evenly from all that occur; and,
    for classification, a label drawn evenly. So nobody could know it who did not train on it. Each
    belongs to a client drawn evenly; nearly as many to each. What clients hold out, and the test
    set, have none. Raises FedpeftError for fewer than 2, and where no example is long enough.
    """
    if count < 2:
        raise FedpeftError(f"canaries={count}: at least 2 are needed, and hundreds to bound well.")
    examples, clients = population.examples, population.clients
    first = len(examples)
    made = _appended(examples, len(population.labels), count, stream)
    index = np.arange(first, first + count, dtype=np.int64)
    rounds = [stream.permutation(len(clients)) for _ in range(-(-count // len(clients)))]
    owner = np.concatenate(rounds)[:count].astype(np.int64)
    included = coins(count, stream)
    train = _joined(clients.train, owner[included], index[included])
    joined = Clients(clients.names, train, clients.holdout, below=len(made))
    changed = dataclasses.replace(population, clients=joined, examples=made)
    return Planted(sealed(changed), index, included, owner)


def _appended(examples: Examples, labels: int, count: int, stream: np.random.Generator) -> Examples:
    """The examples and ``count`` canaries behind them; all of them in memory."""
    starts, tokens = examples.starts.numpy(), examples.tokens.numpy()
    models = np.flatnonzero(np.diff(starts) >= SHORTEST)
    if not len(models):
        raise FedpeftError(
            f"no example has {SHORTEST} tokens or more, so none can be the model of a canary: "
            f"raise data.max_length."
        )
    words = np.unique(tokens)
    rows = []
    for number in stream.choice(models, count).tolist():
        row = tokens[starts[number] : starts[number + 1]].copy()
        row[1:-1] = stream.choice(words, len(row) - 2)
        rows.append(row)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    own = examples.labels
    if own is not None:
        drawn = torch.from_numpy(stream.integers(0, labels, count, dtype=np.int64))
        own = torch.cat([own, drawn])
    return dataclasses.replace(
        examples,
        tokens=torch.cat([examples.tokens, torch.from_numpy(np.concatenate(rows))]),
        starts=torch.cat([examples.starts, examples.starts[-1] + lengths.cumsum(0)]),
        labels=own,
    )


def _joined(pieces: Pieces, owner: np.ndarray, numbers: np.ndarray) -> Pieces:
    """The vectors with ``numbers[i]`` at the end of vector ``owner[i]``."""
    order = np.argsort(owner, kind="stable")
    more = np.bincount(owner, minlength=len(pieces.starts) - 1)
    values = np.insert(pieces.values, pieces.starts[owner[order] + 1], numbers[order])
    starts = pieces.starts + np.concatenate([[0], np.cumsum(more)])
    return Pieces(values, starts)


def directions(count: int, layout: Layout, stream: np.random.Generator) -> Tree:
    """Updates of canary clients: independent random directions of length 1, stacked.

    ``count`` of them, float32, for a layout of d numbers; times the clip norm, they are what a
    client of the largest allowed influence sends. Any two are nearly orthogonal where d is large.
    """
    matrix = stream.standard_normal((count, layout.size), dtype=np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    return layout.unpack(torch.from_numpy(matrix))


def cosines(update: Tree, stacked: Tree) -> np.ndarray:
    """The cosines of an update (unstacked) with K directions (stacked), float64 ``[K]``.

    Raises FedpeftError for an update of zeros, or one that is not finite.
    """
    layout = Layout.of(update)
    one = layout.pack({name: value[None] for name, value in update.items()})[0].double().cpu()
    size = float(one.norm())
    if not 0 < size < float("inf"):
        raise FedpeftError(f"an update of norm {size} has no direction: nothing can be audited.")
    many: Tensor = layout.pack(stacked).double().cpu()
    found: np.ndarray = (many @ one / (many.norm(dim=1) * size)).numpy()
    return found
