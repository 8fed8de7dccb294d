"""Rounds that wait: for everybody, until a deadline, or for the first so many."""

from __future__ import annotations

import math

import numpy as np

from fedpeft.fleet.jobs import DELIVERED, LATE, SURPLUS, Ends, Jobs


def waited(
    jobs: Jobs, ends: Ends, deadline: float = math.inf, wanted: int = 0
) -> tuple[Ends, float]:
    """What a round makes of jobs that would end so: their ends in it, and how long it takes.

    deadline: seconds after the start, when the server goes on without whoever is late. wanted: it
    goes on with the first so many replies (0: it waits for all); of equal times, the first in
    order. A client that drops out is noticed: the round lasts until the last reply that counts, or
    the deadline where somebody is late.
    """
    kind, time = ends.kind.copy(), ends.time.copy()
    late = time > deadline
    kind[late], time[late] = LATE, deadline
    good = np.flatnonzero(kind == DELIVERED)
    if wanted and len(good) >= wanted:
        order = good[np.argsort(time[good], kind="stable")]
        last = float(time[order[wanted - 1]])
        kind[order[wanted:]] = SURPLUS
        over = time > last
        kind[over & (kind != SURPLUS)] = SURPLUS
        return Ends(kind, np.minimum(time, last)), last
    if late.any():
        return Ends(kind, time), deadline
    counted = time[good] if len(good) else time
    return Ends(kind, time), float(counted.max()) if len(counted) else 0.0
