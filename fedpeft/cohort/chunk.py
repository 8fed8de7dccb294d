"""How many clients are in flight at once: by tokens, within the memory that is free.

The memory of a client is measured, not guessed: one forward pass of one client's largest batch,
in which every tensor that autograd keeps is counted. That holds for any model, adapter, attention
kernel, precision and checkpointing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import LoopLane
from fedpeft.data.examples import Batch
from fedpeft.model import Network, set_mode
from fedpeft.tree import Tree

TOKENS = {"cpu": 2048, "cuda": 8192}
"""Tokens per fused step beyond which more clients gain nothing (CPU: measured, benchmarks/; GPU: a
bound on what ``fastest`` may find)."""

MOST = {"cpu": 64, "cuda": 512}
"""Most clients in flight that are chosen without being asked for."""

SHARE = 0.5
"""Share of the free memory that the estimate may fill."""

MARGIN = {"cpu": 1.6, "cuda": 1.25}
"""What a step needs beyond the tensors that it keeps: gradients, temporaries, and on a CPU the
pages that malloc does not give back (measured: 1.14 without them, 1.5 to 1.6 with them)."""

COHORT = 8
"""Clients that a strategy sees at once, for each one in flight: so rows can be refilled."""


SOME = 10_000
"""Examples whose lengths are read to find a long batch."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training needs beside the model, and bytes free on the device.

    per_client: one more client in flight: activations kept for the backward pass, the row's adapter
    with gradient, optimizer state and temporaries, and COHORT clients' adapters, as they came and
    as they go.
    """

    per_client: int
    free: int


def estimate(network: Network, gradients: Gradients, workers: int = 1) -> MemoryEstimate:
    """Measures the memory of one client with the longest rows there are.

    workers: processes that share this machine's memory (each GPU has its own).
    """
    local, size = gradients.local, network.layout.size
    moments = 2 if local.optimizer == "adamw" else int(local.momentum > 0)
    waiting = 2 * (1 if isinstance(gradients.lane, LoopLane) else COHORT)
    state = 4 * size * (4 + moments + waiting)
    kept, blocks = kept_for_backward(network, gradients), gradients.lane.blocks
    if blocks:  # what lies outside them, their inputs, and one block while it is recomputed
        whole = kept_for_backward(network, gradients, training=False)
        tokens = gradients.local.batch_size * gradients.examples.longest
        config: Any = network.model.config
        inputs = 4 * blocks * tokens * int(config.hidden_size)
        kept += inputs + (whole - kept) // blocks
    kind = network.device.type
    free = free_memory(network.device) // (workers if kind == "cpu" else 1)
    return MemoryEstimate(int(MARGIN[kind] * kept) + state, free)


def kept_for_backward(network: Network, gradients: Gradients, training: bool = True) -> int:
    """Bytes that autograd keeps of one client's forward pass; parameters do not count.

    Nor does, in training, what lies inside blocks that are recomputed.
    """
    stacked = _copies(network, 1)
    known = [*network.model.parameters(), *stacked.values()]
    parameters = {value.untyped_storage().data_ptr() for value in known}
    found: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return value

    batch = _longest(gradients, 1)
    set_mode(network.model, training, gradients.local.base_dropout)
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = gradients.losses(stacked, batch)
    del loss  # only now may a storage be freed, and its address be taken by another
    return sum(found.values())


def free_memory(device: torch.device) -> int:
    """Bytes free on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def choose(network: Network, gradients: Gradients, workers: int = 1) -> int:
    """Clients in flight: enough to keep the device busy, within SHARE of the free memory.

    workers: as in ``estimate``. On a GPU, where the best number depends on the card, numbers up to
    the bound are tried.
    """
    if isinstance(gradients.lane, LoopLane):
        return 1
    need, kind = estimate(network, gradients, workers), network.device.type
    tokens = max(1, gradients.local.batch_size * gradients.examples.longest)
    by_tokens = max(1, min(MOST[kind], round(TOKENS[kind] / tokens)))
    by_memory = max(1, int(SHARE * need.free / max(1, need.per_client)))
    most = min(by_tokens, by_memory)
    if kind == "cpu":
        return most
    return fastest(lambda width: seconds_of_step(network, gradients, width), most)


def fastest(seconds: Callable[[int], float], most: int) -> int:
    """The smallest of 1, 2, 4, ..., ``most`` beyond which a client is hardly cheaper.

    seconds: time of one step with so many clients. The search ends when doubling saves less than a
    twentieth per client, or runs out of memory.
    """
    width, best = 1, seconds(1)
    while width < most:
        wider = min(2 * width, most)
        try:
            each = seconds(wider) / wider
        except torch.OutOfMemoryError:
            break
        if each > 0.95 * best:
            break
        width, best = wider, each
    return width


def seconds_of_step(network: Network, gradients: Gradients, width: int) -> float:
    """Wall time of a forward and backward pass of ``width`` clients, the better of two."""
    stacked, batch = _copies(network, width), _longest(gradients, width)
    set_mode(network.model, True, gradients.local.base_dropout)
    times = []
    with torch.random.fork_rng():
        for _ in range(2):
            began = time.perf_counter()
            loss = gradients.losses(stacked, batch).sum()
            torch.autograd.grad(loss, list(stacked.values()), allow_unused=True)
            if network.device.type == "cuda":
                torch.cuda.synchronize(network.device)
            times.append(time.perf_counter() - began)
    return min(times)


def _copies(network: Network, clients: int) -> Tree:
    """The initial adapter for ``clients`` clients, on the device, as leaves of autograd."""
    return {
        name: value.expand(clients, *value.shape).to(network.device).clone().requires_grad_()
        for name, value in network.initial.items()
    }


def _longest(gradients: Gradients, clients: int) -> Batch:
    """A batch as long as the longest example for each of ``clients`` clients.

    Of very many examples every n-th is looked at: rows are padded to the longest in any case.
    """
    size, examples = gradients.local.batch_size, gradients.examples
    some = np.arange(0, len(examples), -(-len(examples) // SOME))
    longest = some[np.argsort(-examples.lengths_of(some), kind="stable")[:size]]
    index = torch.from_numpy(np.resize(longest, (1, size))).repeat(clients, 1)
    return examples.batch(index, at_least=examples.longest).to(gradients.device)
