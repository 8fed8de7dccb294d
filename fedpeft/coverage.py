"""Means over clients that each trained a part of the tensors, and how well the parts covered them.

Client k has values x_k, garbage where its mask m_k is 0, and weight w_k. Entry by entry:

- ``mean``: sum_k w_k m_k x_k / sum_k w_k m_k, over the clients that trained the entry;
- ``fill``: old + sum_k w_k m_k (x_k - old) / sum_k w_k: the others vote for the old value.

What nobody trained keeps its old bits. Zhou et al., NeurIPS 2023 (arXiv 2310.08670), bound the
error of such training by delta^2 / Gamma_min: Gamma_min is the fewest clients that any entry had in
a round (``least``), delta^2 the share of the squared weights that masks take away (``reduction``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedpeft.lowrank import is_a, is_b, squared_norms
from fedpeft.tree import Tree, check_same, row


class Coverage:
    """Masked sums of clients that come in stacks: float64, cast once. Memory is three trees.

    old: what entries keep that nobody trained. Results are on its device.
    """

    def __init__(self, old: Tree) -> None:
        self._old = old
        self._sum = {n: torch.zeros_like(x, dtype=torch.float64) for n, x in old.items()}
        self._weight = {n: torch.zeros_like(x) for n, x in self._sum.items()}
        self._count: dict[str, Tensor] = {}
        self._all = 0.0

    def add(self, stacked: Tree, masks: Tree, weights: Tensor) -> None:
        """K clients: values and masks (bool) ``[K, *shape]``, weights ``[K]``, positive.

        A tensor without a mask was trained by all, and is not in ``least`` and ``histogram``.
        Raises ValueError where names, shapes or dtypes are not those of ``old``.
        """
        check_same(self._old, row(stacked, 0), "the old tensors and a client's")
        self._all += float(weights.double().sum())
        for name, value in stacked.items():
            old, w = self._old[name], weights.to(value.device, torch.float64)
            mask = masks.get(name)
            if mask is None:
                self._weight[name] += float(weights.double().sum())
            else:
                mask = mask.to(value.device)
                value = torch.where(mask, value, 0)  # never 0 * NaN
                self._weight[name] += torch.tensordot(w, mask.double(), dims=1).to(old.device)
                count = self._count.setdefault(name, torch.zeros_like(old, dtype=torch.int32))
                count += mask.sum(0, dtype=torch.int32).to(old.device)
            self._sum[name] += torch.tensordot(w, value.double(), dims=1).to(old.device)

    def mean(self) -> Tree:
        """Each entry's mean by weight over the clients that trained it."""
        return {
            name: torch.where(w > 0, (self._sum[name] / w).to(self._old[name]), self._old[name])
            for name, w in self._weight.items()
        }

    def fill(self) -> Tree:
        """Each entry's mean by weight over all clients, the old value standing for the absent."""
        found = {}
        for name, w in self._weight.items():
            old = self._old[name].double()
            filled = old + (self._sum[name] - w * old) / self._all
            found[name] = torch.where(w > 0, filled.to(self._old[name]), self._old[name])
        return found

    def least(self) -> int:
        """Gamma_min: the fewest clients that trained one and the same entry."""
        return min(int(count.min()) for count in self._count.values())

    def histogram(self, clients: int) -> list[int]:
        """How many entries were trained by 0, 1, ..., ``clients`` clients, who were all."""
        found = [torch.bincount(c.flatten(), minlength=clients + 1) for c in self._count.values()]
        return [int(entries) for entries in torch.stack(found).sum(0)]


def reduction(old: Tree, masks: Tree) -> Tensor:
    """delta^2 of each client: ||x - m x||^2 / ||x||^2 over the tensors in ``masks``, ``[K]``.

    float64; 0 where x is 0 itself.
    """
    whole = torch.stack([old[name].double().square().sum() for name in masks]).sum()
    gone = [
        torch.where(mask, 0, old[name].double().square()).flatten(1).sum(1)
        for name, mask in masks.items()
    ]
    return _share(torch.stack(gone).sum(0), whole)


def update_reduction(old: Tree, masks: Tree, scaling: Mapping[str, float]) -> Tensor:
    """The same on the dense updates W = s B A of all LoRA layers: ||W - W_m||^2 / ||W||^2, ``[K]``.

    W_m is made of the masked factors. No dense matrix is formed: W - W_m = s [B, -m B] [A; m A].
    """
    both = {}
    for name, mask in masks.items():
        one = old[name].double().expand(mask.shape)
        part = torch.where(mask, one, 0)
        if is_a(name):
            both[name] = torch.cat([one, part], dim=1)
        elif is_b(name):
            both[name] = torch.cat([one, -part], dim=2)
    whole = squared_norms({name: old[name][None] for name in both}, scaling)[0]
    return _share(squared_norms(both, scaling).clamp(min=0), whole)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole if bool(whole > 0) else torch.zeros_like(part)
