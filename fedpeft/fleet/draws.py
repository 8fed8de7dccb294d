"""Random numbers of a fleet: of a purpose, a round and a client, in any order."""

from __future__ import annotations

import numpy as np
import torch

from fedpeft import philox
from fedpeft.streams import derive


class Draws:
    """The stream of one purpose (``network``, ``dropout``, ...) under a seed.

    The numbers of client i in round t are words of the Philox stream t under the key of i.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self._key = derive(seed, "fleet", purpose)

    def uniforms(self, clients: np.ndarray, round: int, count: int = 1) -> np.ndarray:
        """In [0, 1), float64 ``[K, count]``; clients: their numbers, int64 ``[K]``."""
        found: np.ndarray = philox.uniforms(self._keys(clients), round, count).numpy()
        return found.astype(np.float64)

    def normals(self, clients: np.ndarray, round: int, count: int = 1) -> np.ndarray:
        """Of N(0, 1), float64 ``[K, count]``."""
        found: np.ndarray = philox.normals(self._keys(clients), round, count).numpy()
        return found.astype(np.float64)

    def _keys(self, clients: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(clients.astype(np.int64)) + self._key


def shuffled(draws: Draws, count: int) -> np.ndarray:
    """The numbers 0 to ``count - 1`` in random order, int64 ``[count]``."""
    return np.argsort(draws.uniforms(np.arange(count), 0)[:, 0], kind="stable")
