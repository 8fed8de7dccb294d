"""Fixed point: exact sums, stated bounds, and refusals instead of silent saturation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedpeft.errors import FedpeftError
from fedpeft.secagg.fixed import FixedPoint

SLACK = 2.0**-20


def oracle(value: float, bound: float, bits: int, clients: int) -> int:
    """The integer of one number modulo 2^bits, in Python's integers."""
    top = min((2 ** (bits - 1) - 1) // clients, 2**50)
    return round(value * (top / (bound * (1 + SLACK)))) % 2**bits


@pytest.mark.parametrize("bits", [32, 64])
def test_integers_are_those_of_the_formula(bits: int) -> None:
    fixed = FixedPoint(bits, 0.3, 7, 50, 2.0, (5.0, 1e-3))
    draw = np.random.default_rng(1)
    vector = np.concatenate([draw.uniform(-0.6, 0.6, 50), [4.2], [-1e-3]])
    bounds = [0.6] * 50 + [5.0, 1e-3]
    expected = [oracle(v, b, bits, 7) for v, b in zip(vector, bounds, strict=True)]
    words = fixed.encode(vector)
    assert words.dtype == np.dtype(f"<u{bits // 8}") and words.tolist() == expected
    assert np.array_equal(fixed.encode(np.stack([vector, -vector]))[0], words)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("clients", "clip"), [(3, 0.1), (7, 1.0), (10, 1 / 3), (999, 1e-4)])
def test_all_clients_at_the_bound_do_not_overflow(
    clients: int, clip: float, sign: int, bits: int
) -> None:
    fixed = FixedPoint(bits, clip, clients, 1, extras=(3.0,))
    vector = sign * np.array([clip * (1 + SLACK), 3.0 * (1 + SLACK)])
    total = np.zeros(2, fixed.dtype)
    for _ in range(clients):
        total += fixed.encode(vector)
    assert np.allclose(fixed.decode(total, clients), clients * vector, rtol=1e-6)


def test_sums_have_the_same_bits_in_any_order() -> None:
    fixed = FixedPoint(32, 1.0, 50, 40)
    words = fixed.encode(np.random.default_rng(2).uniform(-1, 1, (50, 40)))
    totals = {
        fixed.decode(words[np.random.default_rng(k).permutation(50)].sum(0, "<u4"), 50).tobytes()
        for k in range(10)
    }
    assert len(totals) == 1


def test_rounding_bounds_what_encoding_changes_of_the_norm() -> None:
    fixed = FixedPoint(32, 1.0, 1000, 400)
    assert fixed.rounding == pytest.approx(math.sqrt(400) / 2 / fixed.scale)
    worst = (np.arange(400) + 0.5) / fixed.scale  # every coordinate half-way between integers
    change = fixed.decode(fixed.encode(worst), 1) - worst
    assert np.linalg.norm(change) <= fixed.rounding * (1 + 1e-6)
    assert np.linalg.norm(change) >= fixed.rounding * 0.99


def test_extras_have_scales_of_their_own() -> None:
    fixed = FixedPoint(32, 1e-3, 10, 2, 1.0, (1000.0, 1.0))
    vector = np.array([1e-3, -1e-3, 640.0, 0.5])
    assert np.allclose(fixed.decode(fixed.encode(vector), 1), vector, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 3, 4])
def test_a_number_that_is_not_finite_is_refused(bad: float, at: int) -> None:
    vector = np.zeros(5)
    vector[at] = bad
    with pytest.raises(FedpeftError, match=f"number {at} of the vector is not finite"):
        FixedPoint(32, 1.0, 5, 4, extras=(1.0,)).encode(vector)


@pytest.mark.parametrize(("at", "value"), [(1, 2.001), (1, -2.001), (4, 7.01), (0, 1e308)])
def test_a_number_beyond_its_bound_is_refused_and_not_told(at: int, value: float) -> None:
    fixed = FixedPoint(32, 1.0, 5, 4, 2.0, (7.0,))
    vector = np.zeros(5)
    vector[at] = value
    with pytest.raises(FedpeftError, match=rf"number {at} of the vector lies beyond") as error:
        fixed.encode(vector)
    assert f"{value:g}" not in str(error.value)


def test_what_float32_leaves_of_clipping_is_taken() -> None:
    draw = np.random.default_rng(3)
    fixed = FixedPoint(32, 0.1, 5, 1)
    for _ in range(200):
        value = draw.normal(size=1).astype(np.float32)
        clipped = value * (np.float32(0.1) / np.abs(value))
        words = fixed.encode(clipped.astype(np.float64))
        assert fixed.decode(words, 1)[0] == pytest.approx(float(clipped[0]), rel=1e-6)


@pytest.mark.parametrize("shape", [(), (4,), (6,), (2, 4), (1, 2, 5), (1,)])
def test_a_vector_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FedpeftError, match="cannot be summed securely"):
        FixedPoint(32, 1.0, 5, 4, extras=(1.0,)).encode(np.zeros(shape))


def test_a_sum_is_decoded_for_the_right_number_of_clients_only() -> None:
    fixed = FixedPoint(32, 1.0, 5, 4)
    for count in (0, 6, -1):
        with pytest.raises(FedpeftError, match=f"count is {count}"):
            fixed.decode(np.zeros(4, "<u4"), count)
    for total in (np.zeros(3, "<u4"), np.zeros(4, "<u8"), np.zeros(4)):
        with pytest.raises(FedpeftError, match="cannot be decoded"):
            fixed.decode(total, 1)


@pytest.mark.parametrize("bits", [32, 64])
def test_what_the_clients_cannot_reach_is_no_sum(bits: int) -> None:
    fixed = FixedPoint(bits, 1.0, 5, 1)
    for edge in (2 * fixed.top, 2**bits - 2 * fixed.top):
        fixed.decode(np.array([edge], fixed.dtype), 2)
    for beyond in (2 * fixed.top + 1, 2**bits - 2 * fixed.top - 1):
        with pytest.raises(FedpeftError, match="the sum of 2 clients lies beyond"):
            fixed.decode(np.array([beyond], fixed.dtype), 2)


@pytest.mark.parametrize("bits", [8, 16, 33, 0, True, 32.0])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(FedpeftError, match=r"bits is .*; it must be 32 or 64"):
        FixedPoint(bits, 1.0, 5, 4)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e200, 1e-200])
def test_bounds_that_have_no_meaning_are_refused(bad: float) -> None:
    with pytest.raises(FedpeftError, match="clip is"):
        FixedPoint(32, bad, 5, 4)
    with pytest.raises(FedpeftError, match="weight_max is"):
        FixedPoint(32, 1.0, 5, 4, bad)
    with pytest.raises(FedpeftError, match=r"extras\[1\] is"):
        FixedPoint(32, 1.0, 5, 4, 1.0, (1.0, bad))


@pytest.mark.parametrize("bad", [0, -1, 2**40, 1.5])
def test_numbers_of_clients_and_coordinates_are_checked(bad: int) -> None:
    with pytest.raises(FedpeftError, match="clients is"):
        FixedPoint(32, 1.0, bad, 4)
    with pytest.raises(FedpeftError, match="length is"):
        FixedPoint(32, 1.0, 5, bad)


def test_a_sum_that_would_overflow_is_refused_at_set_up() -> None:
    """With 2^31 - 1 integers per sign there is one for each of as many clients, and no more."""
    with pytest.raises(FedpeftError, match="too coarse"):  # one integer each
        FixedPoint(32, 1.0, 2**31 - 1, 1)
    with pytest.raises(FedpeftError, match="clients is"):
        FixedPoint(32, 1.0, 2**31, 1)


@pytest.mark.parametrize(
    ("clients", "length", "weight_max"), [(50_000, 1_000_000, 1.0), (64, 1_000_000, 1000.0)]
)
def test_a_resolution_too_coarse_is_refused_at_set_up(
    clients: int, length: int, weight_max: float
) -> None:
    with pytest.raises(FedpeftError, match=r"bits=32 is too coarse .* take bits=64"):
        FixedPoint(32, 1.0, clients, length, weight_max)
    assert FixedPoint(64, 1.0, clients, length, weight_max).rounding < 1e-6


def test_the_edge_of_too_coarse_is_one_hundredth_of_the_clip_norm() -> None:
    clients = 2**31 // 50  # top is 49 or 50: with one coordinate the edge lies at 50
    assert FixedPoint(32, 1.0, clients - 10_000_000, 1).rounding < 0.0101
    with pytest.raises(FedpeftError, match="too coarse"):
        FixedPoint(32, 1.0, clients, 1)
