"""Numbers from a seed, the same bits on every device: Philox4x32-10 and what is made of its words.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A *stream* of
32-bit words belongs to (seed, stream): word i is word ``i % 4`` of the block of counter ``i // 4``,
under the key (low, high half of the seed) and the counter (low, high half of ``i // 4``, low, high
half of the stream). Any part of a stream can be had by itself, in any order.

Uniform numbers are the upper 24 bits of a word, which float32 holds exactly. Normal numbers are
looked up: 16 bits choose one of 65536 values, the quantiles of N(0, 1) at the midpoints, scaled to
variance one (the largest is 4.33). No logarithm or cosine is taken, whose last bits differ
from device to device. These numbers are public once the seed is: for shared masks, rounding and
search directions; noise for differential privacy never comes from here.
"""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from fedpeft.errors import FedpeftError

_LOW = 0xFFFFFFFF
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_BUMPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

_AT_ONCE = {"cpu": 1 << 15, "cuda": 1 << 21}
"""Blocks that are computed at once: on a CPU so many that all stays in its cache."""

LEVELS = 1 << 16
"""Values that a normal number can have."""

_TABLE_DIGEST = "8babbcaf96568f10"


def words(seeds: Tensor, stream: int, count: int, first: int = 0) -> Tensor:
    """Words ``first`` to ``first + count`` of each seed's stream: int64 ``[K, count]`` below 2^32.

    seeds: int64 ``[K]``, taken modulo 2^64; the result is on their device. stream: 0 to 2^63 - 1.
    """
    begin, end = first // 4, (first + count + 3) // 4
    most = _AT_ONCE["cuda" if seeds.is_cuda else "cpu"]
    width = max(1, most // max(1, len(seeds)))
    parts = [_blocks(seeds, stream, at, min(at + width, end)) for at in range(begin, end, width)]
    found = torch.cat(parts, dim=1) if parts else seeds.new_empty(len(seeds), 0)
    return found[:, first - 4 * begin : first - 4 * begin + count]


def _blocks(seeds: Tensor, stream: int, begin: int, end: int) -> Tensor:
    """All words of the blocks ``begin`` to ``end``, ``[K, 4 (end - begin)]``."""
    numbers = torch.arange(begin, end, device=seeds.device).expand(len(seeds), -1)
    low, high = seeds[:, None] & _LOW, (seeds[:, None] >> 32) & _LOW
    a, b = numbers & _LOW, numbers >> 32
    c, d = torch.full_like(a, stream & _LOW), torch.full_like(a, stream >> 32)
    for _ in range(_ROUNDS):
        left, right = a * _FACTORS[0], c * _FACTORS[1]  # modulo 2^64
        a = (right >> 32).bitwise_and_(_LOW).bitwise_xor_(b).bitwise_xor_(low)
        c = (left >> 32).bitwise_and_(_LOW).bitwise_xor_(d).bitwise_xor_(high)
        b, d = right.bitwise_and_(_LOW), left.bitwise_and_(_LOW)
        low, high = (low + _BUMPS[0]) & _LOW, (high + _BUMPS[1]) & _LOW
    return torch.stack([a, b, c, d], dim=-1).flatten(1)


def uniforms(seeds: Tensor, stream: int, count: int, first: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-24: float32 ``[K, count]``; see ``words``."""
    return (words(seeds, stream, count, first) >> 8).float() * 2.0**-24


def normals(seeds: Tensor, stream: int, count: int, first: int = 0) -> Tensor:
    """Normal numbers, float32 ``[K, count]``: number i from half ``i % 2`` of word ``i // 2``.

    The lower half comes first. See ``words``.
    """
    skip = first % 2
    own = words(seeds, stream, (first + count + 1) // 2 - first // 2, first // 2)
    halves = torch.stack([own & (LEVELS - 1), own >> 16], dim=-1).flatten(1)
    return _table_on(seeds.device)[halves[:, skip : skip + count]]


def chosen(seeds: Tensor, stream: int, size: int, count: int) -> Tensor:
    """``count`` of the places 0 to ``size - 1``, ascending, every choice equally likely.

    Int64 ``[K, count]``: the places of the smallest words of the stream; of equal ones, the first.
    """
    order = (words(seeds, stream, size) << 31 | torch.arange(size, device=seeds.device)).sort(dim=1)
    return (order.values[:, :count] & (2**31 - 1)).sort(dim=1).values


@cache
def table() -> np.ndarray:
    """The values of normal numbers, float32 ``[65536]``, ascending; not to be written.

    Raises FedpeftError where this machine's arithmetic gives others than the specified ones.
    """
    quantiles = ndtri((np.arange(LEVELS // 2) + 0.5) / LEVELS)
    lower = (quantiles / np.sqrt(np.mean(quantiles**2))).astype(np.float32)
    found = np.concatenate([lower, -lower[::-1]])
    found.setflags(write=False)
    digest = hashlib.sha256(found.astype("<f4").tobytes()).hexdigest()[:16]
    if digest != _TABLE_DIGEST:
        raise FedpeftError(
            f"the table of normal numbers has digest {digest}, not {_TABLE_DIGEST}: SciPy computes "
            f"other quantiles here, and seeds would not mean the same. Use another SciPy."
        )
    return found


@cache
def _table_on(device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(table())).to(device)
