"""Which worker trains which clients: longest first, each to the worker with the least to do.

Graham's LPT rule (SIAM J. Appl. Math. 17, 1969): the busiest worker has at most
4/3 - 1/(3 N) times the work that the best division would give it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def divide(clients: Sequence[str], costs: Sequence[float], workers: int) -> list[list[int]]:
    """The places of ``clients`` in at most ``workers`` shards, none empty.

    costs: each client's, any unit (here tokens in a round). Equal costs go by name, equal loads to
    the first worker: the shards depend on nothing but the arguments, and who is in which shard not
    on the order of ``clients``. Within a shard places are in their order.
    """
    order = sorted(range(len(clients)), key=lambda k: (-costs[k], clients[k]))
    loads = [(0.0, worker) for worker in range(workers)]
    shards: list[list[int]] = [[] for _ in range(workers)]
    for k in order:
        load, worker = loads[0]
        shards[worker].append(k)
        heapq.heapreplace(loads, (load + costs[k], worker))
    return [sorted(shard) for shard in shards if shard]
