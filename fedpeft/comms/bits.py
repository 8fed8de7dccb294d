"""Numbers as bits: what one client's sections hold, and how long they are.

Packing and unpacking is numpy on one client's numbers, without a loop over them; every ``unpack``
takes only what ``pack`` writes, and raises PayloadError else. The functions that count bits are
torch on a whole cohort. Bits fill bytes from the lowest; what is left of the last byte is zero.

Codes of variable length are written in two parts, first everybody's unary prefix, then everybody's
remainder: as long as one code after another, and a reader finds the prefixes' ends all at once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedpeft.errors import PayloadError

_GOLDEN = (5**0.5 - 1) / 2
_MOST_BITS = 40
"""Of a remainder; more than any position or level has."""
_PLACES = 3 ** np.arange(5, dtype=np.int64)


def tree_sum(numbers: Tensor) -> Tensor:
    """Sums over the last dimension by halves: the same bits for any number of rows, anywhere."""
    size = numbers.shape[-1]
    if size == 0:
        return numbers.new_zeros(numbers.shape[:-1])
    half = (size + 1) // 2
    found = numbers[..., :half].clone()
    found[..., : size - half] += numbers[..., half:]
    while half > 1:
        size, half = half, (half + 1) // 2
        found[..., : size - half] += found[..., half:size]
    return found[..., 0]


def bytes_for(bits: Tensor) -> Tensor:
    """Whole bytes that hold so many bits."""
    return (bits + 7) // 8


def pack(flags: np.ndarray) -> np.ndarray:
    """Bits as bytes: uint8 ``[ceil(n / 8)]`` of ``[n]``."""
    return np.packbits(flags, bitorder="little")


def unpack(data: np.ndarray, count: int, what: str) -> np.ndarray:
    """``count`` bits, uint8 0 or 1 ``[count]``, of exactly as many bytes as they take."""
    if len(data) != (count + 7) // 8:
        raise PayloadError(f"payload: {what} has {len(data)} bytes, not {(count + 7) // 8}")
    flags = np.unpackbits(data, bitorder="little")
    if flags[count:].any():
        raise PayloadError(f"payload: {what} has bits after its end")
    return flags[:count]


def pack_wide(numbers: np.ndarray, width: int) -> np.ndarray:
    """Numbers below 2^width, ``width`` bits each, the lowest first."""
    return pack((numbers[:, None] >> np.arange(width)) & 1)


def unpack_wide(data: np.ndarray, count: int, width: int, what: str) -> np.ndarray:
    """Int64 ``[count]``; see ``pack_wide``."""
    flags = unpack(data, count * width, what).reshape(count, width)
    found: np.ndarray = flags @ (1 << np.arange(width, dtype=np.int64))
    return found


def places(gaps: np.ndarray, size: int, what: str) -> np.ndarray:
    """The places that have so many others before them, since the last; all below ``size``."""
    if bool((gaps >= size).any()):  # first, so that no sum overflows
        raise PayloadError(f"payload: {what} has a place beyond {size}")
    found = np.cumsum(gaps + 1) - 1
    if len(found) and int(found[-1]) >= size:
        raise PayloadError(f"payload: {what} has a place beyond {size}")
    return found


def rice_parameter(count: int, size: int) -> int:
    """b of the Golomb-Rice code that fits gaps between ``count`` places out of ``size``.

    1 + floor(log2(ln(phi - 1) / ln(1 - p))), p = count / size, at least 0 (Sattler et al., "Robust
    and communication-efficient federated learning from non-iid data", 2019): the least b for which
    (1 - p)^(2^b) < phi - 1, by squaring, so that no two machines' logarithms can disagree.
    """
    left, found = 1 - count / size if count else 0.0, 0
    while left >= _GOLDEN:
        left, found = left * left, found + 1
    return found


def rice_bits(gaps: Tensor, counts: Tensor, parameter: int) -> Tensor:
    """Bits of gaps ``[K, n]`` (0 beyond a row's count): sum of g // 2^b + 1 + b, int64 ``[K]``."""
    return (gaps >> parameter).sum(dim=1) + counts * (1 + parameter)


def rice_pack(gaps: np.ndarray, parameter: int) -> np.ndarray:
    """Gaps, int64 ``[n]``, as Golomb-Rice codes: g // 2^b zeros, a one; then b low bits each."""
    ends = np.cumsum((gaps >> parameter) + 1)
    total = int(ends[-1]) if len(ends) else 0
    flags = np.zeros(total + len(gaps) * parameter, dtype=np.uint8)
    flags[ends - 1] = 1
    flags[total:] = ((gaps[:, None] >> np.arange(parameter)) & 1).ravel()
    return pack(flags)


def rice_unpack(data: np.ndarray, count: int, parameter: int, what: str) -> np.ndarray:
    """``count`` gaps, int64; see ``rice_pack``."""
    runs, end = _prefixes(data, count, what)
    flags = unpack(data, end + count * parameter, what)[end:].reshape(count, parameter)
    found: np.ndarray = (runs << parameter) + flags @ (1 << np.arange(parameter, dtype=np.int64))
    return found


def _prefixes(data: np.ndarray, count: int, what: str) -> tuple[np.ndarray, int]:
    """The zeros before each of the first ``count`` ones, and the place behind the last."""
    ones = np.flatnonzero(np.unpackbits(data, bitorder="little"))[:count]
    if len(ones) < count:
        raise PayloadError(f"payload: {what} ends too early: {len(ones)} of {count} codes")
    return np.diff(ones, prepend=-1) - 1, int(ones[-1]) + 1 if count else 0


def exponents(numbers: Tensor) -> Tensor:
    """floor(log2(n)) of whole numbers 1 <= n < 2^53, int64."""
    return torch.frexp(numbers.double()).exponent.long() - 1


def gamma_pack(numbers: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """Numbers n >= 1 as Elias-gamma codes, 2 floor(log2 n) + 1 bits each, then ``flags``."""
    widths = np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - 1
    ends = np.cumsum(widths + 1)
    unary = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    unary[ends - 1] = 1
    owner, place = _remainders(widths)
    return pack(np.concatenate([unary, (numbers[owner] >> place) & 1, flags]).astype(np.uint8))


def gamma_unpack(
    data: np.ndarray, count: int, flags: int, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """``count`` numbers, int64, and so many flags, uint8; see ``gamma_pack``."""
    widths, end = _prefixes(data, count, what)
    if len(widths) and int(widths.max()) > _MOST_BITS:
        raise PayloadError(f"payload: {what} has a number of more than {_MOST_BITS} bits")
    rest = int(widths.sum())
    found = unpack(data, end + rest + flags, what)[end:]
    owner, place = _remainders(widths)
    low = np.bincount(owner, found[:rest] * 2.0**place, minlength=count)
    return (1 << widths) + low.astype(np.int64), found[rest:]


def _remainders(widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For remainders of ``widths`` bits, one after another: every bit's owner and place in it."""
    owner = np.repeat(np.arange(len(widths)), widths)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(widths) - widths, widths)


def varint_bytes(numbers: Tensor, counts: Tensor) -> Tensor:
    """Bytes as LEB128 of ``[K, n]`` below 2^35 (0 beyond a row's count), int64 ``[K]``."""
    found = counts
    for shift in (7, 14, 21, 28):
        found = found + (numbers >= 1 << shift).sum(dim=1)
    return found


def varint_pack(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers below 2^35, int64 ``[n]``, as LEB128: 7 bits a byte, the lowest first."""
    shifts = np.arange(0, 35, 7)
    groups = numbers[:, None] >> shifts
    used = groups > 0
    used[:, 0] = True
    more = np.zeros_like(used)
    more[:, :-1] = used[:, 1:]
    return ((groups & 127) | (more * 128))[used].astype(np.uint8)


def varint_unpack(data: np.ndarray, count: int, what: str) -> np.ndarray:
    """``count`` whole numbers below 2^35, int64; see ``varint_pack``."""
    ends = np.flatnonzero(data < 128)
    if len(ends) != count or (len(data) and data[-1] >= 128):
        raise PayloadError(f"payload: {what} does not hold {count} numbers")
    widths = np.diff(ends, prepend=-1)
    if len(widths) and (int(widths.max()) > 5 or bool(((widths > 1) & (data[ends] == 0)).any())):
        raise PayloadError(f"payload: {what} has a number that is not in its shortest form")
    owner, place = _remainders(widths)
    return np.bincount(owner, (data & 127) * 128.0**place, minlength=count).astype(np.int64)


def trits_pack(trits: np.ndarray) -> np.ndarray:
    """-1, 0 and 1, five to a byte: uint8 ``[ceil(n / 5)]``."""
    digits = np.zeros((-(-len(trits) // 5), 5), dtype=np.int64)
    digits.reshape(-1)[: len(trits)] = trits % 3
    return (digits @ _PLACES).astype(np.uint8)


def trits_unpack(data: np.ndarray, count: int, what: str) -> np.ndarray:
    """-1, 0 and 1, int64 ``[count]``; see ``trits_pack``."""
    if len(data) != -(-count // 5):
        raise PayloadError(f"payload: {what} has {len(data)} bytes, not {-(-count // 5)}")
    digits = (data[:, None] // _PLACES % 3).reshape(-1)
    if bool((data >= 243).any()) or digits[count:].any():
        raise PayloadError(f"payload: {what} has a byte that is not five signs")
    return np.where(digits[:count] == 2, -1, digits[:count])


def nibbles_pack(codes: Tensor) -> Tensor:
    """Whole numbers -8 to 7, ``[K, n]``, two to a byte, the first one low: uint8."""
    wide = torch.nn.functional.pad(codes.to(torch.uint8) & 15, (0, codes.shape[1] % 2))
    return wide[:, ::2] | (wide[:, 1::2] << 4)


def nibbles_unpack(data: np.ndarray, count: int, what: str) -> np.ndarray:
    """Int64 ``[count]``; see ``nibbles_pack``."""
    if len(data) != (count + 1) // 2:
        raise PayloadError(f"payload: {what} has {len(data)} bytes, not {(count + 1) // 2}")
    found = np.stack([data & 15, data >> 4], axis=1).reshape(-1).astype(np.int64)
    if found[count:].any():
        raise PayloadError(f"payload: {what} has bits after its end")
    return (found[:count] ^ 8) - 8
