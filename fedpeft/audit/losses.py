"""The loss of every single example under an adapter: what membership inference begins with."""

from __future__ import annotations

import numpy as np
import torch

from fedpeft import tree
from fedpeft.base import folded
from fedpeft.cohort.lanes import Lane
from fedpeft.data.examples import Examples
from fedpeft.evaluate import ROWS
from fedpeft.metrics import item_losses
from fedpeft.model import Network, set_mode
from fedpeft.tree import Tree


def losses(
    network: Network,
    lane: Lane,
    adapter: Tree,
    examples: Examples,
    index: np.ndarray,
    base: Tree | None = None,
) -> np.ndarray:
    """Loss per example ``index`` (int64 ``[n]``) of a complete adapter, in nats, float64 ``[n]``.

    Of a text: the mean over its predicted tokens, 0 where there are none. base: as in
    ``Cohort.fit``. In evaluation mode, in order of length.
    """
    set_mode(network.model, training=False, base_dropout=False)
    placed = {name: value.to(network.device) for name, value in tree.broadcast(adapter, 1).items()}
    order = np.argsort(examples.lengths_of(index), kind="stable")
    found = np.empty(len(index))
    with torch.no_grad(), folded(network, base or {}):
        for start in range(0, len(index), ROWS):
            part = order[start : start + ROWS]
            batch = examples.batch(torch.from_numpy(index[part])[None]).to(network.device)
            loss, counted = item_losses(network.task, lane.logits(placed, batch), batch)
            rows = (len(part), -1)
            items = counted.reshape(rows).sum(1).clamp(min=1)
            found[part] = (loss.double().reshape(rows).sum(1) / items).cpu().numpy()
    return found
