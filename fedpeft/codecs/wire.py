"""The payload: a header of 44 bytes, and sections of bytes as safetensors.

Little-endian: magic ``FPCB``, version u8, codec u8, flags u16, round u32, digest of the base 8
bytes, digest of the schema 8 bytes, reference u32, length of the body u64, CRC-32 of all else u32.
The body is one safetensors file of flat uint8 arrays; nothing in it is code.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np
import safetensors
import torch
from safetensors.numpy import save
from torch import Tensor

from fedpeft.codecs.settings import Name
from fedpeft.errors import PayloadError

MAGIC = b"FPCB"
VERSION = 1
CODECS: tuple[str, ...] = get_args(Name)
"""A codec's number is its place here: names are only ever appended."""

_HEAD = struct.Struct("<4sBBHI8s8sIQ")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEAD.size + _CRC.size

FLAG_WEIGHTS = 1
"""The numbers are the weights themselves, not a change."""
_FLAGS = FLAG_WEIGHTS
_DIGEST_CHARS = 16


@dataclass(frozen=True)
class Header:
    """What a payload says of itself.

    base, schema: digests of the frozen base and of what the numbers mean, 16 hex digits each.
    round: when it was written. reference: the version of the weights that a change is relative to.
    flags: FLAG_WEIGHTS or 0.
    """

    codec: str
    base: str
    schema: str
    round: int = 0
    reference: int = 0
    flags: int = 0


def write(header: Header, arrays: Mapping[str, np.ndarray]) -> bytes:
    """A payload. Raises ValueError for a header that does not fit, or arrays that are not uint8."""
    wrong = [name for name, data in arrays.items() if data.dtype != np.uint8 or data.ndim != 1]
    if wrong:
        raise ValueError(f"section {wrong[0]!r} must be a flat array of uint8")
    if len(header.base) != _DIGEST_CHARS or len(header.schema) != _DIGEST_CHARS:
        raise ValueError(f"digests {header.base!r}, {header.schema!r}: must be 16 hex digits")
    body = save({name: np.ascontiguousarray(data) for name, data in arrays.items()})
    try:
        head = _HEAD.pack(
            MAGIC,
            VERSION,
            CODECS.index(header.codec),
            header.flags,
            header.round,
            bytes.fromhex(header.base),
            bytes.fromhex(header.schema),
            header.reference,
            len(body),
        )
    except struct.error as error:
        raise ValueError(f"a header that does not fit its bytes: {header}") from error
    return head + _CRC.pack(zlib.crc32(body, zlib.crc32(head))) + body


def read(data: bytes, limit: int) -> tuple[Header, dict[str, np.ndarray]]:
    """A payload's header and sections, uint8 ``[bytes]`` each, read-only.

    limit: bytes that a payload may have. Raises PayloadError, with a reason for each, for one that
    is too long, too short, of other kind or version, damaged, or no safetensors; nothing is
    allocated by what a payload declares before that is known to be true.
    """
    if len(data) > limit:
        raise PayloadError(f"payload: {len(data)} bytes, and at most {limit} are allowed")
    if len(data) < HEADER_BYTES:
        raise PayloadError(f"payload: truncated: {len(data)} bytes, its header has {HEADER_BYTES}")
    magic, version, codec, flags, number, base, schema, reference, length = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise PayloadError(f"payload: begins with {magic!r}, not {MAGIC!r}: it is no payload")
    if version != VERSION:
        raise PayloadError(
            f"payload: version {version}, this is {VERSION}: use one version of fedpeft everywhere"
        )
    have = len(data) - HEADER_BYTES
    if length != have:
        why = "truncated" if have < length else "too long"
        raise PayloadError(f"payload: {why}: declares a body of {length} bytes, {have} are there")
    (crc,) = _CRC.unpack_from(data, _HEAD.size)
    view = memoryview(data)
    if zlib.crc32(view[HEADER_BYTES:], zlib.crc32(view[: _HEAD.size])) != crc:
        raise PayloadError("payload: damaged: its checksum is another")
    if codec >= len(CODECS) or flags & ~_FLAGS:
        raise PayloadError(f"payload: codec number {codec} or flags {flags:#x} are unknown")
    header = Header(CODECS[codec], base.hex(), schema.hex(), number, reference, flags)
    return header, _sections(data[HEADER_BYTES:])


def pieces(data: bytes, limit: int) -> Iterator[bytes]:
    """Payloads that stand one behind another. Raises PayloadError where they cannot be told apart.

    limit: bytes that all of them may have.
    """
    if len(data) > limit:
        raise PayloadError(f"payload: {len(data)} bytes, and at most {limit} are allowed")
    at = 0
    while at < len(data):
        if len(data) - at < HEADER_BYTES:
            raise PayloadError(f"payload: truncated: {len(data) - at} bytes are left over")
        length = HEADER_BYTES + _HEAD.unpack_from(data, at)[-1]
        yield data[at : at + length]
        at += length


def _sections(body: bytes) -> dict[str, np.ndarray]:
    try:
        found = safetensors.deserialize(body)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise PayloadError(f"payload: its body is no safetensors: {error}") from error
    arrays = {}
    for name, entry in found:
        if entry["dtype"] != "U8" or len(entry["shape"]) != 1:
            raise PayloadError(f"payload: section {name[:40]!r} is not a flat array of bytes")
        arrays[name] = np.frombuffer(entry["data"], dtype=np.uint8)
    return arrays


def expect(
    header: Header,
    *,
    base: str,
    schema: str,
    round: int,
    codec: str | None = None,
    reference: int | None = None,
) -> None:
    """Raises PayloadError, which names the first that differs, for a payload of something else."""
    wanted = {
        "codec": codec,
        "base": base,
        "schema": schema,
        "round": round,
        "reference": reference,
    }
    for name, value in wanted.items():
        found = getattr(header, name)
        if value is not None and found != value:
            raise PayloadError(f"payload: {name} {found!r}, expected {value!r}: it is not for this")


class _Texts(NamedTuple):
    """Characters of the JSON around a section: what every section has beside name and numbers."""

    each: int = len('"":{"dtype":"U8","shape":[],"data_offsets":[,]}')
    comma: int = 1
    braces: int = 2


def overhead(lengths: Mapping[str, Tensor]) -> Tensor:
    """Bytes of payloads beside their sections: header, and the JSON of safetensors; int64 ``[K]``.

    lengths: section -> bytes, int64 ``[K]``, -1 where a client has none; at least one section.
    ``len(write(...))`` is this plus the lengths.
    """
    text = _Texts()
    some = next(iter(lengths.values()))
    at, total = torch.zeros_like(some), torch.full_like(some, text.braces)
    any_yet = torch.zeros_like(some, dtype=torch.bool)
    for name in sorted(lengths):
        size = lengths[name]
        there, end = size >= 0, at + size.clamp(min=0)
        own = text.each + len(name) + _digits(size) + _digits(at) + _digits(end)
        total = total + torch.where(there, own + text.comma * any_yet, 0)
        at, any_yet = end, any_yet | there
    padded = (total + 7) // 8 * 8
    return padded + 8 + HEADER_BYTES


def _digits(numbers: Tensor) -> Tensor:
    """Decimal digits of whole numbers below 10^15, at least one."""
    found = torch.ones_like(numbers)
    for power in range(1, 15):
        found = found + (numbers >= 10**power)
    return found
