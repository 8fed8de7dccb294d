"""Codecs: a cohort's numbers ``[K, d]`` as sections of bytes, and one client's sections as numbers.

``encode`` works on a whole cohort at once, on the device where it is; what a client's payload would
hold, and what it costs to the byte, is known without writing it. ``decode`` reads one client's
sections and trusts nothing. The two meet bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from fedpeft.codecs import compeft, dense, powersgd, sparse
from fedpeft.codecs.settings import Codec
from fedpeft.codecs.symbols import Sections, Shapes, Symbols, check_rows, encodable
from fedpeft.errors import PayloadError

__all__ = ["Symbols", "decode", "encodable", "encode"]


def encode(settings: Codec, matrix: Tensor, shapes: Shapes, seeds: Tensor) -> Symbols:
    """What a cohort sends, on the matrix's device.

    matrix: float32 ``[K, d]``, the tensors of ``shapes`` side by side. seeds: int64 ``[K]``, one
    for each client and round: all that is random comes from them. A row depends on no other row.
    Raises PayloadError, which names the rows, for numbers that ``encodable`` refuses, and
    ValueError for ``codec=none``, which has no payload, and for shapes that are not the matrix's.
    """
    check_rows(matrix, shapes, seeds)
    seeds = seeds.to(matrix.device)
    match settings.codec:
        case "dense":
            return dense.encode(settings, matrix, seeds)
        case "compeft":
            return compeft.encode(settings, matrix)
        case "powersgd":
            return powersgd.encode(settings, matrix, shapes, seeds)
        case "topk" | "randk" | "dare":
            return sparse.encode(settings, matrix, shapes, seeds)
        case _:
            raise ValueError("codec=none sends tensors as they are: there is nothing to encode")


def decode(settings: Codec, arrays: Mapping[str, np.ndarray], shapes: Shapes) -> Tensor:
    """One client's numbers, float32 ``[d]`` on the CPU, from the sections of its payload.

    Raises PayloadError for sections that ``encode`` cannot have written with these settings, and
    ValueError for ``codec=none``.
    """
    sections = Sections(arrays)
    match settings.codec:
        case "dense":
            found = dense.decode(settings, sections, shapes)
        case "compeft":
            found = compeft.decode(settings, sections, shapes)
        case "powersgd":
            found = powersgd.decode(settings, sections, shapes)
        case "topk" | "randk" | "dare":
            found = sparse.decode(settings, sections, shapes)
        case _:
            raise ValueError("codec=none sends tensors as they are: there is nothing to decode")
    sections.end()
    if not bool(found.isfinite().all()):
        raise PayloadError("payload: its numbers are too large: what they make is NaN or Inf")
    return found
