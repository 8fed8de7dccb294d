"""Shamir's secret sharing (1979), t of n, of 32-byte secrets in the field of 2^521 - 1 elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from fedpeft.errors import FedpeftError

PRIME = 2**521 - 1
SECRET_BYTES = 32
SHARE_BYTES = 66
"""A share is one field element, big-endian."""

Random = Callable[[int], bytes]
"""So many random bytes. ``os.urandom``, save in tests."""


def split(secret: bytes, threshold: int, points: Sequence[int], random: Random) -> list[bytes]:
    """One share per point; any ``threshold`` of them give the secret back, fewer tell nothing.

    A share is the value at a point of a polynomial of degree ``threshold - 1`` whose constant term
    is the secret and whose other coefficients are uniform. Raises FedpeftError for a secret of
    another length, points that are not distinct and positive, and a threshold beyond their number.
    """
    if len(secret) != SECRET_BYTES:
        raise FedpeftError(f"the secret has {len(secret)} bytes; it must have {SECRET_BYTES}")
    if len(set(points)) != len(points) or not all(0 < x < PRIME for x in points):
        raise FedpeftError(f"points are {list(points)}; they must be distinct and positive")
    if not 1 <= threshold <= len(points):
        raise FedpeftError(f"threshold is {threshold}; it must be in 1..{len(points)}, the shares")
    polynomial = [_element(random) for _ in range(threshold - 1)]
    polynomial.append(int.from_bytes(secret, "little"))  # highest degree first, for Horner's rule
    return [_evaluate(polynomial, x).to_bytes(SHARE_BYTES, "big") for x in points]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret from exactly ``threshold`` shares, by point: Lagrange's interpolation at zero.

    Raises FedpeftError for a share that is no field element, and where the result is not a secret
    of 32 bytes: then the shares are of different secrets. Wrong shares are not always found out
    this way; compare the result with a commitment.
    """
    total = 0
    points = tuple(sorted(shares))
    for x, weight in zip(points, _lagrange_at_zero(points), strict=True):
        value = int.from_bytes(shares[x], "big")
        if len(shares[x]) != SHARE_BYTES or value >= PRIME:
            raise FedpeftError(f"the share at point {x} is no element of the field")
        total = (total + weight * value) % PRIME
    if total >> (8 * SECRET_BYTES):
        raise FedpeftError("the shares are not of one secret")
    return total.to_bytes(SECRET_BYTES, "little")


def _element(random: Random) -> int:
    """A uniform field element: 521 random bits, drawn again in the one case that is none."""
    while (value := int.from_bytes(random(SHARE_BYTES), "big") & PRIME) == PRIME:
        pass
    return value


def _evaluate(polynomial: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in polynomial:
        value = (value * x + coefficient) % PRIME
    return value


@lru_cache(maxsize=8)
def _lagrange_at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """Each point's weight: the product over the other points z of ``z / (z - x)``."""
    weights = []
    for x in points:
        above = below = 1
        for z in points:
            if z != x:
                above = above * z % PRIME
                below = below * (z - x) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
