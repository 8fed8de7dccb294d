"""The check before a run that clips per example: are its gradients really one example's each?

A lane that mixes examples, or that is wrong for one tensor, would void the clipping bound without a
sign of it. So two real examples, differently long where the data has such, go through the lane in
each other's company, under two different adapters, and each gradient is compared with that of the
plain model on that example alone: no lane, no batch, no padding.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from fedpeft import streams
from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import Lane, LoopLane
from fedpeft.cohort.per_example import Budget, PerExample
from fedpeft.config import Local
from fedpeft.data.examples import Examples
from fedpeft.errors import FedpeftError
from fedpeft.model import Network, set_mode
from fedpeft.tree import Layout, Tree, row

log = logging.getLogger(__name__)

TOLERANCE = 1e-2
"""Largest relative difference (Euclidean norm) of one tensor's gradient."""

FLOOR = 1e-5
"""A tensor's share of the whole gradient below which the difference is taken relative to this share
of the whole: there rounding is all that is left."""


def check_per_example(
    network: Network, lane: Lane, examples: Examples, local: Local, adapter: str
) -> None:
    """Compares the lane's per-example gradients with the plain model's; dropout is off.

    Does nothing unless ``local`` clips per example. adapter: its kind, for the message. Raises
    FedpeftError that names the tensor with the largest mismatch.
    """
    if local.clip_norm == 0 or local.clip_per != "example":
        return
    _refuse_batch_statistics(network, local)
    set_mode(network.model, training=False, base_dropout=False)
    pair, stacked = _pair(examples), _probes(network)
    index = np.stack([pair, pair[::-1]])  # [2 clients, 2 examples]
    wanted = [
        [_alone(network, row(stacked, k), examples, int(number)) for number in own]
        for k, own in enumerate(index)
    ]
    network.write(network.initial)
    largest = 0.0
    for ours in _ways(network, lane, examples):
        gap, where = _compare(ours, network.layout, stacked, index, wanted)
        if not gap <= TOLERANCE:  # a NaN too
            raise FedpeftError(
                f"local.clip_per='example' with adapter.kind={adapter!r} in lane {lane.name!r}: "
                f"an example's gradient in a batch is not what it is alone. The largest difference "
                f"is in {where}: {gap:.1e} of its norm (at most {TOLERANCE:.0e}, by "
                f"{ours.budget.passes} backward passes). A bound on it would protect nobody: set "
                f"engine.kind=sequential, or choose another adapter."
            )
        largest = max(largest, gap)
    log.info("per-example gradients of lane %s within %.1e of the loop's", lane.name, largest)


def _refuse_batch_statistics(network: Network, local: Local) -> None:
    set_mode(network.model, training=True, base_dropout=local.base_dropout)
    for name, module in network.model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise FedpeftError(
                f"local.clip_per='example' but {name} normalises by the statistics of its batch, "
                f"which mixes examples: set local.base_dropout=false, which keeps the base model "
                f"in eval mode."
            )


def _ways(network: Network, lane: Lane, examples: Examples) -> list[PerExample]:
    """The ways that a step may go in this lane."""
    local = Local(batch_size=2, clip_norm=1.0, clip_per="example")
    gradients = Gradients(lane, network.task, examples, local, network.device)
    numbers = Budget.of(network.device).numbers
    one, two = Budget(numbers, passes=1), Budget(numbers, passes=2)
    return [
        PerExample(gradients, budget)
        for budget in ([one] if isinstance(lane, LoopLane) else [one, two])
    ]


def _pair(examples: Examples) -> np.ndarray:
    """The shortest example that has something to predict, and the longest."""
    lengths = examples.lengths.numpy()
    usable = np.flatnonzero(lengths >= 2) if (lengths >= 2).any() else np.arange(len(lengths))
    order = usable[np.argsort(lengths[usable], kind="stable")]
    return np.array([order[0], order[-1]])


def _probes(network: Network) -> Tree:
    """Two adapters away from their start, where parts of the gradient may be zero."""
    stream = streams.torch_stream(0, "per-example probe")
    return {
        name: (value + 0.02 * torch.randn((2, *value.shape), generator=stream)).to(network.device)
        for name, value in network.initial.items()
    }


def _alone(network: Network, values: Tree, examples: Examples, number: int) -> Tree:
    """The gradient of one example's own loss by the plain model."""
    network.write(values)
    own = {n: p for n, p in network.model.named_parameters() if n in values}
    tokens = examples.tokens[examples.starts[number] : examples.starts[number + 1]].long()
    tokens = tokens[None].to(network.device)
    logits = network.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float()
    if examples.labels is None:
        text = logits[0, -tokens.shape[1] :]  # virtual tokens come before it
        loss = cross_entropy(text[:-1], tokens[0, 1:])
    else:
        loss = cross_entropy(logits, examples.labels[number : number + 1].to(network.device))
    found = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(own.items(), found, strict=True)
    }


def _compare(
    ours: PerExample, layout: Layout, stacked: Tree, index: np.ndarray, wanted: list[list[Tree]]
) -> tuple[float, str]:
    """The largest relative difference over examples and tensors, and its tensor."""
    matrix = layout.pack(stacked)
    worst = (0.0, "")
    for position in range(index.size):

        def only(norms: Tensor, at: Tensor, position: int = position) -> Tensor:
            return (at == position).float()

        found = ours.weighted(matrix, layout, index, matrix.new_ones(len(index)), only)
        k, i = divmod(position, index.shape[1])
        alone = wanted[k][i]
        length = torch.stack([g.norm() for g in alone.values()]).norm()
        gap = float((found.norms[k, i] - length).abs() / length.clamp(min=1e-30))
        tensor = _worst(layout.unpack(found.total[k : k + 1]), alone, float(length))
        worst = max(worst, tensor, (gap, "the norm over all tensors"), key=_first)
    return worst


def _worst(found: Tree, wanted: Tree, whole: float) -> tuple[float, str]:
    least = max(FLOOR * whole, 1e-30)
    gaps = [
        (float((found[name][0] - g).norm()) / max(float(g.norm()), least), name)
        for name, g in wanted.items()
    ]
    return max(gaps, key=_first)


def _first(gap: tuple[float, str]) -> float:
    """Order of gaps: NaN is the worst."""
    return math.inf if math.isnan(gap[0]) else gap[0]
