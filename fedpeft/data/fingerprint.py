"""The fingerprint of a population: equal fingerprints, equal data, however it is stored.

It reads everything once, in pieces: the memory it needs does not grow with the population.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fedpeft.data.clients import Population
from fedpeft.data.examples import Examples
from fedpeft.names import Names

BLOCK = 1 << 20
"""Numbers (or names) that are read at a time."""


def sealed(population: Population) -> Population:
    """The population with its fingerprint."""
    digest = hashlib.sha256()
    clients = population.clients
    digest.update(json.dumps([population.task, population.labels, []]).encode()[:-2])
    for text in _listed(clients.names):
        digest.update(text)
    digest.update(b"]]")
    public = () if population.public is None else _arrays(population.public)
    for array in (*_arrays(population.examples), *_arrays(population.test), *public):
        digest.update(_head(array))
        for start in range(0, len(array), BLOCK):
            digest.update(_little(array[start : start + BLOCK]))
    for k in range(len(clients)):
        for own in (clients.train[k], clients.holdout[k]):
            digest.update(_head(own))
            digest.update(_little(own))
    return replace(population, fingerprint=digest.hexdigest())


def _listed(names: Names) -> Iterator[bytes]:
    """The names as the inside of a JSON list, in pieces."""
    for start in range(0, len(names), BLOCK):
        text = json.dumps(names[start : start + BLOCK])[1:-1]
        yield f", {text}".encode() if start else text.encode()


def _arrays(examples: Examples) -> Iterator[np.ndarray]:
    yield np.array([examples.pad])
    for tensor in (examples.tokens, examples.starts, examples.labels):
        if tensor is not None:
            yield tensor.numpy()


def _head(array: np.ndarray) -> bytes:
    """What keeps two sequences of arrays from giving the same bytes."""
    return f"{array.dtype.newbyteorder('<').str}{array.shape}".encode()


def _little(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
