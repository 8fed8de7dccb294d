"""Random numbers that privacy rests on: noise, and who or what is sampled.

ChaCha20 under a secret key of 32 bytes, one key per stream, turned into uniform and (by the inverse
of the normal distribution function) normal numbers in float64. Neither the key nor anything that it
can be guessed from is written down. Recipes' seeds have no part in it: whoever knows the seed could
subtract the noise.

What float64 cannot represent is not covered: the set of possible normal numbers is finite
(Mironov, CCS 2012), and a privacy statement says so.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor


@dataclass
class Randomness:
    """A source of secret random numbers. key: 32 bytes; safe: whether nobody can know them.

    Every draw is a fresh stream: no number is ever given out twice, in whatever order clients,
    steps and rounds come. For the same reason it cannot be copied, or sent to another process.
    """

    key: bytes = field(repr=False)
    safe: bool
    drawn: int = field(default=0, init=False)

    @staticmethod
    def secure() -> Randomness:
        """Under a key from the operating system: cannot be repeated, and nobody knows it."""
        return Randomness(os.urandom(32), True)

    @staticmethod
    def seeded(seed: int) -> Randomness:
        """Under a key that follows from the seed: can be repeated, and protects nobody."""
        return Randomness(
            hashlib.blake2b(f"seeded {seed}".encode(), digest_size=32).digest(), False
        )

    def uniform(self, count: int) -> np.ndarray:
        """``count`` numbers, float64, uniform on a grid of 2^52 points inside (0, 1).

        With a bit more the largest would be rounded to 1, whose normal number is infinite.
        """
        words = np.frombuffer(self._bytes(8 * count), dtype="<u8")
        return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float64, on the CPU."""
        uniform = torch.from_numpy(self.uniform(math.prod(shape)))
        found: Tensor = torch.special.ndtri(uniform)
        return found.view(*shape)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a copy of a Randomness would repeat its numbers: make another one")

    def _bytes(self, count: int) -> bytes:
        """The next stream's first ``count`` bytes."""
        self.drawn += 1
        own = hashlib.blake2b(str(self.drawn).encode(), key=self.key, digest_size=32).digest()
        return Cipher(ChaCha20(own, bytes(16)), mode=None).encryptor().update(bytes(count))
