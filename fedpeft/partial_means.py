"""Means over clients of which each has only a part: other ranks, other structures.

An entry is the weighted mean of the clients that have it. Where nobody does it stays what it was;
with ``fill`` those without it vote for what it was (FedMP's R2SP).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.bandits.agents import Seen
from fedpeft.bandits.costs import seconds
from fedpeft.errors import FedpeftError, suggest
from fedpeft.lowrank import (
    concatenate,
    is_a,
    is_b,
    leading_svd,
    lora_pairs,
    squared_norms,
    truncated_svd,
)
from fedpeft.message import Messages, gather
from fedpeft.pruning.roll import Roll
from fedpeft.pruning.structure import Part, kept, sides
from fedpeft.pruning.wire import factors, put
from fedpeft.ranks import full_rank, widen
from fedpeft.strategy import Effort
from fedpeft.tree import Tree, mean, sort


def masked_mean(
    old: Tensor, values: Tensor, masks: Tensor, weights: Tensor, fill: bool = False
) -> Tensor:
    """``sum w m x / sum w m`` where somebody covers it, else ``old``; in ``old``'s dtype.

    values, masks (bool): ``[K, *shape]``; weights: ``[K]``, positive. fill:
    ``old + sum w m (x - old) / sum w``. What lies outside masks is not looked at.
    """
    w = weights.to(values.device, torch.float64).view(-1, *[1] * (values.dim() - 1))
    before = old.to(values.device, torch.float64)
    moved = torch.where(masks, values.double() - before, 0.0)
    total = (w * moved).sum(0)
    cover = w.sum(0) if fill else (w * masks).sum(0)
    found = torch.where(cover > 0, before + total / cover.clamp(min=1e-300), before)
    return torch.where(masks.any(0), found, before).to(old)


def covered(parts: Sequence[Part], like: Tree, alive: Tree, ranks: Tensor) -> Tree:
    """Which entries of LoRA's factors every client has: bool ``[K, *shape]``, by name.

    like: the whole adapter, unstacked. ranks: int64 ``[K]``.
    """
    found = {}
    for name, value in like.items():
        if is_a(name) or is_b(name):
            across = torch.arange(value.shape[0 if is_a(name) else 1]) < ranks[:, None]
            mask = across[:, :, None] if is_a(name) else across[:, None, :]
            found[name] = mask.expand(len(ranks), *value.shape)
    for name, dim, members in factors(parts, like):
        own = kept(members, alive, like[name].shape[dim - 1]).cpu()
        found[name] = found[name] & (own[:, :, None] if dim == 1 else own[:, None, :])
    return found


def by_factor(old: Tree, own: Tree, masks: Tree, weights: Tensor, fill: bool = False) -> Tree:
    """A and B each by ``masked_mean``: the names of ``masks``."""
    return {
        name: masked_mean(old[name], own[name], mask.to(own[name].device), weights, fill)
        for name, mask in masks.items()
    }


def by_product(
    old: Tree,
    own: Tree,
    cover: tuple[Sequence[Part], Tree],
    weights: Tensor,
    scaling: Mapping[str, float],
) -> Tree:
    """The mean of the updates s B A where clients have them, split by its SVD to the whole rank.

    ``B = U S^1/2 / sqrt s``, ``A = S^1/2 V' / sqrt s``. cover: parts, and what clients have of
    them. With nothing pruned no dense matrix is formed. Exact before the SVD cuts it to rank r.
    """
    parts, alive = cover
    at, found = sides(parts), {}
    for layer, (name_a, name_b) in lora_pairs(old, "fedspine").items():
        s, b, a = scaling[layer], own[name_b], own[name_a]
        rank, shape = len(old[name_a]), (len(old[name_b]), old[name_a].shape[1])
        there = [
            kept(at[layer, side], alive, size) if (layer, side) in at else None
            for side, size in zip(("rows", "columns"), shape, strict=True)
        ]
        if all(x is None or bool(x.all()) for x in there):
            u, d, vt = truncated_svd(*concatenate(b, a, s * weights / weights.sum()), rank)
        else:
            before = s * old[name_b].double() @ old[name_a].double()
            u, d, vt = leading_svd(_dense_mean(before, s, (b, a), there, weights), rank)
        root = (d / s).sqrt()
        found[name_a] = _padded(root[:, None] * vt, rank, 0).to(old[name_a])
        found[name_b] = _padded(u * root, rank, 1).to(old[name_b])
    return found


def _dense_mean(
    before: Tensor,
    s: float,
    pair: tuple[Tensor, Tensor],
    there: Sequence[Tensor | None],
    weights: Tensor,
) -> Tensor:
    """The mean of dense updates, one client after another; ``before`` where nobody has an entry."""
    total, cover = torch.zeros_like(before), torch.zeros_like(before)
    for k, weight in enumerate(weights.tolist()):
        mask = torch.ones_like(before, dtype=torch.bool)
        for dim, own in enumerate(there):
            if own is not None:
                mask &= own[k].cpu()[:, None] if dim == 0 else own[k].cpu()[None]
        update = s * pair[0][k].double().cpu() @ pair[1][k].double().cpu()
        total += torch.where(mask, weight * update, 0.0)
        cover += weight * mask.double()
    return torch.where(cover > 0, total / cover.clamp(min=1e-300), before)


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    """Zeros for singular triples that a matrix of this size does not have."""
    missing = rank - factor.shape[dim]
    return torch.nn.functional.pad(factor, (0, 0, 0, missing) if dim == 0 else (0, missing))


TOKENS = 20480
"""Tokens that a client trains on in a round, for the cost model: 20 steps of 8 rows of 128."""

TOLD = ("before", "after", "importance")
"""Scalars of a reply that bandits learn from; NaN, which gains nothing, where one is missing."""

WEIGHTS = ("norm_samples", "samples", "norm")
"""Rules of ``weigh``."""


def check(weights: str, target: float, step: float, probe: int) -> None:
    """Raises FedpeftError for a rule that does not exist, and for numbers outside their range."""
    if not (0 <= target < 1 and 0 < step < 1 <= probe):
        raise FedpeftError(
            f"strategy.target={target}, step={step}, probe={probe}: they must lie in [0, 1), "
            f"(0, 1), and from 1 up."
        )
    if weights not in WEIGHTS:
        raise FedpeftError(
            f"strategy.weights={weights!r} does not exist. {suggest(weights, WEIGHTS)}"
        )


def weigh(kind: str, n: Tensor, sizes: Tensor, parts: Sequence[Part], alive: Tree) -> Tensor:
    """A client's weight ``[K]``: ``samples`` n, ``norm`` ||dW||, ``norm_samples`` both.

    The last is ``n ||dW|| / sqrt(share of the prunable weights that is there)``. Where nobody has
    moved yet it is n. sizes: squared norms of the updates.
    """
    if kind == "samples" or not bool(sizes.sum() > 0):
        return n
    size = sizes.cpu().double().sqrt()
    if kind == "norm":
        return size
    total = sum(p.groups * p.weights for p in parts)
    left = torch.stack([alive[p.name].double().sum(1).cpu() * p.weights for p in parts]).sum(0)
    return n * size * (total / left.clamp(min=1)).sqrt()


@dataclass(frozen=True)
class Collected:
    """A round's replies, whole again: every tensor ``[K, *shape]``, zeros where nothing was sent.

    left: what clients have now. gone: the share of their groups. p: their shares by weight. sizes:
    bytes of what each sent. scalars: by name, ``[K]``.
    """

    clients: tuple[str, ...]
    own: Tree
    left: Tree
    p: Tensor
    gone: Tensor
    sizes: Tensor
    scalars: dict[str, Tensor]
    parts: tuple[Part, ...]


def collect(replies: Sequence[Messages], roll: Roll, like: Tree, share: Tensor) -> Collected:
    """Replies of pruned clients of unequal ranks; share: what each was told to have gone, ``[K]``.

    Their tree ``groups`` is there where they were told to prune.
    """
    parts, expand, first, stacks, fine = roll.known, widen(like), 0, [], []
    for reply in replies:
        alive, told = roll.alive(reply.clients), share[first : first + len(reply)]
        left, taken = alive, torch.ones(len(reply), dtype=torch.bool)
        if "groups" in reply.trees:
            left, taken = roll.accepted(alive, reply.trees["groups"]["bits"], told)
        whole = expand(put(parts, reply.trees["adapter"], alive, like))
        size = sum(v[0].numel() * v.element_size() for v in reply.trees["adapter"].values())
        lacking = torch.full((len(reply),), torch.nan, dtype=torch.float64)
        scalars = {name: reply.scalars.get(name, lacking) for name in ("weight", *TOLD)}
        scalars["size"] = torch.full((len(reply),), float(size), dtype=torch.float64)
        stacks.append(Messages(reply.clients, {"adapter": whole, "left": left}, scalars))
        fine.append(taken)
        first += len(reply)
    (own, p), (left, _) = gather(stacks, "adapter"), gather(stacks, "left")
    scalars = {n: torch.cat([s.scalars[n] for s in stacks]) for n in stacks[0].scalars}
    names = tuple(client for reply in replies for client in reply.clients)
    gone = torch.where(torch.cat(fine), share, roll.before(names))
    return Collected(names, own, left, p, gone, scalars["size"], scalars, parts)


def observed(got: Collected, roll: Roll, step: float, goal: float, seed: int) -> Seen:
    """What the bandits are told of a round; times by the cost model, on ``TOKENS`` tokens.

    roll: before the round. step: the largest that is pruned at once. goal: the share that is gone
    in the end. Work is 4 FLOPs per weight and token, forward and back to the adapter.
    """
    fall = got.scalars["before"] - got.scalars["after"]
    progress = (got.gone - roll.before(got.clients)) / step
    flops = 4 * TOKENS * roll.weights * roll.work(got.gone)
    times = seconds(got.clients, seed, flops, 2 * got.sizes)
    importance = got.scalars["importance"]
    return Seen(got.clients, fall, progress, importance, 1 - got.gone, times, 1 - goal)


def efforts(
    clients: Sequence[str], roll: Roll, gone: Tensor, ranks: Tensor, like: Tree, probe: int
) -> dict[str, Effort]:
    """What a round costs clients of which ``gone`` ``[K]`` is gone, for the fleet's clock.

    ranks: int64 ``[K]``. probe: examples whose loss they compute before training, and after. The
    importances take 8 FLOPs by weight, rank and step. Of LoRA, rows and columns that are gone are
    counted as if they were there.
    """
    found, full = {}, full_rank(like)
    for client, left, rank in zip(clients, roll.work(gone).tolist(), ranks.tolist(), strict=True):
        step = 8.0 * rank * left * roll.weights
        found[client] = Effort(1 - left, rank / full, probe, step)
    return found


def merged(
    got: Collected,
    old: Tree,
    ranks: Tensor,
    scaling: Mapping[str, float],
    how: tuple[str, str],
) -> Tree:
    """The new adapter. how: ``factor``, ``r2sp`` or ``product``, and the weights' rule (``weigh``).

    ranks: the clients', int64 ``[K]``. Tensors that are not LoRA's are averaged by p.
    """
    masks = covered(got.parts, old, got.left, ranks)
    own = {n: torch.where(m.to(got.own[n].device), got.own[n], 0.0) for n, m in masks.items()}
    weights = weigh(how[1], got.p, squared_norms(own, scaling), got.parts, got.left)
    if how[0] == "product":
        found = by_product(old, own, (got.parts, got.left), weights, scaling)
    else:
        found = by_factor(old, own, masks, weights, fill=how[0] == "r2sp")
    heads = {n: v for n, v in got.own.items() if n not in masks}
    return sort({n: v.cpu() for n, v in found.items()} | (mean([(heads, got.p)]) if heads else {}))
