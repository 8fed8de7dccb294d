"""ComPEFT (Yadav et al., arXiv 2311.13171): the signs of the largest numbers, and one scale.

Of d numbers the floor(density * d) largest by magnitude are kept, of equal ones the first, zeros
never; each becomes its sign times alpha * sigma, sigma the sample standard deviation of all d. With
alpha = 0 it is alpha* = sum |kept| / (k * sigma), the least-squares fit: the scale is the mean of
the kept magnitudes, and sigma is not needed. Sections: ``scale``, bfloat16 (the paper has 16 bits
too; float16 would lose updates below 1e-7); where the kept numbers are; ``signs``, a bit each, 1
for positive. Where that is smaller all signs are sent instead: ``trits``, five to a byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpeft.comms import bits
from fedpeft.comms.codecs import positions
from fedpeft.comms.codecs.positions import Kept, Positions
from fedpeft.comms.codecs.symbols import Part, Raw, Sections, Shapes, Symbols, share, size_of
from fedpeft.comms.codecs.values import cast
from fedpeft.comms.settings import Codec
from fedpeft.errors import PayloadError


def encode(settings: Codec, matrix: Tensor) -> Symbols:
    """See ``fedpeft.comms.codecs.encode``."""
    size = matrix.shape[1]
    count = math.floor(share(settings.density, size))
    mask = positions.largest(matrix.abs(), count)
    kept = Kept.of(mask, count)
    own = kept.gather(matrix)
    if bool((own == 0).any()):
        kept = Kept.of(mask & (matrix != 0))
        own = kept.gather(matrix)
    scale = cast(_scale(settings, matrix, own.abs(), kept.counts, count), "bf16")
    signs = own > 0
    wide = scale.float()[:, None]
    places = Positions.of(kept, count, settings.positions)
    whole = torch.zeros_like(kept.counts, dtype=torch.bool)
    if settings.positions == "auto":
        whole = -(-size // 5) < places.total() + bits.bytes_for(kept.counts)
    return Symbols(
        (
            Raw.of("scale", scale[:, None]),
            places.without(whole),
            Signs(kept, signs, whole),
        ),
        kept.scatter(torch.where(signs, wide, -wide)),
    )


def _scale(settings: Codec, matrix: Tensor, own: Tensor, counts: Tensor, count: int) -> Tensor:
    """What a kept sign is multiplied by, float32 ``[K]``."""
    if settings.alpha == 0:
        wide = torch.nn.functional.pad(own.double(), (0, count - own.shape[1]))
        return (bits.tree_sum(wide) / counts.clamp(min=1)).float()
    wide = matrix.double()
    size = torch.full((len(wide), 1), max(1, wide.shape[1]), device=wide.device)
    apart = (wide - bits.tree_sum(wide)[:, None] / size).square_()
    variance = bits.tree_sum(apart) / (size[:, 0] - 1).clamp(min=1)
    return (variance.sqrt() * settings.alpha).float()


@dataclass(frozen=True)
class Signs(Part):
    """Signs of the kept numbers, bool ``[K, most]``; whole: who sends those of all numbers."""

    kept: Kept
    signs: Tensor
    whole: Tensor

    def lengths(self) -> dict[str, Tensor]:
        all_signs = -(-self.kept.size // 5)
        return {
            "signs": torch.where(self.whole, -1, bits.bytes_for(self.kept.counts)),
            "trits": torch.where(self.whole, all_signs, -1),
        }

    def arrays(self, k: int) -> dict[str, np.ndarray]:
        places = self.kept.places(k)
        signs = self.signs[k, : len(places)].cpu().numpy()
        if not self.whole[k]:
            return {"signs": bits.pack(signs)}
        trits = np.zeros(self.kept.size, dtype=np.int64)
        trits[places] = np.where(signs, 1, -1)
        return {"trits": bits.trits_pack(trits)}

    def rows(self, index: Tensor) -> Signs:
        return Signs(self.kept.rows(index), self.signs[index], self.whole[index])


def decode(settings: Codec, sections: Sections, shapes: Shapes) -> Tensor:
    """See ``fedpeft.comms.codecs.decode``."""
    size = size_of(shapes)
    count = math.floor(share(settings.density, size))
    scale = sections.numbers("scale", torch.bfloat16, 1)[0]
    if scale < 0:
        raise PayloadError("payload: section 'scale' is negative")
    found = torch.zeros(size)
    if sections.has("trits") and settings.positions == "auto":
        trits = bits.trits_unpack(sections.take("trits"), size, "section 'trits'")
        places = np.flatnonzero(trits)
        if len(places) > count:
            raise PayloadError(f"payload: {len(places)} numbers are kept, of {count} at most")
        signs = trits[places] > 0
    else:
        places = positions.read(sections, size, count, settings.positions, fixed=False)
        signs = bits.unpack(sections.take("signs"), len(places), "section 'signs'") > 0
    found[torch.from_numpy(places)] = torch.where(torch.from_numpy(signs), scale, -scale)
    return found
