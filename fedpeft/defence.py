"""Robust rules and simulated attacks at the seam: what one round's updates become on the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedpeft.attacks.settings import Attack
from fedpeft.attacks.tampering import tamper
from fedpeft.errors import FedpeftError
from fedpeft.lowrank import is_a
from fedpeft.message import Messages, Replies
from fedpeft.postprocess import Postprocessor, applied, flat, unflat, updates
from fedpeft.robust.distances import product_distances, squared_distances
from fedpeft.robust.rules import combine
from fedpeft.robust.settings import Robust
from fedpeft.tree import Layout, Tree, row, shared

Root = Callable[[Messages], Messages]
"""What the server's own training makes of what it sent (one row): a reply (one row)."""


@dataclass
class RobustRule(Postprocessor):
    """One update in place of the mean of a round's; see ``fedpeft.robust``.

    root: of ``fltrust``, which compares every update with the server's own. scaling: LoRA layer ->
    s, for distances between products.
    """

    settings: Robust
    root: Root | None = None
    scaling: Mapping[str, float] = field(default_factory=dict)
    individual: bool = True

    def enter(
        self, sent: Sequence[Messages], like: Mapping[str, Tree], replies: Replies
    ) -> Iterator[Messages]:
        found = list(replies)
        if not found:
            return
        one = start_of(sent)
        layout = Layout.of(flat(like))
        rows = torch.cat([_rows(one, reply, layout) for reply in found])
        weights = torch.cat([reply.scalars["weight"] for reply in found])
        own = None
        if self.root is not None:
            own = _rows(one, self.root(one), layout)[0]
        apart = None
        if self.settings.space == "product":
            apart = self._apart(like, found)
        moved = combine(self.settings, rows, weights, own, apart)
        yield _as_reply(one, moved, layout, like, float(weights.sum()))

    def _apart(self, like: Mapping[str, Tree], found: Sequence[Messages]) -> Tensor:
        """Squared distances ``[n, n]`` between what the replies' adapters do, and their heads."""
        flat_ = [flat(reply.trees) for reply in found]
        whole = {name: torch.cat([one[name].cpu() for one in flat_]) for name in flat(like)}
        pairs = {n.split(".lora_A.")[0]: (n, n.replace(".lora_A.", ".lora_B.")) for n in whole}
        pairs = {layer: p for layer, p in pairs.items() if is_a(p[0]) and p[1] in whole}
        if not pairs or any("lora_" in n and n not in sum(pairs.values(), ()) for n in whole):
            raise FedpeftError(
                "robust.space=product compares products B A, and this strategy's replies do not "
                "hold both factors of every layer: set robust.space=factors."
            )
        scaling = {layer: self.scaling[layer.split("/")[-1]] for layer in pairs}
        total = product_distances({n: (whole[a], whole[b]) for n, (a, b) in pairs.items()}, scaling)
        rest = {name: value for name, value in whole.items() if "lora_" not in name}
        if rest:
            total = total + squared_distances(Layout.of(row(rest, 0)).pack(rest).double())
        return total


@dataclass
class Attackers(Postprocessor):
    """The malicious clients ``names`` of a simulation; see ``fedpeft.attacks``.

    All of a round's are seen at once, as those who collude see each other.
    """

    attack: Attack
    names: frozenset[str]
    seed: int
    individual: bool = True
    rounds: int = 0

    def memory(self) -> dict[str, Tree]:
        return {"rounds": {"count": torch.tensor(self.rounds)}}

    def restore(self, memory: Mapping[str, Tree]) -> None:
        if "rounds" in memory:
            self.rounds = int(memory["rounds"]["count"])

    def enter(
        self, sent: Sequence[Messages], like: Mapping[str, Tree], replies: Replies
    ) -> Iterator[Messages]:
        found, self.rounds = list(replies), self.rounds + 1
        if self.attack.kind == "label_flip" or not found:
            yield from found
            return
        one, layout = start_of(sent), Layout.of(flat(like))
        names = [name for reply in found for name in reply.clients]
        rows = torch.cat([_rows(one, reply, layout) for reply in found])
        bad = [k for k, name in enumerate(names) if name in self.names]
        if bad:
            who = [names[k] for k in bad]
            rows[bad] = tamper(self.attack, rows[bad], who, len(names), self.seed, self.rounds)
        at = 0
        for reply in found:
            trees = _trees(one, rows[at : at + len(reply)], layout, like)
            yield Messages(reply.clients, trees, reply.scalars, reply.blobs)
            at += len(reply)


def start_of(sent: Sequence[Messages]) -> Messages:
    """What all clients were sent, as one row. Raises FedpeftError where it is not the same."""
    stack = sent[0]
    alike = all(shared(value) for tree in stack.trees.values() for value in tree.values())
    if len(sent) > 1 or not (len(stack) == 1 or alike):
        raise FedpeftError(
            "robust.rule and attack need a strategy that sends all clients the same: updates from "
            "different starts cannot be compared. Use another strategy."
        )
    return stack.rows([0])


def _rows(one: Messages, reply: Messages, layout: Layout) -> Tensor:
    """Updates ``[K, P]``, float64, on the CPU."""
    return layout.pack(flat(updates(one, reply))).cpu()


def _trees(
    one: Messages, rows: Tensor, layout: Layout, like: Mapping[str, Tree]
) -> dict[str, Tree]:
    """Replies' trees from updates ``[K, P]``."""
    made = applied(one, unflat(layout.unpack(rows), like))
    return {
        part: {name: value.to(like[part][name].dtype) for name, value in tree.items()}
        for part, tree in made.items()
    }


def _as_reply(
    one: Messages, moved: Tensor, layout: Layout, like: Mapping[str, Tree], weight: float
) -> Messages:
    trees = _trees(one, moved[None], layout, like)
    return Messages(("rule",), trees, {"weight": torch.tensor([weight], dtype=torch.float64)})
