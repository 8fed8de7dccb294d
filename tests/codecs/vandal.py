"""Payloads of every codec, and ways to spoil them."""

from __future__ import annotations

import math
import struct
import zlib
from functools import cache

import numpy as np
import torch

from fedpeft.codecs import decode, encode
from fedpeft.codecs.settings import Codec
from fedpeft.codecs.wire import HEADER_BYTES, Header, expect, read, write
from tests.codecs.cohorts import SHAPES, SIZE, cohort, every

BASE, SCHEMA = "0123456789abcdef", "fedcba9876543210"
LIMIT = 1 << 16


@cache
def payloads() -> list[tuple[Codec, bytes]]:
    """Settings and a payload that they wrote, for every codec and several clients."""
    matrix, seeds = cohort()
    found = []
    for settings in every():
        symbols = encode(settings, matrix, SHAPES, seeds)
        header = Header(settings.codec, BASE, SCHEMA, 5)
        found += [(settings, write(header, symbols.arrays(k))) for k in (0, 2, 4)]
    return found


def sealed(data: bytes) -> bytes:
    """The same with the length and checksum that it should have."""
    if len(data) < HEADER_BYTES:
        return data
    head = data[:32] + struct.pack("<Q", len(data) - HEADER_BYTES)
    body = data[HEADER_BYTES:]
    return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body


def body_start(data: bytes) -> int:
    """Where the sections begin, behind safetensors' JSON."""
    return HEADER_BYTES + 8 + int.from_bytes(data[HEADER_BYTES : HEADER_BYTES + 8], "little")


def spoil(data: bytes, draw: np.random.Generator) -> bytes:
    """One to four changes, half of them within the sections."""
    for _ in range(int(draw.integers(1, 5))):
        first = min(body_start(data), len(data) - 1) if draw.random() < 0.5 else 0
        at = int(draw.integers(first, max(first + 1, len(data))))
        size = int(draw.integers(1, 9))
        match int(draw.integers(7)):
            case 0 | 1:
                flip = bytes([data[at] ^ int(draw.integers(1, 256))])
                data = data[:at] + flip + data[at + 1 :]
            case 2:
                data = data[: max(1, at)]
            case 3:
                data = data[:at] + draw.bytes(size) + data[at:]
            case 4:
                data = (data[:at] + data[at + size :]) or b"\x00"
            case 5:
                fill = bytes([int(draw.choice([0, 127, 128, 255]))])
                data = data[:at] + fill * min(size, len(data) - at) + data[at + size :]
            case _:
                _, other = payloads()[int(draw.integers(len(payloads())))]
                data = data[:at] + other[at : at + 16 * size] + data[at + 16 * size :]
    return data


def receive(settings: Codec, data: bytes) -> torch.Tensor:
    """What a receiver does: all checks, then the numbers, which must be numbers."""
    header, arrays = read(data, LIMIT)
    expect(header, codec=settings.codec, base=BASE, schema=SCHEMA, round=5)
    found = decode(settings, arrays, SHAPES)
    assert found.shape == (SIZE,) and found.dtype == torch.float32
    assert bool(found.isfinite().all())
    if settings.codec in ("topk", "randk", "compeft"):
        most = settings.density * SIZE + len(SHAPES) + 1
        assert int(found.count_nonzero()) <= math.ceil(most)
    return found
