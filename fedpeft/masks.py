"""Which part of an adapter a client trains: masks by policy, for a cohort at once.

The extraction policies of the literature choose among *units*, from the units' scores, a client's
budget, the round and a seed. What the units are is the level's to say:

- ``ranks``: the rank components of a LoRA layer (a row of A with the column of B), layer by layer;
- ``modules``: whole LoRA layers;
- ``elements``: the numbers of a tensor, tensor by tensor (of ``neuron``: the rows of a tensor).

Tensors that are no factor of LoRA (heads) have no mask: everybody trains them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedpeft.codecs import bits
from fedpeft.errors import FedpeftError, suggest
from fedpeft.lowrank import is_a, is_b
from fedpeft.streams import numpy_stream
from fedpeft.tree import Tree, shared

POLICIES = (
    "static_ordered",
    "ordered_dropout",
    "rolling",
    "random",
    "magnitude",
    "neuron",
    "fixed_subnet",
    "quartile",
)
"""How units are chosen; k = ceil(budget * units), at least 1.

static_ordered: the first k (HeteroFL, arXiv 2010.01264). ordered_dropout: the same with a budget
that is drawn, see ``draw_budgets`` (FjORD, arXiv 2102.13451). rolling: (round + j) mod units, j < k
(FedRolex, arXiv 2212.01548). random: k anew for each client and round. magnitude: the k largest.
neuron: the k of largest incoming norm. fixed_subnet: k drawn once for all clients of a budget.
quartile: by region of magnitude (``DROPPED``; arXiv 2310.08670). Ties go to the lower number.
"""

Level = Literal["ranks", "modules", "elements"]

DROPPED: Mapping[int, tuple[int, ...]] = {
    1: (),
    2: (2,),
    3: (1,),
    4: (0,),
    5: (1, 2),
    6: (0, 2),
    7: (0, 1),
}
"""``quartile``: a client's type, which is its budget -> the quarters that it does not train.

Units are sorted by magnitude, and quarter 0 holds the smallest.
"""


@dataclass(frozen=True)
class Ask:
    """Who asks for masks, and when.

    budgets: of each client, a share in (0, 1]; for ``quartile`` a type from 1 to 7. round: from 0.
    """

    clients: Sequence[str]
    budgets: Sequence[float]
    round: int
    seed: int


def check(policy: str, budgets: Sequence[float]) -> None:
    """Raises FedpeftError for a policy that does not exist, or a budget that it does not know."""
    if policy not in POLICIES:
        raise FedpeftError(f"strategy.policy={policy!r}: {suggest(policy, POLICIES)}")
    for budget in budgets:
        if policy == "quartile" and budget not in DROPPED:
            raise FedpeftError(
                f"strategy.budgets has {budget}: with strategy.policy='quartile' they are types, "
                f"from 1 (everything) to 7."
            )
        if policy != "quartile" and not 0 < budget <= 1:
            raise FedpeftError(
                f"strategy.budgets has {budget}: with strategy.policy={policy!r} they are shares, "
                f"above 0 and up to 1."
            )


def draw_budgets(ask: Ask, levels: Sequence[float]) -> Ask:
    """``ordered_dropout``: every client's budget drawn among the levels up to its own."""
    drawn = []
    for client, most in zip(ask.clients, ask.budgets, strict=True):
        fitting = [level for level in sorted(set(levels)) if level <= most]
        stream = numpy_stream(ask.seed, "width", ask.round, client)
        drawn.append(fitting[int(stream.integers(len(fitting)))])
    return replace(ask, budgets=tuple(drawn))


def choose(policy: str, scores: Tensor, ask: Ask, group: str) -> Tensor:
    """The units that clients train, bool ``[K, w]``, of a group with scores ``[w]``.

    group: its name, so that groups are drawn independently. Raises FedpeftError for quarters of
    fewer than 4 units.
    """
    w = len(scores)
    found = torch.zeros(len(ask.clients), w, dtype=torch.bool, device=scores.device)
    if policy == "quartile":
        if w < 4 and set(ask.budgets) != {1}:
            raise FedpeftError(
                f"strategy.policy='quartile': {group} has {w} units and cannot be quartered. Raise "
                f"adapter.r, or set strategy.level=elements."
            )
        rank = torch.argsort(torch.argsort(scores, stable=True))  # ranks, not the sorting order
        quarter = rank * 4 // w
        for k, kind in enumerate(ask.budgets):
            gone = torch.tensor(DROPPED[int(kind)], device=scores.device)
            found[k] = ~torch.isin(quarter, gone)
        return found
    order = torch.arange(w)
    if policy in ("magnitude", "neuron"):
        order = torch.argsort(scores, descending=True, stable=True)
    elif policy == "rolling":
        order = (order + ask.round) % w
    for k, (client, budget) in enumerate(zip(ask.clients, ask.budgets, strict=True)):
        if policy in ("random", "fixed_subnet"):
            own = (ask.round, client) if policy == "random" else (repr(budget),)
            order = torch.from_numpy(numpy_stream(ask.seed, policy, *own, group).permutation(w))
        found[k, order[: max(1, math.ceil(budget * w - 1e-9))]] = True
    return found


def masks(policy: str, level: Level, adapter: Tree, ask: Ask) -> Tree:
    """The masks of these clients: every LoRA factor's name -> bool ``[K, *shape]``."""
    pairs = [(n, n.replace(".lora_A.", ".lora_B.")) for n in sorted(adapter) if is_a(n)]
    k, found = len(ask.clients), {}
    if level == "elements":
        for name in (name for pair in pairs for name in pair):
            x = adapter[name]
            scores = x.norm(dim=1) if policy == "neuron" else x.abs().flatten()
            units = choose(policy, scores, ask, name)
            shape = (k, len(x), 1) if policy == "neuron" else (k, *x.shape)
            found[name] = units.view(shape).expand(k, *x.shape)
        return found
    if level == "modules":
        sizes = torch.stack([_component(policy, adapter, pair).norm() for pair in pairs])
        units = choose(policy, sizes, ask, "modules")
        for i, pair in enumerate(pairs):
            for name in pair:
                found[name] = units[:, i, None, None].expand(k, *adapter[name].shape)
        return found
    for a, b in pairs:
        units = choose(policy, _component(policy, adapter, (a, b)), ask, a)
        found[a] = units[:, :, None].expand(k, *adapter[a].shape)
        found[b] = units[:, None, :].expand(k, *adapter[b].shape)
    return found


def _component(policy: str, adapter: Tree, pair: tuple[str, str]) -> Tensor:
    """||B_j|| ||A_j|| of every rank component, ``[r]``; for ``neuron`` what comes in, ||A_j||."""
    down: Tensor = adapter[pair[0]].norm(dim=1)
    return down if policy == "neuron" else down * adapter[pair[1]].norm(dim=0)


def take(level: Level, stacked: Tree, masks: Tree) -> Tree:
    """What clients are sent of an adapter, or send of their own: what they train.

    stacked: ``[K, *shape]``; of all clients the same tensors (``tree.broadcast``) may give views of
    one copy. Factors come as ``[K, q, d_in]`` and ``[K, d_out, q]`` (``ranks``), whole or not at
    all (``modules``), or as ``[K, q]`` (``elements``); clients of one call must have as many units
    each. Other tensors are as they were.
    """
    found = {}
    for name, x in stacked.items():
        mask = masks.get(name)
        if mask is None or level == "modules":
            if mask is None or bool(mask.any()):
                found[name] = x
            continue
        one = shared(x) and bool((mask == mask[:1]).all())
        on, of = (mask[:1], x[:1]) if one else (mask, x)
        kept = of[on.to(x.device)].view(len(of), -1)
        if level == "ranks":
            size = (-1, x.shape[2]) if is_a(name) else (x.shape[1], -1)
            kept = kept.view(len(of), *size)
        found[name] = kept.expand(len(x), *kept.shape[1:])
    return found


def put(kept: Tree, masks: Tree) -> Tree:
    """What ``take`` took, back in its place; zeros elsewhere. Stacked: ``[K, *shape]``."""
    like, found = next(iter(kept.values())), {n: x for n, x in kept.items() if n not in masks}
    for name, mask in masks.items():
        found[name] = like.new_zeros(mask.shape)
        if name in kept:
            found[name][mask.to(like.device)] = kept[name].flatten()
    return found


def pattern(masks: Tree) -> list[int]:
    """A number for each client, the same for clients that have some of the same tensors."""
    some = torch.stack([masks[name].flatten(1).any(1) for name in sorted(masks)], dim=1)
    return [int("".join("01"[x] for x in own), 2) for own in some.tolist()]


def to_bytes(masks: Tree) -> tuple[bytes, ...]:
    """Every client's masks as bits, tensor by tensor in the order of names, row-major."""
    flat = torch.cat([masks[name].flatten(1) for name in sorted(masks)], dim=1)
    return tuple(bits.pack(own.numpy()).tobytes() for own in flat.cpu())


def from_bytes(data: Sequence[bytes], like: Tree) -> Tree:
    """What ``to_bytes`` was given, of the factors in ``like``. Raises PayloadError."""
    shapes = {n: like[n].shape for n in sorted(like) if is_a(n) or is_b(n)}
    sizes = [shape.numel() for shape in shapes.values()]
    flags = [bits.unpack(np.frombuffer(d, np.uint8), sum(sizes), "the masks") for d in data]
    parts = torch.from_numpy(np.stack(flags)).bool().split(sizes, dim=1)
    return {n: p.view(len(data), *shapes[n]) for n, p in zip(shapes, parts, strict=True)}
