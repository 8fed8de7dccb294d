"""How much a group matters, from LoRA's gradients alone (LoRAPrune, arXiv 2305.18403).

Of a layer with factors A, B and their gradients the gradient of the merged weight is estimated as
``G = dB A + B dA - dB dA``, and an entry matters by ``|G * (W + s B A)|``: the code of LoRAPrune,
whose paper squares it. A group's score is the sum over its rows and columns in the layers that have
LoRA; a part without any goes by ``|W|``. Scores of a part are scaled to length 1, and averaged
over steps: ``I <- 0.9 I + 0.1 score``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedpeft.pruning.structure import Member, Part, Structure, sides
from fedpeft.tree import Tree

KEPT = 0.9
"""What the average keeps at every step."""

ROWS = 512
"""Rows of a layer, of all clients together, whose estimated gradients are there at a time."""


def estimate(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
    """``dB A + B dA - dB dA``, ``[..., o, i]``, of ``[..., r, i]`` and ``[..., o, r]``."""
    return torch.cat([of_b, b - of_b], dim=-1) @ torch.cat([a, of_a], dim=-2)


def saliency(
    weight: Tensor, scaling: float, factors: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Sums of ``|G * (W + s B A)|`` over each row, ``[K, o]``, and over each column, ``[K, i]``.

    weight ``[o, i]``; factors A ``[K, r, i]`` and B ``[K, o, r]``, and their gradients.
    """
    (a, b), (of_a, of_b) = factors, gradients
    rows, columns = [], torch.zeros(len(a), a.shape[2], dtype=a.dtype, device=a.device)
    for part in torch.arange(len(weight), device=a.device).split(max(1, ROWS // len(a))):
        own = estimate(a, b[:, part], of_a, of_b[:, part])
        own.mul_(torch.baddbmm(weight[part].to(a.dtype), b[:, part], a, alpha=scaling)).abs_()
        rows.append(own.sum(2))
        columns += own.sum(1)
    return torch.cat(rows, dim=1), columns


def scores(structure: Structure, adapter: Tree, gradient: Tree) -> Tree:
    """Part -> scores of its groups ``[K, G]`` of length 1; adapter and gradient are stacked."""
    found: Tree = {}
    for (layer, side), members in sides(structure.parts).items():
        names = [f"{layer}.lora_{x}.default.weight" for x in "AB"]
        if not all(name in gradient for name in names):
            continue
        a, b = (adapter[name] for name in names)
        of_a, of_b = (gradient[name] for name in names)
        weight = structure.weight(layer)
        by_row, by_column = saliency(weight, structure.scaling[layer], (a, b), (of_a, of_b))
        for part, member in members:
            own = _grouped(by_row if side == "rows" else by_column, part, member)
            found[part.name] = found[part.name] + own if part.name in found else own
    clients = len(next(iter(adapter.values())))
    for part in structure.parts:
        if part.name not in found:
            found[part.name] = magnitude(structure, part).expand(clients, -1)
    return {n: v / (v.norm(dim=1, keepdim=True) + 1e-8) for n, v in found.items()}


def magnitude(structure: Structure, part: Part) -> Tensor:
    """The sums of ``|W|`` over a part's groups, ``[1, G]``."""
    found = torch.zeros(1, part.groups)
    for member in part.members:
        weight = structure.weight(member.layer).abs().float()
        sums = weight.sum(1 if member.side == "rows" else 0)
        found = found.to(sums.device) + _grouped(sums[None], part, member)
    return found


def _grouped(sums: Tensor, part: Part, member: Member) -> Tensor:
    """Sums of rows or columns ``[K, n]`` as sums of groups ``[K, G]``."""
    own = sums[:, member.start : member.start + part.groups * member.width]
    return own.reshape(len(own), part.groups, member.width).sum(2)


class Recorder:
    """The clients' averages, kept up at every step of ``Cohort.fit``.

    Give ``adjust`` and ``own`` to ``fit``; ``average`` is part -> ``[K, G]``. A step whose scores
    are not all finite does not count for that client.
    """

    def __init__(self, structure: Structure, start: Tree) -> None:
        self.average = {name: value.clone() for name, value in start.items()}
        clients = len(next(iter(start.values()), torch.zeros(0)))
        self.own = {"client": {"number": torch.arange(clients)[:, None]}}
        self._structure = structure

    @property
    def total(self) -> Tensor:
        """The sum of each client's averages, ``[K]``."""
        return torch.stack([own.sum(1) for own in self.average.values()]).sum(0)

    def adjust(self, gradient: Tree, adapter: Tree, own: Mapping[str, Tree]) -> Tree:
        """Looks at a step's gradient, and gives it back as it is."""
        rows = own["client"]["number"].flatten().cpu()
        found = scores(self._structure, adapter, gradient)
        fine = torch.stack([v.isfinite().all(1) for v in found.values()]).all(0)[:, None]
        for name, value in found.items():
            before = self.average[name][rows]
            after = KEPT * before + (1 - KEPT) * value.to(before)
            self.average[name][rows] = torch.where(fine.to(before.device), after, before)
        return gradient


class RankMeter:
    """How much each rank of LoRA matters, beside what a ``Recorder`` keeps; it is used like one.

    The mean over steps of ``|mean_k A_jk dA_jk| + |mean_o B_oj dB_oj|`` (Light-PEFT, arXiv
    2406.03792). ``average`` has layer -> ``[K, r]`` beside the recorder's. What is not finite
    counts as 0.
    """

    def __init__(self, recorder: Recorder, layers: Mapping[str, int]) -> None:
        self.own = recorder.own
        self._recorder = recorder
        clients = len(recorder.own["client"]["number"])
        self._sums = {layer: torch.zeros(clients, r) for layer, r in layers.items()}
        self._steps = torch.zeros(clients)

    def adjust(self, gradient: Tree, adapter: Tree, own: Mapping[str, Tree]) -> Tree:
        """Looks at a step's gradient, and gives it back as it is."""
        rows = own["client"]["number"].flatten().cpu()
        self._steps[rows] += 1
        for layer, total in self._sums.items():
            a, b = (f"{layer}.lora_{x}.default.weight" for x in "AB")
            found = (adapter[a] * gradient[a]).mean(2).abs()
            found = found + (adapter[b] * gradient[b]).mean(1).abs()
            total[rows] += torch.nan_to_num(found, 0.0, 0.0, 0.0).to(total)
        return self._recorder.adjust(gradient, adapter, own)

    @property
    def average(self) -> Tree:
        """Part -> ``[K, G]``, and layer -> ``[K, r]``."""
        steps = self._steps.clamp(min=1)[:, None]
        ranks = {layer: total / steps for layer, total in self._sums.items()}
        return self._recorder.average | ranks
