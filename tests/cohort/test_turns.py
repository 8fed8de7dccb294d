"""Continuous batching: every client takes its steps in order, and no row idles needlessly."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.cohort.turns import IDLE, Turn, turns


def plans(steps: list[int]) -> list[np.ndarray]:
    """Plans of two examples a step; example ``100 k + 2 s`` and the next are client k's step s."""
    return [100 * k + np.arange(2 * n).reshape(n, 2) for k, n in enumerate(steps)]


def check(found: list[Turn], own: list[np.ndarray]) -> None:
    """Each client's steps in order, in one row's unbroken life, with its own examples."""
    seen: dict[int, list[int]] = {}
    before: Turn | None = None
    for turn in found:
        for row, (k, source, step) in enumerate(
            zip(turn.clients, turn.source, turn.steps, strict=True)
        ):
            if k == IDLE:
                assert (turn.index[row] == -1).all()
                continue
            assert np.array_equal(turn.index[row], own[k][step])
            assert bool(turn.last[row]) == (step + 1 == len(own[k]))
            if source == IDLE:
                assert k not in seen
            else:
                assert before is not None and before.clients[source] == k
            seen.setdefault(int(k), []).append(int(step))
        before = turn
    assert {k: list(range(len(plan))) for k, plan in enumerate(own)} == seen


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 8, 50])
def test_every_client_takes_its_steps_in_order(width: int, fixed: bool) -> None:
    stream = np.random.default_rng(width)
    own = plans(stream.integers(1, 9, 20).tolist())
    found = list(turns(own, width, fixed))
    check(found, own)
    rows = [len(turn.clients) for turn in found]
    assert rows[0] == min(width, 20) and rows == sorted(rows, reverse=True)
    if fixed:
        assert set(rows) == {min(width, 20)}


def test_no_row_idles_while_a_client_waits() -> None:
    own = plans([7, 1, 1, 5, 2, 2, 3])
    found = list(turns(own, 3))
    for at, turn in enumerate(found):
        waiting = len(own) - len({int(k) for t in found[: at + 1] for k in t.clients})
        assert len(turn.clients) == 3 or waiting == 0
    assert len(found) == 7  # 21 steps in 3 rows: no turn is wasted


def test_rows_are_one_batch_without_refill_where_all_clients_fit() -> None:
    own = plans([3, 1, 2])
    found = list(turns(own, 3))
    assert [turn.clients.tolist() for turn in found] == [[0, 2, 1], [0, 2], [0]]
    assert [turn.source.tolist() for turn in found] == [[IDLE] * 3, [0, 1], [0]]
