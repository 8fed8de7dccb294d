"""Trees: named tensors with canonical (sorted) names, and their arithmetic.

A tree holds trainable tensors only. A *stacked* tree carries a leading client dimension:
every tensor is ``[K, *shape]``. The functions here refuse operands whose names, shapes or dtypes
differ; they return new trees and never write into their arguments.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Tree = dict[str, Tensor]


def sort(tree: Mapping[str, Tensor]) -> Tree:
    """The same tensors under sorted names."""
    return {name: tree[name] for name in sorted(tree)}


def check_same(left: Tree, right: Tree, what: str = "trees") -> None:
    """Raises ValueError that names the first difference in names, shapes or dtypes."""
    if left.keys() != right.keys():
        missing = sorted(left.keys() - right.keys())[:3]
        extra = sorted(right.keys() - left.keys())[:3]
        raise ValueError(f"{what} differ in names: missing {missing}, unexpected {extra}")
    for name, tensor in left.items():
        other = right[name]
        if tensor.shape != other.shape:
            raise ValueError(
                f"{what} differ at {name!r}: shape {tuple(tensor.shape)} and {tuple(other.shape)}"
            )
        if tensor.dtype != other.dtype:
            raise ValueError(f"{what} differ at {name!r}: dtype {tensor.dtype} and {other.dtype}")


def _zip(fn: Callable[[Tensor, Tensor], Tensor], left: Tree, right: Tree) -> Tree:
    check_same(left, right)
    return {name: fn(left[name], right[name]) for name in left}


def add(left: Tree, right: Tree) -> Tree:
    """Elementwise ``left + right``."""
    return _zip(torch.add, left, right)


def sub(left: Tree, right: Tree) -> Tree:
    """Elementwise ``left - right``."""
    return _zip(torch.sub, left, right)


def scale(tree: Tree, factor: float) -> Tree:
    """Every tensor times ``factor``."""
    return {name: tensor * factor for name, tensor in tree.items()}


def zeros_like(tree: Tree) -> Tree:
    """A tree of zeros of the same names, shapes and dtypes."""
    return {name: torch.zeros_like(tensor) for name, tensor in tree.items()}


def norm(tree: Tree) -> float:
    """Euclidean norm over all entries, accumulated in float64."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tree.values()))


def numel(tree: Tree) -> int:
    """Number of entries."""
    return sum(t.numel() for t in tree.values())


def stack(trees: Sequence[Tree]) -> Tree:
    """K trees as one stacked tree, ``[K, *shape]`` each. Raises ValueError on any difference."""
    for other in trees[1:]:
        check_same(trees[0], other)
    return {name: torch.stack([t[name] for t in trees]) for name in trees[0]}


def broadcast(tree: Tree, clients: int) -> Tree:
    """The tree for ``clients`` clients as views ``[K, *shape]`` that share one storage."""
    return {name: t.unsqueeze(0).expand(clients, *t.shape) for name, t in tree.items()}


def pad(tree: Tree, like: Tree) -> Tree:
    """The tree with zeros appended up to the shapes of ``like``, so that unequal ranks stack.

    For LoRA of rank q < r this is exact: with rows q.. of A and columns q.. of B zero, both get
    zero gradients, and stay zero under SGD and AdamW, with the factor s of rank r. Raises
    ValueError where names or numbers of dimensions differ, or a tensor is larger.
    """
    if tree.keys() != like.keys():
        check_same(tree, like)
    found = {}
    for name, tensor in tree.items():
        shape, size = tuple(tensor.shape), tuple(like[name].shape)
        if len(shape) != len(size) or any(a > b for a, b in zip(shape, size, strict=True)):
            raise ValueError(f"{name!r} of shape {shape} cannot be padded to {size}")
        found[name] = tensor.new_zeros(size)
        found[name][tuple(slice(n) for n in shape)] = tensor
    return found


def crop(tree: Tree, like: Tree) -> Tree:
    """The leading part of every tensor in the shapes of ``like``: what ``pad`` added is cut off."""
    return {
        name: tensor[tuple(slice(n) for n in like[name].shape)] for name, tensor in tree.items()
    }


def row(stacked: Tree, k: int) -> Tree:
    """Client ``k``'s tree, as views."""
    return {name: t[k] for name, t in stacked.items()}


def rows(stacked: Tree, index: Sequence[int]) -> Tree:
    """The stacked tree of the clients in ``index``; what all clients share stays one copy."""
    where = torch.as_tensor(list(index), dtype=torch.long)
    return {
        name: t[:1].expand(len(where), *t.shape[1:])
        if shared(t)
        else t.index_select(0, where.to(t.device))
        for name, t in stacked.items()
    }


def shared(stacked: Tensor) -> bool:
    """Whether the rows of ``[K, *shape]``, K > 1, are views of one tensor, as of ``broadcast``."""
    return len(stacked) > 1 and stacked.stride(0) == 0


def select(tree: Tree, keep: Callable[[str], bool]) -> Tree:
    """The sub-tree of the names that ``keep`` accepts."""
    return {name: t for name, t in tree.items() if keep(name)}


def finite_rows(stacked: Tree) -> Tensor:
    """Which clients of a stacked tree hold only finite numbers: bool ``[K]``."""
    flags = [torch.isfinite(t).unsqueeze(-1).flatten(1).all(dim=1) for t in stacked.values()]
    return torch.stack(flags).all(dim=0)


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a tree lies in one flat vector of ``size`` numbers.

    A cohort's state is one matrix ``[K, size]``; ``unpack`` gives views per tensor, so optimizers,
    clipping and averaging are single operations on the matrix.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(tree: Tree) -> Layout:
        """The layout of an unstacked tree."""
        names = tuple(sorted(tree))
        return Layout(names, tuple(tuple(tree[name].shape) for name in names))

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers per tensor."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """Numbers in all."""
        return sum(self.sizes)

    @property
    def digest(self) -> str:
        """A short hash of names and shapes; parties with equal digests mean the same tensors."""
        text = repr(list(zip(self.names, self.shapes, strict=True)))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def pack(self, stacked: Tree) -> Tensor:
        """A stacked tree as one new matrix ``[K, size]``. Raises ValueError on other names."""
        if tuple(sorted(stacked)) != self.names:
            check_same(
                dict.fromkeys(self.names, torch.empty(0)), dict.fromkeys(stacked, torch.empty(0))
            )
        return torch.cat([stacked[name].unsqueeze(-1).flatten(1) for name in self.names], dim=1)

    def unpack(self, matrix: Tensor) -> Tree:
        """Views ``[K, *shape]`` into a matrix ``[K, size]``; differentiable, one backward op."""
        parts = torch.split(matrix, self.sizes, dim=1)
        return {
            name: part.view(matrix.shape[0], *shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }


class RunningMean:
    """A weighted mean of trees that arrive in stacks: float64 sums, one cast at the end.

    Memory is one tree, however many clients come. Weights are relative; they are normalised by
    their sum. Clients are added one stack after another in the caller's order.
    """

    def __init__(self) -> None:
        self._sum: Tree | None = None
        self._like: Tree = {}
        self._weight = 0.0

    def add(self, stacked: Tree, weights: Tensor) -> None:
        """Adds K clients: ``stacked`` is ``[K, *shape]``, ``weights`` is ``[K]``, non-negative."""
        one = row(stacked, 0)
        if self._sum is None:
            self._like = {n: torch.empty_like(t, device="meta") for n, t in one.items()}
            self._sum = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in one.items()}
        check_same(self._like, one)
        for name, tensor in stacked.items():
            w = weights.to(tensor.device, torch.float64)
            self._sum[name] += torch.tensordot(w, tensor.double(), dims=1)
        self._weight += float(weights.double().sum())

    def result(self) -> Tree:
        """The mean in the dtype of what was added, on the CPU, where a strategy's state is.

        Raises ValueError if nothing has weight.
        """
        if self._sum is None or not self._weight > 0:
            raise ValueError(f"the mean of no clients is undefined: total weight {self._weight}")
        return {n: (s / self._weight).to(self._like[n].dtype).cpu() for n, s in self._sum.items()}


def mean(stacks: Iterable[tuple[Tree, Tensor]]) -> Tree:
    """The weighted mean over ``(stacked tree, weights [K])`` pairs; see RunningMean."""
    running = RunningMean()
    for stacked, weights in stacks:
        running.add(stacked, weights)
    return running.result()
