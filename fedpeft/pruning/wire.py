"""LoRA's factors of pruned clients: what travels is what they have, in a model it is whole again.

Rows of B and columns of A that belong to groups that are gone are left out of messages, client by
client; a stack's clients lack equally many. Layers and sides that no part knows, and tensors that
are not LoRA's, stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.lowrank import is_a, is_b, ranks_of
from fedpeft.pruning.structure import Member, Part, kept, pack, sides, unpack
from fedpeft.tree import Tree, numel

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


@dataclass(frozen=True)
class Common:
    """One structure for all clients: which groups there are, and which ranks of which layer.

    alive: part -> bool ``[G]``. ranks: layer -> bool ``[r]``; a layer without any has no adapter.
    """

    alive: Tree
    ranks: Tree

    def bits(self, parts: Sequence[Part]) -> Tree:
        """As it travels: uint8 by name."""
        one = {name: own[None] for name, own in self.alive.items()}
        flags = torch.cat([self.ranks[layer] for layer in sorted(self.ranks)])
        return {"groups": pack(parts, one)[0], "ranks": flags.to(torch.uint8)}

    @staticmethod
    def of(parts: Sequence[Part], bits: Tree, like: Tree) -> Common:
        """What ``bits`` was made of, for an adapter like ``like``."""
        sizes = ranks_of(like, "light_peft")
        alive = {name: own[0] for name, own in unpack(parts, bits["groups"][None]).items()}
        names = sorted(sizes)
        flags = bits["ranks"].bool().split([sizes[name] for name in names])
        return Common(alive, dict(zip(names, flags, strict=True)))

    def shares(self, parts: Sequence[Part], weights: int, like: Tree) -> tuple[float, float]:
        """What is gone of the frozen model's products, and what is there of LoRA's numbers.

        weights: of all products. like: the whole adapter.
        """
        gone = sum(int((~self.alive[p.name]).sum()) * p.weights for p in parts)
        trained = {n: v for n, v in self.take(parts, like, like).items() if is_a(n) or is_b(n)}
        every = {n: v for n, v in like.items() if is_a(n) or is_b(n)}
        return gone / weights, numel(trained) / numel(every)

    def places(self, parts: Sequence[Part], like: Tree) -> dict[str, tuple[Tensor, Tensor]]:
        """The rows and columns that are there, of every factor of a layer with an adapter."""
        one, found = {name: own[None] for name, own in self.alive.items()}, {}
        known = {name: (dim, members) for name, dim, members in factors(parts, like)}
        for layer, ranks in self.ranks.items():
            for x in "AB" if bool(ranks.any()) else "":
                name = f"{layer}.lora_{x}.default.weight"
                size = like[name].shape[1 if x == "A" else 0]
                across = torch.ones(size, dtype=torch.bool)
                if name in known:
                    across = kept(known[name][1], one, size)[0]
                both = (ranks, across) if x == "A" else (across, ranks)
                found[name] = (torch.nonzero(both[0])[:, 0], torch.nonzero(both[1])[:, 0])
        return found

    def take(self, parts: Sequence[Part], tree: Tree, like: Tree) -> Tree:
        """What is there of a tree ``[..., rows, columns]`` of whole tensors, heads included."""
        places = self.places(parts, like)
        gone = {f"{layer}.lora_{x}.default.weight" for layer in self.ranks for x in "AB"}
        found = {}
        for name, value in tree.items():
            if name in places:
                rows, columns = (at.to(value.device) for at in places[name])
                found[name] = value.index_select(-2, rows).index_select(-1, columns)
            elif name not in gone:
                found[name] = value
        return found

    def alone(self, parts: Sequence[Part], tree: Tree) -> Tree:
        """An unstacked tree of whole tensors with zeros in place of all that is gone."""
        return {n: torch.zeros_like(v) for n, v in tree.items()} | self.put(
            parts, self.take(parts, tree, tree), tree
        )

    def put(self, parts: Sequence[Part], tree: Tree, like: Tree) -> Tree:
        """The inverse, with zeros around it; factors of layers without an adapter stay away."""
        places, found = self.places(parts, like), {}
        for name, value in tree.items():
            found[name] = value
            if name in places:
                rows, columns = (at.to(value.device) for at in places[name])
                wide = value.new_zeros(*value.shape[:-1], like[name].shape[-1])
                wide = wide.index_copy(-1, columns, value)
                whole = value.new_zeros(*wide.shape[:-2], *like[name].shape)
                found[name] = whole.index_copy(-2, rows, wide)
        return found
