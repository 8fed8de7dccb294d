"""S-UCB: upper confidence bounds that forget and smooth, over a grid of arms or a tree of cells.

The bandit of FedSpine (Yao et al., arXiv 2501.02438), whose formula is not public: this is a
completion of what is known of it, built on discounted UCB (Garivier and Moulines, arXiv 0805.3415).
An arm is a point (u, v) of the unit square; what u and v mean is for whoever plays (a pruning ratio
and a rank, or v alone: a rank, a codec's density). All arms of one agent are one float64 table::

    [M, 6]    u from, u to, v from, v to, plays, rewards

A grid's arms are cells of no extent. A tree begins with the whole square; a cell that was played is
cut in half along its longer side until that is at most ``finest``. The half with the point that was
played takes over the statistics, the other begins without any and learns from its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fedpeft.errors import FedpeftError

T = TypeVar("T")

PLAYS, REWARDS = 4, 5
"""Columns of a table."""

UNPLAYED = 1e-6
"""An arm with fewer plays, smoothed, is tried before all others."""


@dataclass(frozen=True)
class Rule:
    """How an agent learns.

    decay: what a play counts for one round later, in (0, 1]; 1 never forgets. explore: weight c of
    the confidence term. bandwidth: h of the Gaussian kernel by which arms learn from each other, 0
    for each alone. plays, reward: pseudo-plays of every arm and what each of them brought. finest:
    side of a cell that is not cut any more.
    """

    decay: float = 0.98
    explore: float = 0.02
    bandwidth: float = 0.3
    plays: float = 0.0
    reward: float = 0.5
    finest: float = 1 / 3

    def __post_init__(self) -> None:
        least = min(self.explore, self.bandwidth, self.plays)
        if not (0 < self.decay <= 1 and least >= 0 and 0 < self.finest <= 1):
            raise FedpeftError(
                f"bandit: decay={self.decay} must be in (0, 1], explore={self.explore}, "
                f"bandwidth={self.bandwidth} and plays={self.plays} from 0 up, "
                f"finest={self.finest} in (0, 1]."
            )


@dataclass(frozen=True)
class Arm:
    """What was chosen: a row of the table, and the point in it that is played."""

    cell: int
    u: float
    v: float


def grid(levels: Sequence[float], choices: int) -> Tensor:
    """The table of all pairs of a level of u and one of ``choices`` equal intervals of v.

    v is the middle of its interval. Arms are ordered by u, then by v.
    """
    rows = [
        (u, u, (j + 0.5) / choices, (j + 0.5) / choices) for u in levels for j in range(choices)
    ]
    return torch.tensor([(*row, 0.0, 0.0) for row in rows], dtype=torch.float64)


def tree() -> Tensor:
    """The table of one cell, the whole square."""
    return torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)


def pick(options: Sequence[T], v: float) -> T:
    """The option in whose interval v lies: ``options[floor(v n)]``, the last one at v = 1."""
    return options[min(int(v * len(options)), len(options) - 1)]


def index(table: Tensor, rule: Rule) -> Tensor:
    """The upper confidence bound of every arm, ``[M]``; infinite where nothing is known.

    ``N = k n + n0``, ``S = k s + n0 R0``, ``U = S / N + c sqrt(2 ln max(e, sum n) / N)`` with n
    plays, s rewards and the kernel ``k(a, b) = exp(-||a - b||^2 / 2 h^2)`` of cells' centres.
    """
    plays, rewards = table[:, PLAYS], table[:, REWARDS]
    total = max(math.e, float(plays.sum()))
    if rule.bandwidth > 0:
        centres = (table[:, [0, 2]] + table[:, [1, 3]]) / 2
        apart = (centres[:, None] - centres[None]).square().sum(-1)
        kernel = torch.exp(-apart / (2 * rule.bandwidth**2))
        plays, rewards = kernel @ plays, kernel @ rewards
    plays, rewards = plays + rule.plays, rewards + rule.plays * rule.reward
    known = plays.clamp(min=UNPLAYED)
    bound = rewards / known + rule.explore * (2 * math.log(total) / known).sqrt()
    return torch.where(plays < UNPLAYED, math.inf, bound)


def middle(table: Tensor, still: bool = False) -> Arm:
    """The arm nearest to the middle of the square, the first of several; still: with u = 0."""
    centres = (table[:, [0, 2]] + table[:, [1, 3]]) / 2
    if still:
        centres[:, 0] = torch.where(table[:, 0] == 0, 0.5, math.inf)
    cell = int((centres - 0.5).square().sum(1).round(decimals=9).argmin())
    u, v = ((table[cell, at] + table[cell, at + 1]) / 2 for at in (0, 2))
    return Arm(cell, 0.0 if still else float(u), float(v))


def choose(table: Tensor, rule: Rule, draw: np.random.Generator, still: bool = False) -> Arm:
    """The arm of the largest index, one of several by lot, and a point in it, uniformly.

    still: u has to be 0, so only arms that reach it are there to choose from.
    """
    found = index(table, rule)
    if still:
        found = torch.where(table[:, 0] == 0, found, -math.inf)
    best = torch.nonzero(found == found.max()).flatten().tolist()
    cell = int(best[int(draw.integers(len(best)))])
    lot = draw.uniform(size=2).tolist()
    u, v = (
        float(table[cell, k] + x * (table[cell, k + 1] - table[cell, k]))
        for k, x in zip((0, 2), lot, strict=True)
    )
    return Arm(cell, 0.0 if still else u, v)


def learn(table: Tensor, rule: Rule, arm: Arm, reward: float) -> Tensor:
    """The table after ``arm`` brought ``reward``; all that was known counts ``decay`` as much."""
    found = table.clone()
    found[:, PLAYS:] *= rule.decay
    found[arm.cell, PLAYS] += 1
    found[arm.cell, REWARDS] += reward
    sides = found[arm.cell, [1, 3]] - found[arm.cell, [0, 2]]
    if float(sides.max()) <= rule.finest:
        return found
    return _cut(found, arm, 0 if sides[0] >= sides[1] else 2)


def _cut(table: Tensor, arm: Arm, at: int) -> Tensor:
    """The table with the arm's cell in two halves, along u (at = 0) or v (at = 2)."""
    whole = table[arm.cell]
    halfway = (whole[at] + whole[at + 1]) / 2
    low, high = whole.clone(), whole.clone()
    low[at + 1] = high[at] = halfway
    other = low if (arm.u if at == 0 else arm.v) >= float(halfway) else high
    other[PLAYS:] = 0.0
    return torch.cat([table[: arm.cell], low[None], high[None], table[arm.cell + 1 :]])
