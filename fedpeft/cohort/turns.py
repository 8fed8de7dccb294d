"""Continuous batching: which client trains in which row at each step.

K clients with unequal numbers of steps share C rows. The ones with most steps come first; a row
whose client is done takes the next one that waits, so that no row idles while anybody waits
(Graham's longest-processing-time rule: at most 4/3 of the shortest possible schedule).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

IDLE = -1
"""In place of a client or a row: nobody."""


@dataclass(frozen=True)
class Turn:
    """One optimizer step of all rows in flight.

    clients: who trains in each row, int64 ``[C]``, IDLE where nobody. source: the row of the turn
    before that each row carries on, int64 ``[C]``, IDLE where a client begins. steps: the step that
    each client is at, int64 ``[C]``. index: the examples, int64 ``[C, B]``, -1 where absent. last:
    whether it is the client's last step, bool ``[C]``.
    """

    clients: np.ndarray
    source: np.ndarray
    steps: np.ndarray
    index: np.ndarray
    last: np.ndarray


def turns(plans: Sequence[np.ndarray], width: int, fixed: bool = False) -> Iterator[Turn]:
    """The turns that take every client through its plan, at most ``width`` clients at a time.

    plans: the examples of each client's steps, ``[steps_k, B]`` with at least one step. fixed: keep
    all rows to the end, idle ones too (for compiled steps, whose shapes must not change).
    """
    order = sorted(range(len(plans)), key=lambda k: -len(plans[k]))
    waiting = deque(order)
    rows = [waiting.popleft() for _ in range(min(width, len(plans)))]
    source, steps = [IDLE] * len(rows), [0] * len(rows)
    nothing = np.full(plans[0].shape[1], -1, dtype=np.int64)
    while any(k != IDLE for k in rows):
        now = list(zip(rows, steps, strict=True))
        index = [nothing if k == IDLE else plans[k][s] for k, s in now]
        last = [k != IDLE and s + 1 == len(plans[k]) for k, s in now]
        found = (np.array(each) for each in (rows, source, steps, index, last))
        yield Turn(*found)
        rows, source, steps = [], [], []
        for row, (k, step) in enumerate(now):
            if k != IDLE and step + 1 < len(plans[k]):
                entry = (k, row, step + 1)
            elif waiting:
                entry = (waiting.popleft(), IDLE, 0)
            elif fixed:
                entry = (IDLE, row, 0)
            else:
                continue
            rows.append(entry[0])
            source.append(entry[1])
            steps.append(entry[2])
