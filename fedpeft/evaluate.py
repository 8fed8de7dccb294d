"""Scores of adapters on sets of examples: one global adapter, or every client's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedpeft import tree
from fedpeft.base import folded
from fedpeft.cohort.lanes import Lane
from fedpeft.data.examples import Examples
from fedpeft.metrics import Score, Tally
from fedpeft.model import Network, set_mode
from fedpeft.tree import Tree

ROWS = 64
"""Rows per forward pass, shared among the clients of the pass."""


def score(
    network: Network,
    lane: Lane,
    adapter: Tree,
    examples: Examples,
    base: Tree | None = None,
    index: np.ndarray | None = None,
) -> Score:
    """One complete adapter (unstacked) on ``examples``, or on those of ``index`` alone.

    base: as in ``Cohort.fit``.
    """
    own = np.arange(len(examples), dtype=np.int64) if index is None else index
    with folded(network, base or {}):
        return score_clients(network, lane, tree.broadcast(adapter, 1), [own], examples)[0]


def score_clients(
    network: Network, lane: Lane, adapters: Tree, index: Sequence[np.ndarray], examples: Examples
) -> list[Score]:
    """K complete adapters (stacked), each on its own examples ``index[k]`` (may be empty).

    Examples are taken in order of length, so that little is padded.
    """
    set_mode(network.model, training=False, base_dropout=False)
    ordered = [own[np.argsort(examples.lengths_of(own), kind="stable")] for own in index]
    clients, each = len(index), max(1, ROWS // len(index))
    longest = max(len(own) for own in ordered)
    placed = {name: value.to(network.device) for name, value in adapters.items()}
    tally = Tally(network.task, network.classes, clients)
    group = torch.arange(clients).repeat_interleave(each)
    with torch.no_grad():
        for start in range(0, longest, each):
            part = np.full((clients, each), -1, dtype=np.int64)
            for k, own in enumerate(ordered):
                rows = own[start : start + each]
                part[k, : len(rows)] = rows
            batch = examples.batch(torch.from_numpy(part)).to(network.device)
            tally.add(lane.logits(placed, batch), batch, group)
    return tally.scores()


def mean_and_worst(values: Sequence[float]) -> tuple[float, float]:
    """The mean over clients and the mean over the worst tenth of them (at least one client).

    Larger is better. Clients without a figure (NaN: nothing held out) do not count; NaN if none.
    """
    known = np.sort([v for v in values if not np.isnan(v)])
    if not len(known):
        return float("nan"), float("nan")
    return float(known.mean()), float(known[: max(1, len(known) // 10)].mean())
