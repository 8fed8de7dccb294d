"""Any shapes, any numbers, any settings: found by hypothesis, the same examples every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft.codecs import bits, decode, encode
from fedpeft.codecs.settings import Codec
from fedpeft.codecs.symbols import size_of
from fedpeft.codecs.wire import Header, overhead, read, write
from fedpeft.errors import PayloadError
from tests.codecs.cohorts import allowed, same_bits

SAME = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=300,
    suppress_health_check=list(HealthCheck),
)

NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-30, 65504.0, 7e4, 1e28]),
    st.floats(-1e6, 1e6, width=32),
)
CODECS = st.builds(
    Codec,
    codec=st.sampled_from(["dense", "topk", "randk", "dare", "compeft", "powersgd"]),
    values=st.sampled_from(["fp32", "fp16", "bf16", "int8", "int4", "qsgd"]),
    density=st.one_of(st.sampled_from([0.01, 0.29, 0.5, 1.0]), st.floats(0.001, 1.0)),
    positions=st.sampled_from(["auto", "bitmask", "golomb", "coo", "varint"]),
    scope=st.sampled_from(["all", "tensor"]),
    feedback=st.sampled_from(["auto", "always", "never"]),
    block=st.sampled_from([1, 3, 64, 256]),
    levels=st.sampled_from([1, 4, 127]),
    rank=st.integers(1, 4),
    alpha=st.sampled_from([0.0, 0.5, 1000.0]),
    rescale=st.sampled_from([0.0, 1.0]),
)
SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=4).map(tuple)


def plain(found: Codec) -> Codec:
    """The settings, less what means nothing to their codec."""
    default, kept = Codec(), {}
    for name, value in vars(found).items():
        one = {"codec": found.codec, "values": found.values, **kept, name: value}
        kept[name] = value if allowed(Codec(**one)) else getattr(default, name)
    return Codec(**kept)


@SAME
@given(st.data())
def test_what_is_sent_arrives_at_the_price_that_was_named(data: st.DataObject) -> None:
    own = data.draw(CODECS)
    if own.codec in ("compeft", "powersgd"):
        own = Codec(**{**vars(own), "values": "fp32"})
    own = plain(own)
    assert allowed(own)
    shapes = data.draw(SHAPES)
    size = size_of(shapes)
    rows = data.draw(st.integers(1, 3))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    some = np.array(data.draw(st.lists(NUMBERS, min_size=1, max_size=12)), dtype=np.float32)
    matrix = torch.from_numpy(draw.choice(some, (rows, size)))
    seeds = torch.tensor(data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=3)))[:rows]
    symbols = encode(own, matrix, shapes, seeds)
    price = overhead(symbols.lengths()) + sum(symbols.bytes().values())
    for k in range(rows):
        payload = write(Header(own.codec, "0" * 16, "0" * 16), symbols.arrays(k))
        assert len(payload) == int(price[k])
        _, arrays = read(payload, len(payload))
        assert same_bits(decode(own, arrays, shapes), symbols.restored()[k])
        alone = encode(own, matrix[k : k + 1], shapes, seeds[k : k + 1])
        assert same_bits(alone.restored()[0], symbols.restored()[k])


@SAME
@given(st.lists(st.integers(0, 2**34)), st.integers(0, 12))
def test_codes_of_any_numbers_come_back(numbers: list[int], parameter: int) -> None:
    wide = np.array(numbers, dtype=np.int64)
    data = bits.varint_pack(wide)
    assert bits.varint_unpack(data, len(wide), "x").tolist() == numbers
    flags = wide % 2 == 1
    found, signs = bits.gamma_unpack(bits.gamma_pack(wide + 1, flags), len(wide), len(wide), "x")
    assert found.tolist() == [n + 1 for n in numbers]
    assert signs.astype(bool).tolist() == flags.tolist()
    small = wide % 5000
    data = bits.rice_pack(small, parameter)
    assert bits.rice_unpack(data, len(small), parameter, "x").tolist() == small.tolist()


@SAME
@given(st.binary(max_size=60), st.integers(0, 30), st.integers(0, 9))
def test_any_bytes_are_refused_or_are_what_would_be_written(
    data: bytes, count: int, parameter: int
) -> None:
    raw = np.frombuffer(data, dtype=np.uint8)
    readers = {
        "rice": lambda: bits.rice_pack(bits.rice_unpack(raw, count, parameter, "x"), parameter),
        "gamma": lambda: bits.gamma_pack(*bits.gamma_unpack(raw, count, parameter, "x")),
        "varint": lambda: bits.varint_pack(bits.varint_unpack(raw, count, "x")),
        "trits": lambda: bits.trits_pack(bits.trits_unpack(raw, count, "x")),
        "flags": lambda: bits.pack(bits.unpack(raw, count, "x")),
        "wide": lambda: bits.pack_wide(bits.unpack_wide(raw, count, 5, "x"), 5),
    }
    for again in readers.values():
        try:
            assert again().tobytes() == data
        except PayloadError:
            continue


@SAME
@given(st.binary(max_size=200))
def test_any_bytes_are_no_payload(data: bytes) -> None:
    with pytest.raises(PayloadError):
        read(data, 1000)


def test_powersgd_sends_the_same_bits_alone_and_in_a_cohort() -> None:
    own = Codec(codec="powersgd", values="fp32", rank=1)
    matrix, seeds = torch.ones(2, 405), torch.zeros(2, dtype=torch.int64)
    both = encode(own, matrix, ((5, 9, 9),), seeds).restored()
    for k in range(2):
        alone = encode(own, matrix[k : k + 1], ((5, 9, 9),), seeds[k : k + 1])
        assert same_bits(alone.restored()[0], both[k])
