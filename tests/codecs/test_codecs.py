"""What every codec keeps to: bits, sizes, independent rows, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.codecs import decode, encodable, encode
from fedpeft.codecs.settings import Codec
from fedpeft.codecs.symbols import KINDS
from fedpeft.errors import PayloadError, ReplyError
from tests.codecs.cohorts import SHAPES, SIZE, cohort, every, label, same_bits

ALL = every()
SOME = [
    Codec(codec="dense", values="int4"),
    Codec(codec="dense", values="qsgd", levels=1),
    Codec(codec="topk"),
    Codec(codec="topk", values="fp16", density=1.0, scope="tensor"),
    Codec(codec="randk", values="bf16"),
    Codec(codec="dare", values="int8"),
    Codec(codec="compeft", density=0.7),
    Codec(codec="powersgd", rank=1),
]


def test_every_codec_is_there() -> None:
    assert len(ALL) > 150
    assert {s.codec for s in ALL} == {"dense", "topk", "randk", "dare", "compeft", "powersgd"}


@pytest.mark.parametrize("settings", ALL, ids=label)
def test_what_is_decoded_is_what_was_promised_to_the_bit_and_to_the_byte(settings: Codec) -> None:
    matrix, seeds = cohort()
    symbols = encode(settings, matrix, SHAPES, seeds)
    lengths, booked = symbols.lengths(), symbols.bytes()
    assert set(booked) <= set(KINDS.values())
    assert symbols.restored().shape == matrix.shape
    for k in range(len(matrix)):
        arrays = symbols.arrays(k)
        assert {n: len(a) for n, a in arrays.items()} == {
            n: int(size[k]) for n, size in lengths.items() if size[k] >= 0
        }
        assert sum(len(a) for a in arrays.values()) == sum(int(v[k]) for v in booked.values())
        assert all(a.dtype == np.uint8 and a.ndim == 1 for a in arrays.values())
        assert same_bits(decode(settings, arrays, SHAPES), symbols.restored()[k])


@pytest.mark.parametrize("settings", ALL, ids=label)
def test_a_client_alone_sends_what_it_sends_among_others(settings: Codec) -> None:
    matrix, seeds = cohort()
    together = encode(settings, matrix, SHAPES, seeds)
    turned = together.rows(torch.tensor([4, 0]))
    for k in range(len(matrix)):
        alone = encode(settings, matrix[k : k + 1], SHAPES, seeds[k : k + 1])
        arrays, own = together.arrays(k), alone.arrays(0)
        assert arrays.keys() == own.keys()
        assert all(np.array_equal(arrays[name], own[name]) for name in arrays)
        assert same_bits(alone.restored()[0], together.restored()[k])
    for at, k in enumerate((4, 0)):
        arrays, own = together.arrays(k), turned.arrays(at)
        assert arrays.keys() == own.keys()
        assert all(np.array_equal(arrays[name], own[name]) for name in arrays)
        assert same_bits(turned.restored()[at], together.restored()[k])
    assert all(len(size) == 2 for size in turned.bytes().values())


@pytest.mark.parametrize("settings", ALL, ids=label)
def test_nothing_one_number_and_no_clients(settings: Codec) -> None:
    for shapes, width in (((), 0), (((0, 4),), 0), (((1,),), 1), (((),), 1)):
        for value in (0.0, -2.5):
            matrix = torch.full((2, width), value)
            symbols = encode(settings, matrix, shapes, torch.tensor([1, 2]))
            arrays = symbols.arrays(1)
            assert same_bits(decode(settings, arrays, shapes), symbols.restored()[1])
            assert sum(len(a) for a in arrays.values()) == sum(
                int(v[1]) for v in symbols.bytes().values()
            )
    nobody = encode(settings, torch.empty(0, SIZE), SHAPES, torch.empty(0, dtype=torch.int64))
    assert nobody.restored().shape == (0, SIZE)
    assert all(len(size) == 0 for size in nobody.bytes().values())


@pytest.mark.parametrize("settings", SOME, ids=label)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**96])
def test_what_is_no_number_is_refused_by_its_row(settings: Codec, bad: float) -> None:
    matrix, seeds = cohort()
    matrix[3, 5] = bad
    with pytest.raises(PayloadError, match=r"rows \[3\]"):
        encode(settings, matrix, SHAPES, seeds)
    assert encodable(matrix).tolist() == [True, True, True, False, True]
    assert issubclass(PayloadError, ReplyError)


@pytest.mark.parametrize("settings", ALL, ids=label)
def test_the_largest_numbers_stay_finite(settings: Codec) -> None:
    matrix = torch.full((1, SIZE), 2.0**96 * (1 - 2**-20))
    matrix[0, ::3] *= -1
    symbols = encode(settings, matrix, SHAPES, torch.tensor([3]))
    assert symbols.restored().isfinite().all()
    assert same_bits(decode(settings, symbols.arrays(0), SHAPES), symbols.restored()[0])


def test_what_does_not_fit_is_refused() -> None:
    matrix, seeds = cohort()
    settings = Codec(codec="dense")
    for other in (matrix[:, 1:], matrix.double(), matrix[0]):
        with pytest.raises(ValueError, match="as the shapes say"):
            encode(settings, other, SHAPES, seeds)
    with pytest.raises(ValueError, match="expected int64"):
        encode(settings, matrix, SHAPES, seeds[1:])
    for call in (lambda: encode(Codec(), matrix, SHAPES, seeds), lambda: decode(Codec(), {}, ())):
        with pytest.raises(ValueError, match="codec=none"):
            call()


@pytest.mark.parametrize("settings", SOME, ids=label)
def test_sections_that_are_missing_foreign_short_or_long_are_refused(settings: Codec) -> None:
    matrix, seeds = cohort()
    arrays = encode(settings, matrix, SHAPES, seeds).arrays(0)
    for name, data in arrays.items():
        if len(data):
            others = [data[:-1], data[:0], np.append(data, np.uint8(0)), data.view(np.int8)]
            others += [data[None]]
        else:
            others = [np.zeros(1, np.uint8)]
        for other in others:
            with pytest.raises(PayloadError, match="payload: "):
                decode(settings, {**arrays, name: other}, SHAPES)
        with pytest.raises(PayloadError, match="payload: "):
            decode(settings, {n: a for n, a in arrays.items() if n != name}, SHAPES)
    with pytest.raises(PayloadError, match="do not belong there"):
        decode(settings, {**arrays, "more": np.zeros(1, np.uint8)}, SHAPES)


def changed(settings: Codec, name: str, at: slice, to: object) -> dict[str, np.ndarray]:
    """Client 0's sections with some bytes of one overwritten."""
    matrix, seeds = cohort()
    arrays = encode(settings, matrix, SHAPES, seeds).arrays(0)
    data = arrays[name].copy()
    data[at] = to
    return {**arrays, name: data}


@pytest.mark.parametrize(
    ("settings", "name", "at", "to", "why"),
    [
        (
            Codec(codec="dense"),
            "values",
            slice(0, 4),
            [0, 0, 128, 127],
            "section .* has NaN or Inf",
        ),
        (Codec(codec="dense", values="int8"), "values", slice(0, 1), 128, "beyond 127"),
        (Codec(codec="dense", values="int4"), "values", slice(0, 1), 8, "beyond 7"),
        (Codec(codec="dense", values="int8"), "scale", slice(3, 4), 191, "negative step"),
        (Codec(codec="dense", values="qsgd", block=8), "values", slice(0, 1), 255, "beyond 127"),
        (Codec(codec="dense", values="qsgd", levels=1), "gamma", slice(2, 4), 255, "more than"),
        (
            Codec(codec="dense", values="qsgd", levels=1),
            "gamma",
            slice(4, 30),
            0,
            "more than 40 bits|a place beyond|too early",
        ),
        (
            Codec(codec="topk", positions="coo"),
            "coo",
            slice(0, 4),
            [255, 255, 255, 0],
            "do not ascend",
        ),
        (Codec(codec="topk", positions="coo"), "coo", slice(-1, None), 1, "place beyond 703"),
        (Codec(codec="topk", positions="bitmask"), "bitmask", slice(0, 2), 255, "places, not 71"),
        (Codec(codec="topk", positions="bitmask"), "bitmask", slice(-1, None), 128, "after its"),
        (Codec(codec="topk", positions="varint"), "varint", slice(0, 1), 128, "not hold 71"),
        (Codec(codec="topk", positions="varint"), "varint", slice(0, 2), [128, 0], "not hold"),
        (Codec(codec="topk", positions="golomb"), "golomb", slice(0, 30), 0, "too early|beyond"),
        (
            Codec(codec="topk", density=1.0, values="fp16", scope="tensor"),
            "values",
            slice(0, 2),
            [0, 124],
            "section .* has NaN or Inf",
        ),
        (Codec(codec="compeft"), "scale", slice(1, 2), 191, "negative"),
        (Codec(codec="compeft", density=0.8), "trits", slice(0, 1), 243, "not five signs"),
        (
            Codec(codec="powersgd", rank=1),
            "left",
            slice(2, 4),
            [128, 127],
            "section .* has NaN or Inf",
        ),
    ],
)
def test_sections_that_no_encoder_writes_are_refused(
    settings: Codec, name: str, at: slice, to: object, why: str
) -> None:
    with pytest.raises(PayloadError, match=why):
        decode(settings, changed(settings, name, at, to), SHAPES)


def test_a_place_twice_is_refused() -> None:
    settings = Codec(codec="topk", positions="coo")
    matrix, seeds = cohort()
    arrays = encode(settings, matrix, SHAPES, seeds).arrays(0)
    places = arrays["coo"].view("<u4").copy()
    places[1] = places[0]
    with pytest.raises(PayloadError, match="do not ascend"):
        decode(settings, {**arrays, "coo": places.view(np.uint8)}, SHAPES)


def test_top_k_of_each_tensor_is_checked_for_each_tensor() -> None:
    settings = Codec(codec="topk", positions="coo", scope="tensor")
    matrix, seeds = cohort()
    arrays = encode(settings, matrix, SHAPES, seeds).arrays(0)
    places = arrays["coo"].view("<u4").copy()
    places[31:33] = places[32:34] - 1  # of the first tensor's 32, two become the second's
    everywhere = np.sort(np.arange(len(places), dtype="<u4"))
    for other in (everywhere, np.sort(places)):
        with pytest.raises(PayloadError, match="payload: "):
            decode(settings, {**arrays, "coo": other.view(np.uint8)}, SHAPES)


def test_more_kept_than_the_density_says_is_refused() -> None:
    matrix, seeds = cohort()
    loose, tight = Codec(codec="compeft", density=0.9), Codec(codec="compeft", density=0.8)
    arrays = encode(loose, matrix, SHAPES, seeds).arrays(0)
    assert "trits" in arrays
    with pytest.raises(PayloadError, match="at most"):
        decode(tight, arrays, SHAPES)
    whole = encode(Codec(codec="topk", density=0.99), matrix, SHAPES, seeds).arrays(0)
    assert "dense" in whole
    with pytest.raises(PayloadError, match="than the density says"):
        decode(Codec(codec="topk", density=0.95), whole, SHAPES)
    counted = encode(Codec(codec="compeft", density=0.6), matrix, SHAPES, seeds).arrays(2)
    assert len(counted["count"]) == 4
    with pytest.raises(PayloadError, match="at most"):
        decode(
            Codec(codec="compeft", density=0.6),
            {**counted, "count": np.full(4, 255, np.uint8)},
            SHAPES,
        )
