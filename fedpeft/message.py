"""What travels: one client's Message, the Messages of K clients stacked, and means over replies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fedpeft import tree as trees_
from fedpeft.tree import Tree


@dataclass(frozen=True)
class Message:
    """What travels to or from one client: named trees, named numbers, opaque payloads.

    One to one with a Flower ``RecordDict``: an ``ArrayRecord`` per tree, one ``MetricRecord`` for
    the scalars, one ``ConfigRecord`` for the blobs.
    """

    trees: Mapping[str, Tree] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    blobs: Mapping[str, bytes] = field(default_factory=dict)


class Coded(Protocol):
    """What a codec made of the trees of K messages: they travel as one payload each.

    The trees beside it hold what the receiver reads in the payloads.
    """

    def sizes(self) -> Mapping[str, Tensor]:
        """Length of each payload by kind: int64 ``[K]``."""

    def rows(self, index: Sequence[int]) -> Coded:
        """Of the messages at ``index``."""

    def payload(self, k: int) -> bytes:
        """The payload of message ``k``."""


PAYLOAD = "payload"
"""The blob in place of a message's trees where a codec has been at work."""


@dataclass(frozen=True)
class Messages:
    """The messages of K named clients, stacked: trees ``[K, *shape]``, scalars ``[K]`` float64.

    Rows are in the order of ``clients``. coded: how the trees travel; None for as they are.
    """

    clients: tuple[str, ...]
    trees: Mapping[str, Tree] = field(default_factory=dict)
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    blobs: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)
    coded: Coded | None = None

    @staticmethod
    def broadcast(
        clients: Sequence[str],
        trees: Mapping[str, Tree],
        scalars: Mapping[str, float] | None = None,
        blobs: Mapping[str, bytes] | None = None,
    ) -> Messages:
        """The same message to every client, as views on one copy (10,000 clients cost one)."""
        k = len(clients)
        return Messages(
            tuple(clients),
            {name: trees_.broadcast(t, k) for name, t in trees.items()},
            {
                n: torch.full((k,), float(v), dtype=torch.float64)
                for n, v in (scalars or {}).items()
            },
            {name: (blob,) * k for name, blob in (blobs or {}).items()},
        )

    @staticmethod
    def stack(clients: Sequence[str], messages: Sequence[Message]) -> Messages:
        """Stacks single messages. Raises ValueError where their names, shapes or dtypes differ."""
        first = messages[0]
        for other in messages[1:]:
            for part in ("trees", "scalars", "blobs"):
                mine, theirs = set(getattr(first, part)), set(getattr(other, part))
                if mine != theirs:
                    raise ValueError(f"messages differ in {part}: {sorted(mine ^ theirs)}")
        return Messages(
            tuple(clients),
            {n: trees_.stack([m.trees[n] for m in messages]) for n in first.trees},
            {
                n: torch.tensor([m.scalars[n] for m in messages], dtype=torch.float64)
                for n in first.scalars
            },
            {n: tuple(m.blobs[n] for m in messages) for n in first.blobs},
        )

    def reply(self, trees: Mapping[str, Tree], **scalars: Tensor) -> Messages:
        """A reply of the same clients: stacked trees, and scalars ``[K]`` such as ``weight``."""
        numbers = {name: v.detach().to("cpu", torch.float64) for name, v in scalars.items()}
        return Messages(self.clients, dict(trees), numbers)

    def to(self, device: torch.device) -> Messages:
        """The messages with their trees on ``device``; scalars stay on the CPU.

        What all clients share stays one copy.
        """
        moved = {
            n: {
                m: x[:1].to(device).expand_as(x) if trees_.shared(x) else x.to(device)
                for m, x in t.items()
            }
            for n, t in self.trees.items()
        }
        return Messages(self.clients, moved, self.scalars, self.blobs, self.coded)

    def __len__(self) -> int:
        return len(self.clients)

    def __getitem__(self, k: int) -> Message:
        return Message(
            {name: trees_.row(t, k) for name, t in self.trees.items()},
            {name: float(v[k]) for name, v in self.scalars.items()},
            {name: v[k] for name, v in self.blobs.items()},
        )

    def travelling(self, k: int) -> Message:
        """The message of client ``k`` as it is sent: with a payload in place of coded trees."""
        one = self[k]
        if self.coded is None:
            return one
        return Message({}, one.scalars, {**one.blobs, PAYLOAD: self.coded.payload(k)})

    def rows(self, index: Sequence[int]) -> Messages:
        """The messages of the clients at ``index``; views where the index is a plain range."""
        at = list(index)
        if at and at == list(range(at[0], at[-1] + 1)):
            part = slice(at[0], at[-1] + 1)
            pick = {n: {m: x[part] for m, x in t.items()} for n, t in self.trees.items()}
        else:
            pick = {n: trees_.rows(t, at) for n, t in self.trees.items()}
        return Messages(
            tuple(self.clients[i] for i in at),
            pick,
            {name: v[at] for name, v in self.scalars.items()},
            {name: tuple(v[i] for i in at) for name, v in self.blobs.items()},
            None if self.coded is None else self.coded.rows(at),
        )

    def split(self, size: int) -> Iterator[Messages]:
        """Consecutive stacks of at most ``size`` clients."""
        for start in range(0, len(self), size):
            yield self.rows(range(start, min(start + size, len(self))))


Replies = Iterable[Messages]
"""Valid replies, stack by stack, in the order of the round's clients. Can be read once."""


def weighted_mean(replies: Replies, tree: str, weight: str = "weight") -> Tree:
    """``sum_k p_k x_k`` of one tree with ``p_k`` proportional to the scalar ``weight``; streams.

    Sums run in float64 and are cast once. Raises ValueError when no reply has weight.
    """
    return trees_.mean((r.trees[tree], r.scalars[weight]) for r in replies)


def noted(replies: Replies, names: list[str]) -> Iterator[Messages]:
    """The same replies; who they are from is added to ``names`` as they are read."""
    for reply in replies:
        names.extend(reply.clients)
        yield reply


def gather(replies: Replies, tree: str, weight: str = "weight") -> tuple[Tree, Tensor]:
    """Every reply's tree as one stack ``[K, *shape]``, and p ``[K]`` (float64, of sum 1).

    For rules that need each client's own tensors: memory is that of all K. Raises ValueError when
    no reply has weight.
    """
    stacks = [(r.trees[tree], r.scalars[weight]) for r in replies]
    found = {name: torch.cat([own[name] for own, _ in stacks]) for name in stacks[0][0]}
    weights = torch.cat([own for _, own in stacks]).double()
    if not bool(weights.sum() > 0):
        raise ValueError(
            f"the mean of no clients is undefined: total weight {float(weights.sum())}"
        )
    return found, weights / weights.sum()
