"""Which groups go: the lowest scores among those that are left, to an exact number per part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedpeft.pruning.structure import Part
from fedpeft.tree import Tree

LEAST = {"heads": 1, "channels": 8}
"""Groups that every part keeps."""


def after(gone: Tensor, step: Tensor, goal: float) -> Tensor:
    """The share that is gone when ``step`` of what is left goes, at most ``goal``; elementwise.

    ``min(goal, 1 - (1 - gone)(1 - step))``.
    """
    return (1 - (1 - gone) * (1 - step)).clamp(max=goal)


def cubic(done: float, goal: float) -> float:
    """The share that is gone when the share ``done`` of a run is over, without a bandit.

    Nothing in the first tenth, ``goal`` in the last, between them ``goal - goal (1 - x)^3``.
    """
    x = min(max((done - 0.1) / 0.8, 0.0), 1.0)
    return goal - goal * (1 - x) ** 3


def number(part: Part, share: Tensor) -> Tensor:
    """How many of a part's groups are gone at ``share`` ``[K]``: the floor, within the least."""
    most = max(part.groups - LEAST[part.kind], 0)
    return (share * part.groups + 1e-9).floor().long().clamp(max=most)


def prune(parts: Sequence[Part], alive: Tree, score: Tree, share: Tensor) -> Tree:
    """What is left, part -> bool ``[K, G]``, when ``share`` ``[K]`` of each part's groups is gone.

    What was gone stays gone; of the others the lowest scores go, of equal ones the first. Scores
    that are not finite count as 0.
    """
    found = {}
    for part in parts:
        there = alive[part.name].bool()
        own = torch.nan_to_num(score[part.name], 0.0, 0.0, 0.0).to(there.device)
        order = own.masked_fill(~there, -torch.inf).argsort(dim=1, stable=True)
        rank = order.argsort(dim=1)
        gone = number(part, share.to(there.device))
        found[part.name] = there & (rank >= gone[:, None])
    return found


def at_once(parts: Sequence[Part], scores: Tree, shares: Mapping[str, float]) -> Tree:
    """What is left of a whole model, part -> bool ``[G]``, when ``shares`` (by kind) go at once.

    scores: part -> ``[G]``.
    """
    found: Tree = {}
    for part in parts:
        whole = {part.name: torch.ones(1, part.groups, dtype=torch.bool)}
        share = torch.tensor([shares[part.kind]], dtype=torch.float64)
        found |= prune([part], whole, {part.name: scores[part.name][None]}, share)
    return {name: own[0] for name, own in found.items()}


def lowest(values: Tree, share: float) -> Tree:
    """Which entries stay when the lowest ``share`` of all together go: exactly the floor of it.

    Of equal ones the first go, in the order of names. Bool, in the shapes of ``values``.
    """
    names = sorted(values)
    flat = torch.cat([values[name].flatten().double() for name in names])
    gone = int(share * len(flat) + 1e-9)
    stay = torch.ones(len(flat), dtype=torch.bool)
    stay[flat.argsort(stable=True)[:gone]] = False
    parts = stay.split([values[name].numel() for name in names])
    return {n: own.view(values[n].shape) for n, own in zip(names, parts, strict=True)}
