"""PowerSGD (Vogels et al., arXiv 1905.13727) without a memory: each matrix as P Q^T of low rank.

Every client has a P and a Q of its own, so that one message is enough; its receiver rebuilds each
product before it averages. Two rounds of P = orthonormal(M Q), Q = M^T P from a seeded normal Q
find the largest directions; M of rank <= r comes back whole. A tensor of n dimensions counts as a
matrix of its first by all others. One whose factors would not be smaller is sent as it is, with the
vectors. Sections: ``left`` and ``right``, the factors one after another; ``values``, the others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fedpeft import philox
from fedpeft.codecs.settings import Codec
from fedpeft.codecs.symbols import PLACES, Part, Raw, Sections, Shapes, Symbols
from fedpeft.codecs.values import CASTS, cast

_ROUNDS = 2


class _Plan(NamedTuple):
    """A tensor as a matrix ``[high, wide]`` of rank ``rank``; rank 0: as it is."""

    high: int
    wide: int
    rank: int


def _plans(settings: Codec, shapes: Shapes) -> list[_Plan]:
    found = []
    for shape in shapes:
        size = math.prod(shape)
        high = shape[0] if len(shape) > 1 else size
        wide = size // high if high else 0
        pays = settings.rank * (high + wide) < size
        found.append(_Plan(high, wide, settings.rank if pays else 0))
    return found


def encode(settings: Codec, matrix: Tensor, shapes: Shapes, seeds: Tensor) -> Symbols:
    """See ``fedpeft.codecs.encode``."""
    plans, empty = _plans(settings, shapes), matrix[:, :0]
    tensors = matrix.split([plan.high * plan.wide for plan in plans], dim=1)
    rights = [plan.wide * plan.rank for plan in plans]
    starts = philox.normals(seeds, PLACES, sum(rights)).split(rights, dim=1)
    left, right, rest, found = ([empty] * len(plans) for _ in range(4))
    for plan in dict.fromkeys(plans):
        places = [place for place, other in enumerate(plans) if other == plan]
        own = torch.stack([tensors[place] for place in places], dim=1)
        if plan.rank:
            start = torch.stack([starts[place] for place in places], dim=1)
            first, second = _factors(own.unflatten(2, plan[:2]), start.unflatten(2, plan[1:]))
            first, second = (cast(t, settings.values).float() for t in (first, second))
            whole = _product(first, second).flatten(2)
        else:
            first = second = own[:, :, :0]
            whole = cast(own, settings.values).float()
        for at, place in enumerate(places):
            left[place], right[place] = first[:, at].flatten(1), second[:, at].flatten(1)
            found[place] = whole[:, at]
            rest[place] = empty if plan.rank else found[place]
    parts = {"left": left, "right": right, "values": rest}
    return Symbols(
        tuple(_part(settings, name, [empty, *own]) for name, own in parts.items()),
        torch.cat([empty, *found], dim=1),
    )


def _part(settings: Codec, name: str, tensors: list[Tensor]) -> Part:
    return Raw.of(name, cast(torch.cat(tensors, dim=1), settings.values))


def _factors(matrices: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """P ``[..., m, r]`` with orthonormal columns, and Q ``[..., n, r]``, of ``[..., m, n]``.

    In float64, cast once: how products are summed depends on how many matrices there are, and a
    client alone must send the same bits as in a cohort.
    """
    largest = matrices.abs().amax(dim=(-2, -1), keepdim=True).double()
    scaled = matrices / torch.where(largest > 0, largest, 1)  # nothing squared overflows
    second = start.double()
    for _ in range(_ROUNDS):
        first = torch.linalg.qr(scaled @ second).Q
        second = scaled.mT @ first
    return first.to(matrices), (second * largest).to(matrices)


def _product(first: Tensor, second: Tensor) -> Tensor:
    """P Q^T, ``[..., m, n]``, column by column, so that it is the same bits everywhere."""
    found = first[..., :, None, 0] * second[..., None, :, 0]
    for column in range(1, first.shape[-1]):
        found += first[..., :, None, column] * second[..., None, :, column]
    return found


def decode(settings: Codec, sections: Sections, shapes: Shapes) -> Tensor:
    """See ``fedpeft.codecs.decode``."""
    plans, dtype = _plans(settings, shapes), CASTS[settings.values]
    lefts = [plan.high * plan.rank for plan in plans]
    rights = [plan.wide * plan.rank for plan in plans]
    others = [0 if plan.rank else plan.high * plan.wide for plan in plans]
    left = sections.numbers("left", dtype, sum(lefts)).split(lefts)
    right = sections.numbers("right", dtype, sum(rights)).split(rights)
    rest = sections.numbers("values", dtype, sum(others)).split(others)
    found = [torch.empty(0)]
    for place, plan in enumerate(plans):
        if not plan.rank:
            found.append(rest[place])
            continue
        first = left[place].view(plan.high, plan.rank)
        second = right[place].view(plan.wide, plan.rank)
        found.append(_product(first, second).flatten())
    return torch.cat(found)
