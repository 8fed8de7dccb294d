"""The fingerprint is one definition, whatever the pieces it is computed in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from fedpeft.data import fingerprint
from fedpeft.data.clients import Population
from tests.tiny import tiny_population


def plainly(population: Population) -> str:
    """As fedpeft 0.1.0 computed it, so that runs recorded then can be resumed."""
    digest = hashlib.sha256()
    names = [population.task, population.labels, [c.name for c in population.clients]]
    digest.update(json.dumps(names).encode())
    arrays = []
    for examples in (population.examples, population.test):
        tensors = (examples.tokens, examples.starts, examples.labels)
        arrays += [np.array([examples.pad]), *(t.numpy() for t in tensors if t is not None)]
    for client in population.clients:
        arrays += [client.train, client.holdout]
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_the_pieces_do_not_show(task: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "BLOCK", block)
    population = tiny_population((5, 9, 3, 12))
    if task == "causal_lm":
        blank = replace(population.examples, labels=None)
        population = replace(population, task=task, examples=blank, test=blank, labels=())
    assert fingerprint.sealed(population).fingerprint == plainly(population)
