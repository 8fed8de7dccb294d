"""Fixed point: vectors of real numbers as integers modulo 2^bits, whose sums are exact.

Masks are uniform integers modulo 2^bits, so that what is masked must be integers too. Sums of
integers have the same bits in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import FedpeftError

Floats = NDArray[np.float64]
Words = NDArray[Any]
"""Integers modulo 2^bits: uint32 or uint64."""

COARSE = 0.01
"""The largest rounding error that is accepted, as a share of the clip norm."""

_SLACK = 2.0**-20
"""How far beyond its bound a number may lie: what clipping in float32 leaves, and more."""

_EXACT = 2**50
"""No integer is larger: float64 products up to here are rounded to the right integer."""


@dataclass(frozen=True)
class FixedPoint:
    """How a vector of ``length`` coordinates and some further numbers becomes integers.

    A client sends ``weight * update`` with ``norm(update) <= clip`` and ``0 <= weight <=
    weight_max``, so that every coordinate lies within ``clip * weight_max``. The integer of x is
    ``rint(x * scale)`` with ``scale = top / (clip * weight_max)`` and ``top = (2^(bits-1) - 1) //
    clients``: the sum over all clients stays below 2^(bits-1), and cannot wrap around.

    bits: 32 or 64. clients: the most that are summed. length: coordinates of an update. extras:
    bounds of the numbers that follow the update in a vector, such as the weight itself; each has a
    scale of its own.

    Raises FedpeftError where an argument has no meaning, where 2^(bits-1) leaves a client no
    integer, or where ``rounding`` exceeds 1 % of the clip norm at weight one (at ``weight_max``, if
    that is smaller): no mean of such updates is off by more.
    """

    bits: int
    clip: float
    clients: int
    length: int
    weight_max: float = 1.0
    extras: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _whole("bits", self.bits, lambda n: n in (32, 64), "32 or 64")
        _whole("clients", self.clients, lambda n: 1 <= n < 2**31, "a whole number from 1")
        _whole("length", self.length, lambda n: 1 <= n < 2**32, "a whole number from 1 to 2^32 - 1")
        bounds = {"clip": self.clip, "weight_max": self.weight_max}
        bounds.update({f"extras[{k}]": bound for k, bound in enumerate(self.extras)})
        for name, value in bounds.items():
            if not (isinstance(value, int | float) and 1e-100 < value < 1e100):
                raise FedpeftError(f"{name} is {value!r}; it must be a positive, finite number")
        if self.top < 1:
            raise FedpeftError(
                f"the sum of {self.clients} clients would overflow {self.bits} bits: each has "
                f"2^{self.bits - 1} / {self.clients} < 1 integer; take bits=64 or fewer clients"
            )
        least = self.clip * min(1.0, self.weight_max)
        if self.rounding > COARSE * least:
            raise FedpeftError(
                f"bits={self.bits} is too coarse for {self.length} coordinates, {self.clients} "
                f"clients and weight_max={self.weight_max:g}: rounding changes an update's norm by "
                f"up to {self.rounding:.2g}, and {COARSE:.0%} of its clip norm is "
                f"{COARSE * least:.2g}; take bits=64, fewer clients or a smaller weight_max"
            )

    @property
    def size(self) -> int:
        """Numbers in a client's vector: its update's coordinates and the extras."""
        return self.length + len(self.extras)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Little-endian unsigned integers of ``bits`` bits: the modulus, and the bytes sent."""
        return np.dtype("<u4" if self.bits == 32 else "<u8")

    @property
    def top(self) -> int:
        """The largest integer that one client sends."""
        return int(min((2 ** (self.bits - 1) - 1) // self.clients, _EXACT))

    @property
    def scale(self) -> float:
        """Integers per unit of a coordinate."""
        return self.top / (self.clip * self.weight_max * (1 + _SLACK))

    @property
    def rounding(self) -> float:
        """How much rounding adds to the norm of a client's ``weight * update``, at most.

        ``sqrt(length) / 2 / scale``. A privacy mechanism adds it to the sensitivity.
        """
        return math.sqrt(self.length) / 2 / self.scale

    def encode(self, vector: Floats) -> Words:
        """Integers of one vector ``[size]`` or of K vectors ``[K, size]``, to the nearest.

        Raises FedpeftError for another shape, for a number that is not finite and for one beyond
        its bound, which is never cut off silently. The text names the place and not the value: it
        may leave the client.
        """
        values = np.asarray(vector, dtype=np.float64)
        if values.ndim not in (1, 2) or values.shape[-1] != self.size:
            raise FedpeftError(
                f"a vector of shape {values.shape} cannot be summed securely: it must hold "
                f"{self.length} coordinates and {len(self.extras)} further numbers"
            )
        self._check(values)
        scaled = values * self.scale
        if self.extras:
            scaled[..., self.length :] = values[..., self.length :] * self._extra_scales()
        return np.rint(scaled).astype(np.int64).astype(self.dtype)

    def _check(self, values: Floats) -> None:
        if not np.isfinite(values).all():
            at = int(np.argwhere(~np.isfinite(values))[0][-1])
            raise FedpeftError(f"number {at} of the vector is not finite; nothing is sent")
        limits = np.full(self.size, self.clip * self.weight_max)
        limits[self.length :] = self.extras
        beyond = np.abs(values) > limits * (1 + _SLACK)
        if beyond.any():
            at = int(np.argwhere(beyond)[0][-1])
            what = "clip * weight_max" if at < self.length else f"extras[{at - self.length}]"
            raise FedpeftError(
                f"number {at} of the vector lies beyond {what} = {limits[at]:g}; clip the update "
                f"to norm {self.clip:g} and its weight to {self.weight_max:g} before it is sent"
            )

    def _extra_scales(self) -> Floats:
        return self.top / (np.asarray(self.extras, dtype=np.float64) * (1 + _SLACK))

    def decode(self, total: Words, count: int) -> Floats:
        """The sum ``[size]`` of ``count`` vectors, from the sum of their integers modulo 2^bits.

        Raises FedpeftError unless ``count`` is in 1..clients, and where the sum is beyond what that
        many clients can send: then it is no sum of theirs.
        """
        if not 1 <= count <= self.clients:
            raise FedpeftError(
                f"count is {count}; fixed point was set up for sums of 1 to {self.clients} clients"
            )
        if total.shape != (self.size,) or total.dtype != self.dtype:
            raise FedpeftError(
                f"a sum of shape {total.shape} and dtype {total.dtype} cannot be decoded: it must "
                f"be [{self.size}] of {self.dtype}"
            )
        signed = total.view(np.dtype("<i4" if self.bits == 32 else "<i8")).astype(np.int64)
        if int(signed.max()) > count * self.top or int(signed.min()) < -count * self.top:
            raise FedpeftError(
                f"the sum of {count} clients lies beyond {count} x {self.top}: a client sent what "
                f"is no encoded vector, or masks were left in; the round's sum is lost"
            )
        values = signed / self.scale
        if self.extras:
            values[self.length :] = signed[self.length :] / self._extra_scales()
        return values


def _whole(name: str, value: int, allowed: Callable[[int], bool], rule: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not allowed(value):
        raise FedpeftError(f"{name} is {value!r}; it must be {rule}")
