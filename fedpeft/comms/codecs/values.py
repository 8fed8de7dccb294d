"""How numbers are written: casts, and steps of a scale per block with random rounding.

A block of ``int8`` and ``int4`` has steps of its largest magnitude over 127 and 7, of ``qsgd``
(Alistarh et al., arXiv 1610.02132) of its norm over ``levels``. A number u becomes
floor(u / step + U), U uniform in (0, 1): u in expectation, off by less than a step, with a
variance of at most step^2 / 4. Sections: ``scale``, a float32 step per block; ``values``, the
codes; or, of ``qsgd`` and where that is smaller, ``gamma``: how many codes are not zero, uint32,
then Elias-gamma codes of the gaps between them plus one and of their magnitudes, then their signs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft.comms import bits
from fedpeft.comms.codecs.symbols import ROUNDING, Part, Raw, Sections, count_true, words
from fedpeft.comms.settings import Codec
from fedpeft.errors import PayloadError

CASTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def cast(values: Tensor, kind: str) -> Tensor:
    """The nearest numbers of another float type; beyond its range its largest one."""
    dtype = CASTS[kind]
    if dtype == torch.float16:
        most = torch.finfo(dtype).max
        values = values.clamp(-most, most)
    return values.to(dtype)


def most_code(settings: Codec) -> int:
    """The largest magnitude of a code."""
    return {"int8": 127, "int4": 7}.get(settings.values, settings.levels)


def write(
    settings: Codec, values: Tensor, seeds: Tensor, counts: Tensor | None = None
) -> tuple[Tensor, tuple[Part, ...]]:
    """Values ``[K, n]`` as they are restored, float32 ``[K, n]``, and what is sent for them.

    counts: of a row's values only the first so many are its own, the others are zero; of a cast, -1
    says that a row's values are not sent. Without counts, all are.
    """
    if settings.values in CASTS:
        found = cast(values, settings.values)
        return found.float(), (Raw.of("values", found, counts),)
    codes, steps = quantise(settings, values, seeds)
    blocks = None if counts is None else -(-counts // settings.block)
    scale = Raw.of("scale", steps, blocks)
    restored = _spread(codes.float(), steps, settings.block)
    match settings.values:
        case "int8":
            return restored, (scale, Raw.of("values", codes, counts))
        case "int4":
            halves = None if counts is None else (counts + 1) // 2
            return restored, (scale, Raw.of("values", bits.nibbles_pack(codes), halves))
        case _:
            own = _whole(codes) if counts is None else counts
            return restored, (scale, Levels.of(codes, own, settings.levels))


def _whole(values: Tensor) -> Tensor:
    return torch.full((len(values),), values.shape[1], device=values.device)


def quantise(settings: Codec, values: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8 ``[K, n]``, and the blocks' steps, float32 ``[K, ceil(n / block)]``."""
    most = most_code(settings)
    wide = _blocks(values, settings.block)
    largest = wide.abs().amax(dim=2)
    if settings.values == "qsgd":
        safe = torch.where(largest > 0, largest, 1)
        largest = largest * bits.tree_sum((wide / safe[..., None]).square_()).sqrt()
    steps = largest * (1 / most)
    relative = wide / torch.where(steps > 0, steps, 1)[..., None]
    relative += _rounding(seeds, wide.shape[1] * settings.block).view(wide.shape)
    codes = relative.floor_().clamp_(-most, most).to(torch.int8)
    return codes.flatten(1)[:, : values.shape[1]].contiguous(), steps


def _rounding(seeds: Tensor, count: int) -> Tensor:
    """Uniform in (0, 1), float32 ``[K, count]``: middles of 2^16 cells, two to a word."""
    drawn = words(seeds, ROUNDING, (count + 1) // 2)
    halves = [torch.stack([part & 0xFFFF, part >> 16], dim=-1).flatten(1) for part in drawn]
    found = torch.cat([part.float() for part in halves], dim=1)[:, :count]
    return found.add_(0.5).mul_(2.0**-16)


def _spread(codes: Tensor, steps: Tensor, block: int) -> Tensor:
    """Every code times the step of its block, ``[..., n]``."""
    return (_blocks(codes, block) * steps[..., None]).flatten(-2)[..., : codes.shape[-1]]


def _blocks(values: Tensor, block: int) -> Tensor:
    """``[..., n]`` as ``[..., ceil(n / block), block]``, zeros at the end."""
    size = values.shape[-1]
    found: Tensor = F.pad(values, (0, -size % block)).unflatten(-1, (-(-size // block), block))
    return found


def read(settings: Codec, sections: Sections, count: int) -> Tensor:
    """One client's ``count`` values, float32, as ``write`` restored them."""
    if settings.values in CASTS:
        return sections.numbers("values", CASTS[settings.values], count)
    steps = sections.numbers("scale", torch.float32, -(-count // settings.block))
    if bool((steps < 0).any()):
        raise PayloadError("payload: section 'scale' has a negative step")
    match settings.values:
        case "int8":
            codes = sections.take("values", count).view(np.int8).astype(np.int64)
        case "int4":
            codes = bits.nibbles_unpack(sections.take("values"), count, "section 'values'")
        case _:
            codes = _read_levels(sections, count, settings.levels)
    if len(codes) and int(np.abs(codes).max()) > most_code(settings):
        raise PayloadError(f"payload: a code is beyond {most_code(settings)}")
    return _spread(torch.from_numpy(codes).float(), steps, settings.block)


def _width(levels: int) -> int:
    """Bits of a code between -levels and levels."""
    return (2 * levels).bit_length()


@dataclass(frozen=True)
class Levels(Part):
    """Codes of ``qsgd``, int8 ``[K, n]``, in whichever form is smaller for each client.

    fixed, gamma: bytes of the two sections, -1 where the client has the other, or neither.
    """

    codes: Tensor
    counts: Tensor
    levels: int
    fixed: Tensor
    gamma: Tensor

    @staticmethod
    def of(codes: Tensor, counts: Tensor, levels: int) -> Levels:
        """Chooses by the exact sizes; counts are as in ``write``."""
        fixed = bits.bytes_for(counts * _width(levels))
        gamma = 4 + bits.bytes_for(_gamma_bits(codes))
        better = gamma < fixed
        return Levels(
            codes,
            counts,
            levels,
            torch.where(better | (counts < 0), -1, fixed),
            torch.where(better, gamma, -1),
        )

    def lengths(self) -> dict[str, Tensor]:
        return {"values": self.fixed, "gamma": self.gamma}

    def arrays(self, k: int) -> dict[str, np.ndarray]:
        if self.fixed[k] < 0 and self.gamma[k] < 0:
            return {}
        codes = self.codes[k, : int(self.counts[k])].cpu().numpy().astype(np.int64)
        if self.gamma[k] < 0:
            return {"values": bits.pack_wide(codes + self.levels, _width(self.levels))}
        places = np.flatnonzero(codes)
        kept = codes[places]
        numbers = np.concatenate([np.diff(places, prepend=-1), np.abs(kept)])
        head = np.array([len(kept)], dtype="<u4").view(np.uint8)
        return {"gamma": np.concatenate([head, bits.gamma_pack(numbers, kept < 0)])}

    def rows(self, index: Tensor) -> Levels:
        return Levels(
            self.codes[index],
            self.counts[index],
            self.levels,
            self.fixed[index],
            self.gamma[index],
        )


def _gamma_bits(codes: Tensor) -> Tensor:
    """Bits of the codes that are not zero: gap plus one, magnitude, sign; int64 ``[K]``.

    floor(log2 m) is the number of powers 2, 4, .. up to m; so the one of a gap plus one counts the
    runs of 1, 3, 7, .. zeros that end just before the code.
    """
    kept, magnitudes = codes != 0, codes.abs()
    found = 3 * count_true(kept)
    for power in range(1, 7):
        found += 2 * count_true(magnitudes >= 1 << power)
    zero = _shifted(~kept, 1)
    run, length = zero, 1
    while bool(run.any()):
        found += 2 * count_true(run & kept)
        run = run & _shifted(run, length) & _shifted(zero, 2 * length)
        length = 2 * length + 1
    return found


def _shifted(flags: Tensor, by: int) -> Tensor:
    """``[K, n]`` moved to the right, false at the left."""
    return F.pad(flags[:, : max(0, flags.shape[1] - by)], (min(by, flags.shape[1]), 0))


def _read_levels(sections: Sections, count: int, levels: int) -> np.ndarray:
    if not sections.has("gamma"):
        data = sections.take("values")
        return bits.unpack_wide(data, count, _width(levels), "section 'values'") - levels
    data = sections.take("gamma")
    kept = int(data[:4].view("<u4")[0]) if len(data) >= 4 else count + 1
    if kept > count:
        raise PayloadError(f"payload: section 'gamma' has more than {count} codes, or no count")
    numbers, signs = bits.gamma_unpack(data[4:], 2 * kept, kept, "section 'gamma'")
    places = bits.places(numbers[:kept] - 1, count, "section 'gamma'")
    found = np.zeros(count, dtype=np.int64)
    found[places] = np.where(signs, -numbers[kept:], numbers[kept:])
    return found
