"""Whether training fits into a device's memory, and what is done where it does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Action = Literal["ignore", "reject", "accumulate", "checkpoint"]

USABLE = 0.9
"""Share of a device's memory that training may take."""


@dataclass(frozen=True)
class Footprint:
    """What a model's training keeps, to be had for any batch.

    frozen, trained: numbers. width, layers, heads: of the model. size: bytes of a number.
    """

    frozen: int
    trained: int
    width: int
    layers: int
    heads: int
    size: int = 4

    def bytes(
        self,
        batch: np.ndarray | float,
        tokens: np.ndarray | float,
        checkpointing: bool = False,
        adapter: np.ndarray | float = 1.0,
    ) -> np.ndarray:
        """Of weights, gradients, AdamW's moments, error feedback and activations.

        Activations of a layer are ``T b D (34 + 5 heads T / D) size / 2`` (Korthikanti et al.,
        arXiv 2205.05198); with checkpointing the layers' inputs and one layer's.
        """
        layer = tokens * batch * self.width * (34 + 5 * self.heads * tokens / self.width)
        layer = layer * self.size / 2
        kept = layer * self.layers
        if checkpointing:
            kept = tokens * batch * self.width * self.layers * self.size + layer
        own = adapter * self.trained * (self.size + 4 + 8 + 4)
        found: np.ndarray = np.float64(self.frozen * self.size) + np.asarray(own + kept)
        return found


@dataclass(frozen=True)
class Fit:
    """Of each client ``[K]``: whether it can train; with checkpointing; in batches how small."""

    possible: np.ndarray
    checkpointing: np.ndarray
    batch: np.ndarray

    @property
    def adapted(self) -> np.ndarray:
        """Who trains in another way than the recipe says, bool ``[K]``."""
        smaller = self.batch < self.batch.max(initial=0)
        found: np.ndarray = (self.checkpointing | smaller) & self.possible
        return found


def fit(
    footprint: Footprint, batch: int, tokens: np.ndarray, have: np.ndarray, action: Action
) -> Fit:
    """What clients with ``have`` bytes do; tokens: of their longest example, ``[K]`` each.

    ``reject``: they never train. ``accumulate``: batches are halved until they fit, and as many
    gradients added up. ``checkpoint``: activations are computed twice.
    """
    room = USABLE * have
    plain = footprint.bytes(batch, tokens) <= room
    again, sizes = np.zeros(len(have), bool), np.full(len(have), batch)
    if action == "ignore":
        return Fit(np.ones(len(have), bool), again, sizes)
    if action == "checkpoint":
        again = ~plain & (footprint.bytes(batch, tokens, True) <= room)
    elif action == "accumulate":
        wide = ~plain
        while wide.any() and sizes[wide].max() > 1:
            sizes[wide] = np.maximum(1, sizes[wide] // 2)
            wide &= footprint.bytes(sizes, tokens) > room
        plain = footprint.bytes(sizes, tokens) <= room
    return Fit(plain | again, again, sizes)
