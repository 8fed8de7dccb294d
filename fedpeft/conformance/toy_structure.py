"""What can be pruned from the toy: the rows of a block's layers together, or a layer's columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from fedpeft.pruning.structure import Member, Part, Structure, kept, sides
from fedpeft.tree import Tree


def make(initial: Tree, scaling: Mapping[str, float], weight: Callable[[str], Tensor]) -> Structure:
    """Rows that layers of one block and size share are one part, each a group; c_attn's columns.

    All are heads, of which one has to stay: of channels it would be more than the toy has.
    """
    blocks: dict[str, list[Member]] = {}
    for layer in scaling:
        side = "columns" if layer.endswith("c_attn") else "rows"
        blocks.setdefault(layer.rpartition(".")[0], []).append(
            Member(layer, "columns" if side == "columns" else "rows", 1)
        )
    parts = []
    for name, members in blocks.items():
        first = weight(members[0].layer)
        rows = members[0].side == "rows"
        each = len(members) * first.shape[1 if rows else 0]
        groups = int(first.shape[0 if rows else 1])
        parts.append(Part(name, "heads", groups, tuple(members), members[0], int(each)))
    total = sum(weight(layer).numel() for layer in scaling)
    return Structure(tuple(parts), scaling, weight, total)


@contextmanager
def pruned(
    there: dict[str, Tree], clients: Sequence[str], structure: Structure, alive: Tree
) -> Iterator[None]:
    """Inside the block ``there`` has, by client and layer, 1 where the layer's update acts, else 0.

    alive: part -> bool ``[K, G]``.
    """
    for (layer, side), members in sides(structure.parts).items():
        weight = structure.weight(layer)
        size = weight.shape[0 if side == "rows" else 1]
        for client, own in zip(clients, kept(members, alive, size).to(weight.dtype), strict=True):
            whole = own[:, None] if side == "rows" else own[None]
            there.setdefault(client, {})[layer] = whole.expand(weight.shape)
    try:
        yield
    finally:
        there.clear()
