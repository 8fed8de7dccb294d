"""All numbers: a cast, or blockwise quantisation (QSGD among it)."""

from __future__ import annotations

from torch import Tensor

from fedpeft.comms.codecs import values
from fedpeft.comms.codecs.symbols import Sections, Shapes, Symbols, size_of
from fedpeft.comms.settings import Codec


def encode(settings: Codec, matrix: Tensor, seeds: Tensor) -> Symbols:
    """See ``fedpeft.comms.codecs.encode``."""
    restored, parts = values.write(settings, matrix, seeds)
    return Symbols(parts, restored)


def decode(settings: Codec, sections: Sections, shapes: Shapes) -> Tensor:
    """See ``fedpeft.comms.codecs.decode``."""
    return values.read(settings, sections, size_of(shapes))
