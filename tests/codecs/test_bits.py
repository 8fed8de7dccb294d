"""Bits against the formulas, against loops that are plainly right, and against nonsense."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedpeft.codecs import bits
from fedpeft.errors import PayloadError

PHI = (math.sqrt(5) + 1) / 2

TABLE = [
    # density, entropy of a ternary vector, b*, bits a position, Golomb bits a number, times fp16
    (0.01, 0.0908, 6, 8.108, 0.0911, 175.7),
    (0.05, 0.3364, 4, 5.786, 0.3393, 47.2),
    (0.10, 0.5690, 3, 4.756, 0.5756, 27.8),
    (0.20, 0.9219, 2, 3.694, 0.9388, 17.0),
    (0.30, 1.1810, 1, 2.961, 1.1880, 13.5),
    (0.50, 1.5000, 0, 2.000, 1.5000, 10.7),
]


def drawn(seed: int, density: float, size: int) -> np.ndarray:
    """Gaps between places that are each chosen with some probability."""
    chosen = np.flatnonzero(np.random.default_rng(seed).random(size) < density)
    return np.diff(chosen, prepend=-1) - 1


def as_row(numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(numbers[None]), torch.tensor([len(numbers)])


def rice_bits(gaps: np.ndarray, parameter: int) -> int:
    return int(bits.rice_bits(*as_row(gaps), parameter))


def test_bits_of_a_known_mask() -> None:
    gaps = np.diff([1, 2, 7, 15], prepend=-1) - 1
    assert gaps.tolist() == [1, 0, 4, 7]
    assert [rice_bits(gaps, b) for b in range(4)] == [16, 13, 14, 16]
    assert rice_bits(np.array([0, 2, 5]), 1) == 9  # the places 0, 3, 9


@pytest.mark.parametrize(("density", "entropy", "best", "position", "number", "ratio"), TABLE)
def test_golomb_comes_as_near_to_the_entropy_as_published(
    density: float, entropy: float, best: int, position: float, number: float, ratio: float
) -> None:
    size = 1_000_000
    none = 1 - density
    h = -none * math.log2(none) - density * math.log2(density / 2)
    assert h == pytest.approx(entropy, abs=1e-3)
    count = round(density * size)
    parameter = bits.rice_parameter(count, size)
    log = 1 + math.floor(math.log2(math.log(PHI - 1) / math.log(none)))
    assert parameter == best == max(0, log)
    assert parameter + 1 / (1 - none**2**parameter) == pytest.approx(position, abs=5e-4)
    gaps = drawn(1, density, size)
    measured = (rice_bits(gaps, parameter) + len(gaps)) / size
    assert measured == pytest.approx(number, rel=0.01)
    assert 16 / measured == pytest.approx(ratio, rel=0.01)
    others = [rice_bits(gaps, b) for b in range(parameter + 4)]
    assert min(others) == others[parameter]


def test_the_rice_parameter_at_the_ends() -> None:
    assert [bits.rice_parameter(*pair) for pair in ((0, 0), (0, 9), (9, 9), (1, 1))] == [0] * 4
    assert bits.rice_parameter(1, 2**31) == 30


@pytest.mark.parametrize("parameter", [0, 1, 5])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_rice_codes_come_back(parameter: int, count: int) -> None:
    gaps = np.random.default_rng(count).geometric(0.1, count) - 1
    data = bits.rice_pack(gaps, parameter)
    assert len(data) == -(-rice_bits(gaps, parameter) // 8)
    assert bits.rice_unpack(data, count, parameter, "x").tolist() == gaps.tolist()
    if count:
        for other in (data[:-1], np.append(data, np.uint8(0))):
            with pytest.raises(PayloadError, match="too early|not"):
                bits.rice_unpack(other, count, parameter, "x")


def gamma_length(number: int) -> int:
    return 2 * math.floor(math.log2(number)) + 1


def test_gamma_codes_come_back_and_have_their_length() -> None:
    numbers = np.concatenate([np.arange(1, 70), [127, 128, 2**24 - 1, 2**24, 2**24 + 1, 2**35]])
    flags = np.arange(len(numbers)) % 3 == 0
    data = bits.gamma_pack(numbers, flags)
    wanted = sum(gamma_length(int(n)) for n in numbers) + len(flags)
    assert len(data) == -(-wanted // 8)
    exponents = bits.exponents(torch.from_numpy(numbers))
    assert int((2 * exponents + 1).sum()) + len(flags) == wanted
    found, signs = bits.gamma_unpack(data, len(numbers), len(flags), "x")
    assert found.tolist() == numbers.tolist() and signs.astype(bool).tolist() == flags.tolist()
    with pytest.raises(PayloadError, match="too early|not"):
        bits.gamma_unpack(data[:-1], len(numbers), len(flags), "x")
    with pytest.raises(PayloadError, match="more than 40 bits"):
        bits.gamma_unpack(np.array([0] * 6 + [255], np.uint8), 1, 0, "x")
    assert len(bits.gamma_pack(numbers[:0], flags[:0])) == 0


def leb128(number: int) -> list[int]:
    found = []
    while True:
        found.append((number & 127) | (128 if number > 127 else 0))
        number >>= 7
        if not number:
            return found


def test_varints_are_leb128() -> None:
    numbers = np.array([0, 1, 127, 128, 300, 16383, 16384, 2**21, 2**28 - 1, 2**28, 2**35 - 1])
    data = bits.varint_pack(numbers)
    assert data.tolist() == [byte for number in numbers.tolist() for byte in leb128(number)]
    assert int(bits.varint_bytes(*as_row(numbers))) == len(data)
    assert bits.varint_unpack(data, len(numbers), "x").tolist() == numbers.tolist()
    assert bits.varint_unpack(data[:0], 0, "x").tolist() == []
    for other in ([128], [128, 0], [128, 128, 128, 128, 128, 1], [], [1, 1], [1, 128]):
        with pytest.raises(PayloadError, match="x"):
            bits.varint_unpack(np.array(other, np.uint8), 1, "x")


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 7, 8, 9, 1001])
def test_flags_trits_nibbles_and_wide_numbers_come_back(count: int) -> None:
    draw = np.random.default_rng(count)
    flags = draw.random(count) < 0.5
    assert bits.unpack(bits.pack(flags), count, "x").astype(bool).tolist() == flags.tolist()
    trits = draw.integers(-1, 2, count)
    packed = bits.trits_pack(trits)
    assert len(packed) == -(-count // 5)
    assert bits.trits_unpack(packed, count, "x").tolist() == trits.tolist()
    codes = draw.integers(-8, 8, count)
    halves = bits.nibbles_pack(torch.from_numpy(codes[None]).to(torch.int8))[0].numpy()
    assert bits.nibbles_unpack(halves, count, "x").tolist() == codes.tolist()
    numbers = draw.integers(0, 32, count)
    wide = bits.pack_wide(numbers, 5)
    assert len(wide) == -(-5 * count // 8)
    assert bits.unpack_wide(wide, count, 5, "x").tolist() == numbers.tolist()


def test_bits_beyond_the_end_are_refused() -> None:
    top = np.array([0x80], np.uint8)
    with pytest.raises(PayloadError, match="after its end"):
        bits.unpack(top, 7, "x")
    with pytest.raises(PayloadError, match="after its end"):
        bits.nibbles_unpack(top, 1, "x")
    for byte in (81, 243):
        with pytest.raises(PayloadError, match="not five signs"):
            bits.trits_unpack(np.array([byte], np.uint8), 4, "x")
    for unpack in (bits.unpack, bits.trits_unpack, bits.nibbles_unpack):
        with pytest.raises(PayloadError, match="has 1 bytes, not"):
            unpack(top, 20, "x")


def test_places_are_below_the_size_and_nothing_overflows() -> None:
    assert bits.places(np.array([1, 0, 4]), 8, "x").tolist() == [1, 2, 7]
    for gaps in ([1, 0, 5], [8], [2**62] * 4):
        with pytest.raises(PayloadError, match="beyond 8"):
            bits.places(np.array(gaps), 8, "x")


@pytest.mark.parametrize("size", [0, 1, 2, 3, 255, 256, 257, 5000])
def test_sums_by_halves_do_not_depend_on_the_other_rows(size: int) -> None:
    numbers = torch.randn(7, size, generator=torch.Generator().manual_seed(size))
    found = bits.tree_sum(numbers)
    assert torch.allclose(found.double(), numbers.double().sum(dim=1), atol=1e-3)
    for k in range(7):
        assert torch.equal(bits.tree_sum(numbers[k : k + 1])[0], found[k])
    exact = torch.full((1, size), 0.1).double()
    assert torch.allclose(bits.tree_sum(exact), exact.sum(dim=1))
