"""LoRA's factors of pruned clients: what travels is what they have, in a model it is whole again.

Rows of B and columns of A that belong to groups that are gone are left out of messages, client by
client; a stack's clients lack equally many. Layers and sides that no part knows, and tensors that
are not LoRA's, stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedpeft.pruning.structure import Member, Part, kept, sides
from fedpeft.tree import Tree

Plain = tuple[str, str, int, tuple[tuple[str, str, int, int], ...], int]
"""A part as a strategy's state can hold it; the last member stands in for the gate."""


def plain(parts: Sequence[Part]) -> list[Plain]:
    """The parts as plain data, without their gates, which only clients need."""
    found: list[Plain] = []
    for part in parts:
        members = tuple((m.layer, str(m.side), m.width, m.start) for m in part.members)
        found.append((part.name, str(part.kind), part.groups, members, part.weights))
    return found


def parts_of(data: Sequence[Plain]) -> tuple[Part, ...]:
    """What ``plain`` was given; gates are not to be used."""
    found = []
    for name, kind, groups, rows, weights in data:
        members = tuple(
            Member(layer, "rows" if side == "rows" else "columns", width, start)
            for layer, side, width, start in rows
        )
        whole = "heads" if kind == "heads" else "channels"
        found.append(Part(name, whole, groups, members, members[-1], weights))  # type: ignore[arg-type]
    return tuple(found)


def factors(parts: Sequence[Part], tree: Tree) -> list[tuple[str, int, list[tuple[Part, Member]]]]:
    """The factors that parts cut, where they are LoRA's: name, dimension (stacked), members."""
    found = []
    for (layer, side), members in sides(parts).items():
        name = f"{layer}.lora_{'B' if side == 'rows' else 'A'}.default.weight"
        if name in tree:
            found.append((name, 1 if side == "rows" else 2, members))
    return found


def take(parts: Sequence[Part], stacked: Tree, alive: Tree) -> Tree:
    """The stacked tree without what clients lack; ``alive`` (bool ``[K, G]``) of equal counts."""
    found = dict(stacked)
    for name, dim, members in factors(parts, stacked):
        value = stacked[name]
        found[name] = value.gather(dim, _index(members, alive, value.shape[dim], value, dim))
    return found


def put(parts: Sequence[Part], stacked: Tree, alive: Tree, like: Tree) -> Tree:
    """The inverse of ``take``: zeros in place of what clients lack; ``like`` unstacked, whole."""
    found = dict(stacked)
    for name, dim, members in factors(parts, stacked):
        value, size = stacked[name], like[name].shape[dim - 1]
        shape = list(value.shape)
        shape[dim] = size
        index = _index(members, alive, size, value, dim)
        found[name] = value.new_zeros(shape).scatter(dim, index, value)
    return found


def _index(
    members: list[tuple[Part, Member]], alive: Tree, size: int, like: Tensor, dim: int
) -> Tensor:
    """Where the rows (dim 1) or columns (dim 2) lie, in the shape of what travels."""
    mask = kept(members, alive, size).to(like.device)
    where = torch.nonzero(mask)[:, 1].view(len(mask), -1)
    other = like.shape[3 - dim]
    if dim == 1:
        return where[:, :, None].expand(-1, -1, other)
    return where[:, None, :].expand(-1, other, -1)
