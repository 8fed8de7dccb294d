"""The payload: what is read is what was written, and every other thing is named and refused."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
import torch

from fedpeft.codecs import encode
from fedpeft.codecs.settings import Codec
from fedpeft.codecs.wire import FLAG_WEIGHTS, HEADER_BYTES, Header, expect, overhead, read, write
from fedpeft.errors import PayloadError
from tests.codecs.cohorts import SHAPES, cohort, every, label
from tests.codecs.vandal import sealed

HEADER = Header("topk", "0123456789abcdef", "fedcba9876543210", 7, 3, FLAG_WEIGHTS)
ARRAYS = {"values": np.arange(100, dtype=np.uint8), "coo": np.arange(8, dtype=np.uint8)}
LIMIT = 10_000


def test_what_is_written_is_read() -> None:
    data = write(HEADER, ARRAYS)
    header, arrays = read(data, LIMIT)
    assert header == HEADER
    assert {n: a.tolist() for n, a in arrays.items()} == {n: a.tolist() for n, a in ARRAYS.items()}
    assert sealed(data) == data
    assert HEADER_BYTES == 44
    assert data[:4] == b"FPCB" and data[4:6] == bytes([1, 2])
    assert data == write(HEADER, dict(reversed(ARRAYS.items())))


def test_the_header_has_its_place_for_every_field() -> None:
    data = write(HEADER, {})
    assert data[6:8] == b"\x01\x00" and data[8:12] == b"\x07\x00\x00\x00"
    assert data[12:20].hex() == HEADER.base and data[20:28].hex() == HEADER.schema
    assert struct.unpack("<IQ", data[28:40]) == (3, len(data) - HEADER_BYTES)


def changed(at: int, to: bytes, seal: bool = True) -> bytes:
    data = write(HEADER, ARRAYS)
    at %= len(data)
    found = data[:at] + to + data[at + len(to) :]
    return sealed(found) if seal else found


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "truncated: 0 bytes"),
        (write(HEADER, ARRAYS)[:43], "truncated: 43 bytes"),
        (write(HEADER, ARRAYS)[:-1], "truncated: declares a body"),
        (write(HEADER, ARRAYS) + b"\x00", "too long: declares a body"),
        (changed(0, b"PK"), "it is no payload"),
        (changed(4, b"\x02"), "version 2, this is 1"),
        (changed(5, b"\x63"), "codec number 99"),
        (changed(6, b"\x02"), "flags 0x2 are unknown"),
        (changed(9, b"\x01", seal=False), "its checksum is another"),
        (changed(-2, b"\xff\xff", seal=False), "its checksum is another"),
        (changed(32, b"\xff" * 8, seal=False), "declares a body of 18446744073709551615"),
        (changed(44, b"\xff" * 8), "no safetensors"),
        (changed(52, b"["), "no safetensors"),
        (sealed(write(HEADER, ARRAYS)[:44]), "no safetensors"),
        (sealed(write(HEADER, ARRAYS).replace(b"U8", b"I8")), "not a flat array of bytes"),
        (sealed(write(HEADER, ARRAYS).replace(b"[100]", b"[4e2]")), "no safetensors"),
        (sealed(write(HEADER, ARRAYS).replace(b"[100],", b"[108],")), "no safetensors"),
        (b"\x00" * (LIMIT + 1), "at most 10000 are allowed"),
    ],
)
def test_everything_else_is_refused_by_name(data: bytes, why: str) -> None:
    with pytest.raises(PayloadError, match=why):
        read(data, LIMIT)


def test_every_flipped_bit_is_found() -> None:
    data = write(HEADER, ARRAYS)
    for at in range(len(data)):
        for bit in range(8):
            other = data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
            with pytest.raises(PayloadError):
                read(other, LIMIT)


def test_a_section_of_two_dimensions_is_refused() -> None:
    data = write(HEADER, {"ab": np.zeros(4, np.uint8)})
    assert b'"shape":[4]' in data
    other = data.replace(b'"shape":[4]', b'"shape":[4,1]')
    size = int.from_bytes(other[44:52], "little") + 2
    with pytest.raises(PayloadError, match="not a flat array"):
        read(sealed(other[:44] + size.to_bytes(8, "little") + other[52:]), LIMIT)


@pytest.mark.parametrize(
    ("name", "value"),
    [("codec", "dense"), ("base", "0" * 16), ("schema", "0" * 16), ("round", 8), ("reference", 2)],
)
def test_a_payload_for_something_else_is_refused(name: str, value: object) -> None:
    fields = dataclasses.asdict(HEADER)
    del fields["flags"]
    expect(HEADER, **fields)
    expect(HEADER, base=HEADER.base, schema=HEADER.schema, round=7)
    with pytest.raises(PayloadError, match=f"payload: {name} .*, expected"):
        expect(HEADER, **{**fields, name: value})


@pytest.mark.parametrize(
    "change",
    [{"base": "12"}, {"schema": "x" * 16}, {"round": 2**32}, {"flags": -1}, {"codec": "zip"}],
)
def test_headers_that_do_not_fit_are_not_written(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        write(dataclasses.replace(HEADER, **change), ARRAYS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="flat array of uint8"):
        write(HEADER, {"values": np.zeros(4)})


@pytest.mark.parametrize("settings", every()[::3], ids=label)
def test_the_price_of_a_payload_is_known_without_writing_it(settings: Codec) -> None:
    matrix, seeds = cohort()
    symbols = encode(settings, matrix, SHAPES, seeds)
    whole = overhead(symbols.lengths()) + sum(symbols.bytes().values())
    header = Header(settings.codec, "0" * 16, "f" * 16)
    written = [len(write(header, symbols.arrays(k))) for k in range(len(matrix))]
    assert whole.tolist() == written


def test_the_price_at_every_number_of_digits() -> None:
    sizes = [-1, 0, 1, 9, 10, 99, 100, 999, 1000, 12345]
    pairs = [(a, b) for a in sizes for b in sizes]
    lengths = {
        "values": torch.tensor([a for a, _ in pairs]),
        "bitmask": torch.tensor([b for _, b in pairs]),
    }
    found = overhead(lengths)
    for k, pair in enumerate(pairs):
        arrays = {n: np.zeros(s, np.uint8) for n, s in zip(lengths, pair, strict=True) if s >= 0}
        assert int(found[k]) == len(write(HEADER, arrays)) - sum(map(len, arrays.values()))
