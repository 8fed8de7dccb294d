"""What a step trains on: gathered ahead or not, in fixed shapes or not, the same examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.cohort.loader import SHORTEST, Loader
from fedpeft.config import Local
from fedpeft.data.examples import IGNORED, Examples, flatten

INDEX = np.array([[0, 9, 3, 4], [5, -1, 7, -1], [-1, -1, -1, -1]])


def examples(longest: int = 40) -> Examples:
    rows = [[1 + (7 * j + i) % 100 for j in range(1 + (i * longest) // 9)] for i in range(10)]
    return flatten(rows, list(range(10)), 0)


def loader(**how: bool) -> Loader:
    return Loader(examples(), Local(batch_size=2, accumulate=2), torch.device("cpu"), **how)


def labels(loaded: Loader, index: np.ndarray) -> list[list[int]]:
    """Client by client, the labels of its rows in all passes."""
    found: list[list[int]] = [[], [], []]
    for batch in loaded.load(index).passes:
        for row, own in enumerate(batch.labels.view(batch.clients, -1).tolist()):
            found[row] += [label for label in own if label != IGNORED]
    return [sorted(own) for own in found]


@pytest.mark.parametrize("how", [{}, {"fixed": True}, {"threaded": True}])
def test_all_examples_of_a_step_are_loaded_once(how: dict[str, bool]) -> None:
    at = loader(**how)
    assert labels(at, INDEX) == [[0, 3, 4, 9], [5, 7], []]
    assert at.load(INDEX).items.tolist() == [4, 2, 1]


def test_a_step_gathered_ahead_is_the_step_that_was_asked_for() -> None:
    at, other = loader(threaded=True), INDEX[:, ::-1].copy()
    at.ahead(INDEX)
    assert labels(at, INDEX) == [[0, 3, 4, 9], [5, 7], []]
    at.ahead(INDEX)
    moved = np.where(other >= 0, (other + 1) % 10, -1)
    assert labels(at, moved) == [[0, 1, 4, 5], [6, 8], []]  # not what lies ready


def test_fixed_shapes_are_few() -> None:
    at = loader(fixed=True)
    shapes = set()
    for first in range(10):
        index = np.full((3, 4), -1)
        index[0, 0] = first
        shapes |= {tuple(batch.tokens.shape) for batch in at.load(index).passes}
    longest = int(examples().lengths.max())
    assert shapes == {(6, SHORTEST), (6, 32), (6, longest)}
