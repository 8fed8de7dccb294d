"""Directions in the space of a tree's tensors, from seeds: public, and the same bits everywhere.

The direction of a seed is z ~ N(0, I): the numbers of the i-th tensor, by sorted names, are
``philox.normals`` of stream i, in row-major order. So a tensor's do not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedpeft.philox import normals
from fedpeft.tree import Tree

AT_ONCE = 1 << 20
"""Numbers of directions that are made at once; memory is a few times as much, of any model."""


def shift(tensors: Sequence[Tensor], seed: Tensor, amount: float) -> None:
    """Adds ``amount`` times the direction of ``seed`` (int64 ``[1]``) in place.

    tensors: contiguous, on the seed's device, in the order of their names.
    """
    for stream, tensor in enumerate(tensors):
        flat = tensor.view(-1)
        for first in range(0, len(flat), AT_ONCE):
            part = flat[first : first + AT_ONCE]
            part.add_(normals(seed, stream, len(part), first)[0], alpha=amount)


def displaced(start: Tree, seeds: Tensor, amounts: Tensor) -> Tree:
    """``start + sum_j amounts_j z(seeds_j)`` as a new tree.

    seeds: int64 ``[J]``; amounts: ``[J]``, of which zeros cost nothing. Both on the tree's device.
    """
    used = amounts.nonzero().flatten()
    like = torch.contiguous_format
    found = {name: start[name].clone(memory_format=like) for name in sorted(start)}
    for stream, tensor in enumerate(found.values()):
        flat, size = tensor.view(-1), min(AT_ONCE, tensor.numel())
        for some in used.split(max(1, AT_ONCE // max(1, size))):
            factors = amounts[some].to(flat)
            for first in range(0, len(flat), AT_ONCE):
                part = flat[first : first + AT_ONCE]
                part += factors @ normals(seeds[some], stream, len(part), first).to(flat)
    return found


def directions(seeds: Tensor, sizes: Sequence[int]) -> Tensor:
    """The directions of K seeds in tensors of these sizes, one behind another: ``[K, sum]``."""
    return torch.cat([normals(seeds, i, size) for i, size in enumerate(sizes)], dim=1)
