"""What every client still has, as a server's state can hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedpeft.pruning.schedule import after, number
from fedpeft.pruning.structure import Part, Structure, pack, unpack
from fedpeft.pruning.wire import Plain, parts_of, plain
from fedpeft.tree import Tree


@dataclass(frozen=True)
class Roll:
    """Who lacks what; who is not named has everything.

    parts: of the model. weights: of all its products (``Structure``). gone: client -> the share of
    every part's groups that was ordered to go so far. bits: client -> its groups, as ``pack`` has
    them.
    """

    parts: list[Plain]
    weights: int
    gone: dict[str, float] = field(default_factory=dict)
    bits: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(structure: Structure) -> Roll:
        """Nobody has pruned anything."""
        return Roll(plain(structure.parts), structure.weights)

    @property
    def known(self) -> tuple[Part, ...]:
        """The parts."""
        return parts_of(self.parts)

    def alive(self, clients: Sequence[str]) -> Tree:
        """What these clients have: part -> bool ``[K, G]``."""
        parts = self.known
        one = {p.name: torch.ones(1, p.groups, dtype=torch.bool) for p in parts}
        everything = pack(parts, one)[0]
        return unpack(parts, torch.stack([self.bits.get(c, everything) for c in clients]))

    def before(self, clients: Sequence[str]) -> Tensor:
        """What is gone of these clients' groups, ``[K]`` float64."""
        return torch.tensor([self.gone.get(c, 0.0) for c in clients], dtype=torch.float64)

    def share(self, clients: Sequence[str], steps: Tensor, goal: float) -> Tensor:
        """What is gone when these clients prune ``steps`` ``[K]`` of what is left: ``[K]``."""
        gone = self.before(clients)
        return torch.where(steps > 0, after(gone, steps.double(), goal), gone)

    def accepted(self, alive: Tree, bits: Tensor, share: Tensor) -> tuple[Tree, Tensor]:
        """What clients say that they have left, and whose word is taken: bool ``[K]``.

        bits: as they sent them. Of those who claim groups that had gone, or have not pruned what
        ``share`` says, nothing is taken to have changed.
        """
        parts = self.known
        claimed = unpack(parts, bits.cpu())
        fine = torch.ones(len(share), dtype=torch.bool)
        for part in parts:
            own = claimed[part.name]
            wanted = part.groups - number(part, share)
            fine &= (own.sum(1) == wanted) & ~(own & ~alive[part.name]).any(1)
        left = {n: torch.where(fine[:, None], claimed[n], there) for n, there in alive.items()}
        return left, fine

    def update(self, clients: Sequence[str], left: Tree, gone: Tensor) -> Roll:
        """The roll with what these clients have now; gone: as ``share`` gave it."""
        rows = dict(zip(clients, pack(self.known, left), strict=True))
        shares = dict(zip(clients, gone.tolist(), strict=True))
        pruned = {c: share for c, share in shares.items() if share > 0}
        bits = self.bits | {c: rows[c] for c in pruned}
        return Roll(self.parts, self.weights, self.gone | pruned, bits)

    def figures(self) -> dict[str, float]:
        """Of the clients that have begun to prune: how many, and the mean and least share gone."""
        gone = list(self.gone.values())
        if not gone:
            return {"pruning": 0.0}
        mean = sum(gone) / len(gone)
        return {"pruning": float(len(gone)), "gone_mean": mean, "gone_least": min(gone)}

    def work(self, gone: Tensor) -> Tensor:
        """The share of the products' weights that a client runs, ``[K]``."""
        prunable = sum(p.groups * p.weights for p in self.known) / self.weights
        return 1 - prunable * gone
