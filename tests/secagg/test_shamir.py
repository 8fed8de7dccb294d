"""Shamir's sharing: any t of n give the secret back, fewer say nothing."""

from __future__ import annotations

import itertools
import os
from fractions import Fraction

import numpy as np
import pytest

from fedpeft.errors import FedpeftError
from fedpeft.secagg.shamir import PRIME, SHARE_BYTES, combine, split
from tests.secagg.network import seeded


@pytest.mark.parametrize(
    ("threshold", "clients"), [(1, 1), (1, 4), (2, 3), (3, 5), (4, 4), (7, 10)]
)
def test_any_t_shares_give_the_secret_back(threshold: int, clients: int) -> None:
    secret = os.urandom(32)
    points = [2 * k + 1 for k in range(clients)]
    shares = dict(zip(points, split(secret, threshold, points, os.urandom), strict=True))
    for some in itertools.islice(itertools.combinations(points, threshold), 40):
        assert combine({x: shares[x] for x in some}) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, bytes(31) + b"\x01"])
def test_extreme_secrets_come_back(secret: bytes) -> None:
    shares = split(secret, 3, [1, 2, 3], os.urandom)
    assert combine(dict(zip([1, 2, 3], shares, strict=True))) == secret


def test_shares_lie_on_the_polynomial_of_the_random_numbers() -> None:
    """The oracle: a + b x + c x^2 by hand, and Lagrange in fractions."""
    draws = [(k + 5).to_bytes(SHARE_BYTES, "big") for k in range(2)]
    stream = iter(draws)
    secret = (1234567).to_bytes(32, "little")
    shares = split(secret, 3, [1, 2, 7], lambda size: next(stream))
    values = [int.from_bytes(share, "big") for share in shares]
    assert values == [1234567 + 6 * x + 5 * x * x for x in (1, 2, 7)]
    at_zero = sum(
        Fraction(y * 1) * np.prod([Fraction(z, z - x) for z in (1, 2, 7) if z != x])
        for x, y in zip((1, 2, 7), values, strict=True)
    )
    assert at_zero == 1234567
    assert int.from_bytes(combine(dict(zip((1, 2, 7), shares, strict=True))), "little") == 1234567


def test_fewer_than_t_shares_fit_every_secret() -> None:
    """t - 1 shares and any secret lie on one polynomial: they say nothing."""
    shares = split(os.urandom(32), 3, [1, 2, 3], os.urandom)
    other = int.from_bytes(os.urandom(32), "little")
    ys = {0: other, 1: int.from_bytes(shares[0], "big"), 2: int.from_bytes(shares[1], "big")}
    third = 0
    for x, y in ys.items():
        weight = y
        for z in ys:
            if z != x:
                weight = weight * (3 - z) * pow(x - z, -1, PRIME) % PRIME
        third = (third + weight) % PRIME
    found = combine({1: shares[0], 2: shares[1], 3: third.to_bytes(SHARE_BYTES, "big")})
    assert int.from_bytes(found, "little") == other


def test_equal_secrets_have_other_shares_each_time() -> None:
    secret = bytes(32)
    made = {share for _ in range(20) for share in split(secret, 2, [1, 2], os.urandom)}
    assert len(made) == 40


def test_too_few_or_mixed_shares_do_not_give_the_secret() -> None:
    random = seeded(4)
    secret = random(32)
    shares = split(secret, 3, [1, 2, 3, 4], random)
    with pytest.raises(FedpeftError, match="not of one secret"):
        combine({1: shares[0], 2: shares[1]})
    with pytest.raises(FedpeftError, match="not of one secret"):
        combine({1: shares[0], 2: shares[2], 3: shares[1]})


def test_a_draw_that_is_no_field_element_is_drawn_again() -> None:
    stream = iter([b"\xff" * SHARE_BYTES, bytes(SHARE_BYTES)])
    shares = split(bytes(32), 2, [1, 2], lambda size: next(stream))
    assert shares == [bytes(SHARE_BYTES)] * 2 and next(stream, None) is None


@pytest.mark.parametrize(
    ("secret", "threshold", "points", "message"),
    [
        (bytes(31), 2, [1, 2], "the secret has 31 bytes"),
        (bytes(32), 2, [1, 1], "distinct and positive"),
        (bytes(32), 2, [0, 1], "distinct and positive"),
        (bytes(32), 0, [1, 2], "threshold is 0"),
        (bytes(32), 3, [1, 2], "threshold is 3"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    secret: bytes, threshold: int, points: list[int], message: str
) -> None:
    with pytest.raises(FedpeftError, match=message):
        split(secret, threshold, points, os.urandom)


@pytest.mark.parametrize("share", [b"", bytes(65), b"\xff" * 66, PRIME.to_bytes(66, "big")])
def test_what_is_no_share_is_refused(share: bytes) -> None:
    with pytest.raises(FedpeftError, match="share at point 2 is no element"):
        combine({1: bytes(66), 2: share})
