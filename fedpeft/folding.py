"""How a change of the frozen base travels, and who has which: the server's book, and following it.

Version v of the base is that of v - 1 plus one update, up down by layer; version 0 is pretrained.
A client keeps the base that it has. What it lacks is sent as the factors of every version that it
missed, or as the whole change since version 0, dense, whichever is smaller::

    trees     fold.V   {LAYER.fold_up: [d_out, q], LAYER.fold_down: [q, d_in]}   for V in the gap
    or        fold     {LAYER.fold_dense: [d_out, d_in]}
    scalars   fold_since, fold_version

A client with an older base than ``fold_since`` is refused: it would train on another model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.strategy import Cohort, Messages, group_by
from fedpeft.tree import Tree, add, numel, row

NAME = "base"
"""Under which clients keep it, see ``Cohort.keep``."""

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""LAYER -> up ``[d_out, q]``, down ``[q, d_in]`` of an update ``up @ down``."""


@dataclass(frozen=True)
class Book:
    """The base as the server has changed it, and what each client has of it; part of a state.

    total: layer -> the dense change since version 0. recent: version -> its update as a tree, for
    the latest versions as long as they are smaller together than ``total``. held: client -> the
    version that it is known to keep, 0 where absent.
    """

    version: int = 0
    total: Tree = field(default_factory=dict)
    recent: dict[int, Tree] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)

    def groups(self, clients: Sequence[str]) -> list[tuple[str, ...]]:
        """The clients by the version that they hold, newest first: each group gets one message."""
        return group_by(clients, lambda client: -self.held.get(client, 0))

    def news(self, clients: Sequence[str]) -> tuple[dict[str, Tree], dict[str, float]]:
        """Trees and scalars that bring these clients, all at one version, to the newest."""
        (since,) = {self.held.get(client, 0) for client in clients}
        gap = range(since + 1, self.version + 1)
        factors = {f"fold.{v}": self.recent[v] for v in gap if v in self.recent}
        size = sum(numel(own) for own in factors.values())
        scalars = {"fold_since": float(since), "fold_version": float(self.version)}
        if len(factors) == len(gap) and size <= numel(self.total):
            return factors, scalars
        return {"fold": {f"{n}.fold_dense": t for n, t in self.total.items()}}, scalars

    def received(self, clients: Iterable[str]) -> Book:
        """These clients have followed to the newest version."""
        return replace(self, held=self.held | dict.fromkeys(clients, self.version))

    def changed(self, update: Factors) -> Book:
        """The next version; the same where the update is empty (q = 0 in every layer)."""
        if all(not down.shape[0] for _, down in update.values()):
            return self
        tree = {f"{n}.fold_up": up for n, (up, _) in update.items()}
        tree |= {f"{n}.fold_down": down for n, (_, down) in update.items()}
        total = _applied(self.total, tree)
        version, recent, size = self.version + 1, {}, 0
        for v, own in sorted({**self.recent, self.version + 1: tree}.items(), reverse=True):
            size += numel(own)
            if size > numel(total):
                break
            recent[v] = own
        return replace(self, version=version, total=total, recent=recent)


def follow(messages: Messages, cohort: Cohort) -> Tree:
    """The base of these clients after the messages: layer -> dense change ``[d_out, d_in]``.

    The clients keep it. Raises FedpeftError for a client whose base is older than the server
    believes: what it missed is not in the messages.
    """
    since, version = (int(messages.scalars[n][0]) for n in ("fold_since", "fold_version"))
    have, base = cohort.kept(NAME, since)
    if have > version:
        raise FedpeftError(
            f"clients {messages.clients[0]!r}, ... keep version {have} of the frozen base, the "
            f"server is at {version}: they belong to another run; start it again from round 1."
        )
    whole = messages.trees.get("fold")
    if whole is not None:
        base = {name.removesuffix(".fold_dense"): t for name, t in row(whole, 0).items()}
    else:
        for v in range(have + 1, version + 1):
            base = _applied(base, row(messages.trees[f"fold.{v}"], 0))
    if version > 0:
        cohort.keep(NAME, version, base)
    return base


def _applied(base: Tree, update: Tree) -> Tree:
    """``base`` plus one version's update."""
    layers = [n.removesuffix(".fold_up") for n in update if n.endswith(".fold_up")]
    dense = {n: update[f"{n}.fold_up"] @ update[f"{n}.fold_down"] for n in layers}
    return add(base, dense) if base else dense
