"""Clients of unequal LoRA ranks: who has which, and how a lower rank runs in a model of rank r.

A client of rank q trains, sends and receives the first q rows of A and columns of B, and nothing
else: the rest does not exist for it. Inside the model, whose adapter has rank r, they are zeros,
which is exact: with the same s = alpha / r for everybody, W + s B A is the client's own model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedpeft.errors import FedpeftError
from fedpeft.lowrank import is_a, is_b
from fedpeft.message import Messages, Replies
from fedpeft.strategy import Problem
from fedpeft.streams import numpy_stream
from fedpeft.tree import Tree

T = TypeVar("T")


def full_rank(initial: Tree) -> int:
    """The largest rank of the model's LoRA layers."""
    return max(len(value) for name, value in initial.items() if is_a(name))


def chosen(initial: Tree, ranks: Sequence[int]) -> tuple[int, ...]:
    """The ranks to choose from, ascending: those given, or 2, 4, 8, ... and the full one.

    Raises FedpeftError for a rank outside [1, r].
    """
    full = full_rank(initial)
    for rank in ranks:
        _check_rank(rank, full)
    return tuple(sorted(ranks)) or (*(2**k for k in range(1, 16) if 2**k < full), full)


def _check_rank(rank: int, full: int) -> None:
    if not 1 <= rank <= full:
        raise FedpeftError(
            f"strategy.ranks has {rank}, but ranks lie between 1 and adapter.r={full}: the "
            f"model must hold the largest. Raise adapter.r, or lower the rank."
        )


def assign(problem: Problem, ranks: Sequence[int], of_client: Mapping[str, int]) -> dict[str, int]:
    """Each client's rank: as ``of_client`` says, else drawn from ``ranks`` by the run's seed.

    Every rank in the list goes to the same number of clients, up to one; a rank that is listed
    twice to twice as many. Both empty: everybody has the full rank. Raises FedpeftError for a rank
    outside [1, r] and for clients that do not exist.
    """
    full = full_rank(problem.initial)
    for rank in (*ranks, *of_client.values()):
        _check_rank(rank, full)
    return deal(problem, list(ranks) or [full], of_client, "ranks")


def deal(
    problem: Problem, values: Sequence[T], of_client: Mapping[str, T], what: str
) -> dict[str, T]:
    """Each client's value: as ``of_client`` says, else drawn from ``values`` by the run's seed.

    Every value in the list goes to the same number of clients, up to one; one that is listed twice
    to twice as many. what: the plural in the setting's name, and the stream's. Raises FedpeftError
    for clients that do not exist.
    """
    names = sorted(problem.clients)
    unknown = sorted(set(of_client) - set(names))
    if unknown:
        raise FedpeftError(
            f"strategy.client_{what} names {unknown[0]!r}, which is no client: the clients are "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}."
        )
    others = [name for name in names if name not in of_client]
    order = numpy_stream(problem.seed, what).permutation(len(others))
    drawn = {others[k]: values[i % len(values)] for i, k in enumerate(order.tolist())}
    return drawn | dict(of_client)


def lead(adapter: Tree, rank: int, dim: int = 0) -> Tree:
    """The first ``rank`` rows of A and columns of B, as views; other tensors as they are.

    dim: how many leading dimensions come before (1 for stacked trees).
    """
    found = {}
    for name, value in adapter.items():
        if is_a(name):
            value = value.narrow(dim, 0, min(rank, value.shape[dim]))
        elif is_b(name):
            value = value.narrow(dim + 1, 0, min(rank, value.shape[dim + 1]))
        found[name] = value
    return found


def widen(like: Tree) -> Callable[[Tree], Tree]:
    """``Cohort.fit``'s ``expand`` for clients of lower rank: zeros up to the shapes of ``like``.

    like: the model's own tensors, unstacked. Works on any stacked tree; differentiable.
    """

    def expand(trained: Tree) -> Tree:
        found = {}
        for name, value in trained.items():
            if is_a(name):
                value = pad(value, (0, 0, 0, len(like[name]) - value.shape[1]))
            elif is_b(name):
                value = pad(value, (0, like[name].shape[1] - value.shape[2]))
            found[name] = value
        return found

    return expand


def padded(replies: Replies, tree: str, like: Tree) -> Iterator[Messages]:
    """Replies of unequal ranks with their factors widened to ``like``'s, so that they stack."""
    expand = widen(like)
    for reply in replies:
        wide = {**reply.trees, tree: expand(reply.trees[tree])}
        yield Messages(reply.clients, wide, reply.scalars, reply.blobs)


def tail(name: str, value: Tensor, cut: int) -> Tensor:
    """A stacked factor, all but A[cut:, :] or B[:, cut:] set to zero; zero for other tensors."""
    found = torch.zeros_like(value)
    if is_a(name):
        found[:, cut:] = value[:, cut:]
    elif is_b(name):
        found[:, :, cut:] = value[:, :, cut:]
    return found


def tails(adapter: Tree, cut: int) -> tuple[Tensor, Tensor]:
    """The norms ``[K]`` of all A[cut:, :] together, and of all B[:, cut:]."""
    squares = {n: tail(n, v, cut).square().flatten(1).sum(1) for n, v in adapter.items()}
    down, up = ([s for n, s in squares.items() if own(n)] for own in (is_a, is_b))
    return torch.stack(down).sum(0).sqrt(), torch.stack(up).sum(0).sqrt()


def penalty_gradient(adapter: Tree, cut: int) -> Tree:
    """The gradient of ||A[cut:, :]|| ||B[:, cut:]||; zero by a tail that is zero itself."""
    down, up = tails(adapter, cut)
    by_a = torch.where(down > 0, up / down.clamp(min=1e-30), 0.0)
    by_b = torch.where(up > 0, down / up.clamp(min=1e-30), 0.0)
    return {
        name: (by_a if is_a(name) else by_b)[:, None, None] * tail(name, value, cut)
        for name, value in adapter.items()
        if is_a(name) or is_b(name)
    }
