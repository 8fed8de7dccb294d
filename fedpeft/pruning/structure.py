"""What can be pruned from a model: parts of its blocks, in groups that go as a whole.

A part is the heads of one block's attention, or the channels of its feed-forward layers; its groups
are numbered. A group is rows and columns of linear layers that only make sense together: of a head
the rows of q, k and v and the columns of the output projection; with grouped queries of a key-value
head with all its query heads; of a channel the rows of up (and gate) and the column of down.

Which groups there are is a bool tensor by part, ``[G]``, or ``[K, G]`` for K clients; as bits it is
``ceil(G / 8)`` bytes a part, the parts one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedpeft.tree import Tree


@dataclass(frozen=True)
class Member:
    """A layer's part in every group: ``width`` rows or columns each, from ``start`` on.

    layer: the module's name in the model. Rows are of ``[d_out, d_in]``, however it is held.
    """

    layer: str
    side: Literal["rows", "columns"]
    width: int
    start: int = 0

    def index(self, alive: Tensor) -> Tensor:
        """The rows or columns, of those that are in groups, that ``alive`` ``[G]`` keeps."""
        first = torch.nonzero(alive).flatten() * self.width + self.start
        return (first[:, None] + torch.arange(self.width, device=alive.device)).flatten()


@dataclass(frozen=True)
class Part:
    """Heads or channels of one block.

    weights: how many a group has, in all its members. gate: the module's output that is zero
    exactly where a group is gone; its ``width`` is per group.
    """

    name: str
    kind: Literal["heads", "channels"]
    groups: int
    members: tuple[Member, ...]
    gate: Member
    weights: int


@dataclass(frozen=True)
class Structure:
    """The parts of a model, with what importances are computed from.

    scaling: LoRA layer -> s. weight: layer -> its frozen weight ``[d_out, d_in]``, not to be
    written. weights: of all products of the frozen model; embeddings, which are looked up, and
    heads are none.
    """

    parts: tuple[Part, ...]
    scaling: Mapping[str, float]
    weight: Callable[[str], Tensor]
    weights: int

    def whole(self, clients: int) -> Tree:
        """Nothing is gone: part -> bool ``[K, G]``."""
        return {p.name: torch.ones(clients, p.groups, dtype=torch.bool) for p in self.parts}

    def gone(self, alive: Tree) -> Tensor:
        """The share of the prunable weights that is gone, ``[K]`` float64."""
        total = sum(p.groups * p.weights for p in self.parts)
        left = [alive[p.name].double().sum(-1) * p.weights for p in self.parts]
        return 1 - torch.stack(left).sum(0) / max(total, 1)

    @property
    def prunable(self) -> float:
        """The share of the products' weights that groups have."""
        return sum(p.groups * p.weights for p in self.parts) / self.weights


def pack(parts: Sequence[Part], alive: Tree) -> Tensor:
    """``[K, G]`` by part as bits, uint8 ``[K, bytes]``; the first group is the highest bit."""
    rows = [np.packbits(alive[p.name].cpu().numpy(), axis=1) for p in parts]
    return torch.from_numpy(np.concatenate(rows, axis=1))


def unpack(parts: Sequence[Part], bits: Tensor) -> Tree:
    """What ``pack`` was given. Bits behind a part's last group are not looked at.

    Raises ValueError where the bits are not as many as the parts need.
    """
    sizes = [-(-p.groups // 8) for p in parts]
    if bits.dim() != 2 or bits.shape[1] != sum(sizes) or bits.dtype != torch.uint8:
        raise ValueError(f"bits of groups: {bits.dtype} {tuple(bits.shape)}, not [K, {sum(sizes)}]")
    found, first = {}, 0
    for part, size in zip(parts, sizes, strict=True):
        own = bits[:, first : first + size].cpu().numpy()
        rows = np.unpackbits(own, axis=1, count=part.groups).astype(bool)
        found[part.name], first = torch.from_numpy(rows).to(bits.device), first + size
    return found


def sides(parts: Sequence[Part]) -> dict[tuple[str, str], list[tuple[Part, Member]]]:
    """(layer, side) -> the parts and members that meet it there."""
    found: dict[tuple[str, str], list[tuple[Part, Member]]] = {}
    for part in parts:
        for member in part.members:
            found.setdefault((member.layer, member.side), []).append((part, member))
    return found


def kept(members: Sequence[tuple[Part, Member]], alive: Tree, size: int) -> Tensor:
    """Which of ``size`` rows or columns are there, bool ``[K, size]``; all that no group has."""
    rows = len(alive[members[0][0].name])
    found = torch.ones(rows, size, dtype=torch.bool, device=alive[members[0][0].name].device)
    for part, member in members:
        own = alive[part.name].bool().repeat_interleave(member.width, dim=1)
        found[:, member.start : member.start + own.shape[1]] = own
    return found
