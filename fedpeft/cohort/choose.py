"""Which lane carries a model: the fastest that gives the loop's gradients on two clients."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fedpeft import streams
from fedpeft.cohort.lanes import FoldLane, Lane, LoopLane, VmapLane
from fedpeft.data.examples import Batch, Examples
from fedpeft.metrics import client_sums
from fedpeft.model import Network, set_mode
from fedpeft.tree import Tree

log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest relative difference (Euclidean norm) from the loop's gradients in the self-check."""


def choose_lane(network: Network, examples: Examples) -> Lane:
    """Fold, else vmap, else the loop; each but the loop must pass the self-check.

    The check runs two clients with different adapters on two padded rows each, dropout off. Why a
    lane was passed over is logged.
    """
    set_mode(network.model, training=False, base_dropout=False)
    batch, stacked = _probe(network, examples)
    wanted = _gradients(network, LoopLane(network.model), batch, stacked)
    for kind in (FoldLane, VmapLane):
        try:
            lane = kind(network.model)
            found = _gradients(network, lane, batch, stacked)
        except Exception as error:  # any refusal of a transform means: not this lane
            log.info("lane %s: %s: %s", kind.name, type(error).__name__, str(error)[:200])
            continue
        gap = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
        if gap <= TOLERANCE:
            log.info("lane %s (gradients within %.1e of the loop's)", lane.name, gap)
            return lane
        log.warning("lane %s passed over: gradients differ from the loop's by %.1e", kind.name, gap)
    log.warning("lane loop: clients train one after another; no batched lane carries this adapter")
    return LoopLane(network.model)


def _probe(network: Network, examples: Examples) -> tuple[Batch, Tree]:
    stream = streams.torch_stream(0, "lane probe")
    count = len(examples)
    index = torch.tensor([[0, min(1, count - 1)], [count - 1, -1]])
    stacked = {}
    for name, value in network.initial.items():
        noise = 0.02 * torch.randn((2, *value.shape), generator=stream)
        stacked[name] = (value + noise).to(network.device).requires_grad_()
    return examples.batch(index).to(network.device), stacked


def _gradients(network: Network, lane: Lane, batch: Batch, stacked: Tree) -> Tensor:
    sums, counts = client_sums(network.task, lane.logits(stacked, batch), batch)
    loss = (sums / counts.clamp(min=1)).sum()
    found = torch.autograd.grad(loss, list(stacked.values()), allow_unused=True)
    flat = [
        (torch.zeros_like(value) if g is None else g).flatten()
        for g, value in zip(found, stacked.values(), strict=True)
    ]
    return torch.cat(flat)
