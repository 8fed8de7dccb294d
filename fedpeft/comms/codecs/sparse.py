"""Some numbers: the largest (top-k), or random ones that the seed names (random-k, DARE)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fedpeft.comms.codecs import positions, values
from fedpeft.comms.codecs.positions import Kept, Positions
from fedpeft.comms.codecs.symbols import (
    PLACES,
    Part,
    Raw,
    Sections,
    Shapes,
    Symbols,
    share,
    size_of,
    words,
)
from fedpeft.comms.settings import CAST, Codec, feeds_back
from fedpeft.errors import PayloadError


def count_of(settings: Codec, shapes: Shapes) -> int:
    """How many numbers ``topk`` and ``randk`` keep: ceil(density * d), or the sum of tensors'."""
    if settings.codec == "topk" and settings.scope == "tensor":
        return sum(math.ceil(share(settings.density, math.prod(shape))) for shape in shapes)
    return math.ceil(share(settings.density, size_of(shapes)))


def encode(settings: Codec, matrix: Tensor, shapes: Shapes, seeds: Tensor) -> Symbols:
    """See ``fedpeft.comms.codecs.encode``."""
    if settings.codec == "topk":
        return _encode_topk(settings, matrix, shapes, seeds)
    kept = _drawn(settings, seeds, matrix.shape[1])
    own = kept.gather(matrix)
    restored, parts = values.write(settings, own, seeds, None if kept.even else kept.counts)
    return Symbols(
        (Raw.of("seed", seeds[:, None]), *parts),
        kept.scatter(restored * _factor(settings, matrix.shape[1])),
    )


def _drawn(settings: Codec, seeds: Tensor, size: int) -> Kept:
    """The places that the seeds name."""
    drawn = words(seeds, PLACES, size)
    if settings.codec == "dare":
        most = math.ceil(share(settings.density, 1 << 24)) << 8
        return Kept.of(torch.cat([part < most for part in drawn], dim=1))
    count = math.ceil(share(settings.density, size))
    smallest = torch.cat([(2**31 - 1 - part).to(torch.int32) for part in drawn], dim=1)
    return Kept.of(positions.largest(smallest, count), count)


def _factor(settings: Codec, size: int) -> float:
    """What the kept numbers are multiplied by."""
    if settings.codec == "dare":
        return 1 / (settings.rescale or settings.density)
    if settings.codec == "randk" and not feeds_back(settings) and size:
        return size / math.ceil(share(settings.density, size))
    return 1.0


def _encode_topk(settings: Codec, matrix: Tensor, shapes: Shapes, seeds: Tensor) -> Symbols:
    count = count_of(settings, shapes)
    kept = Kept.of(_chosen(settings, matrix.abs(), shapes), count)
    places = Positions.of(kept, count, settings.positions)
    if settings.positions != "auto" or settings.values not in CAST:
        restored, parts = values.write(settings, kept.gather(matrix), seeds)
        return Symbols((places, *parts), kept.scatter(restored))
    each = values.CASTS[settings.values].itemsize
    whole = each * kept.size < each * count + places.total()
    counts = torch.where(whole, -1, kept.counts)
    restored, parts = values.write(settings, kept.gather(matrix), seeds, counts)
    found = kept.scatter(restored)
    more: tuple[Part, ...] = ()
    if bool(whole.any()):
        sent = torch.where(whole, kept.size, -1)
        more = (Raw.of("dense", values.cast(found, settings.values), sent),)
    return Symbols((places.without(whole), *parts, *more), found)


def _chosen(settings: Codec, magnitudes: Tensor, shapes: Shapes) -> Tensor:
    """The numbers that top-k keeps, bool ``[K, d]``."""
    if settings.scope == "all":
        count = math.ceil(share(settings.density, magnitudes.shape[1]))
        return positions.largest(magnitudes, count)
    found, sizes = [], [math.prod(shape) for shape in shapes]
    for own in magnitudes.split(sizes, dim=1):
        count = math.ceil(share(settings.density, own.shape[1]))
        found.append(positions.largest(own, count))
    return torch.cat(found, dim=1) if found else magnitudes.bool()


def decode(settings: Codec, sections: Sections, shapes: Shapes) -> Tensor:
    """See ``fedpeft.comms.codecs.decode``."""
    size = size_of(shapes)
    if settings.codec != "topk":
        seed = sections.take("seed", 8).view("<i8")[0]
        kept = _drawn(settings, torch.tensor([int(seed)]), size)
        own = values.read(settings, sections, int(kept.counts[0]))
        return kept.scatter(own[None] * _factor(settings, size))[0]
    count = count_of(settings, shapes)
    if sections.has("dense") and settings.positions == "auto" and settings.values in CAST:
        found = sections.numbers("dense", values.CASTS[settings.values], size)
        _check_places(settings, np.flatnonzero(found.numpy()), shapes, exact=False)
        return found
    places = positions.read(sections, size, count, settings.positions, fixed=True)
    _check_places(settings, places, shapes, exact=True)
    found = torch.zeros(size)
    found[torch.from_numpy(places)] = values.read(settings, sections, count)
    return found


def _check_places(settings: Codec, places: np.ndarray, shapes: Shapes, exact: bool) -> None:
    """Whether as many numbers are kept, of each tensor with ``scope=tensor``, as top-k keeps."""
    parts = shapes if settings.scope == "tensor" else ((size_of(shapes),),)
    sizes = [math.prod(shape) for shape in parts]
    ends = np.searchsorted(places, np.cumsum(sizes))
    most = np.array([math.ceil(share(settings.density, size)) for size in sizes])
    found = np.diff(ends, prepend=0)
    if bool((found != most).any() if exact else (found > most).any()):
        raise PayloadError("payload: other numbers of kept values than the density says")
