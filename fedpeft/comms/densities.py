"""Densities by bandit: the server orders how much of its update each client sends.

One S-UCB agent per client (``fedpeft.bandits``) chooses among ``comms.up.densities`` anew after
every round: by the fall of the client's loss since it last took part, and by its time relative to
the others', the fleet's where the run has one, else that of a cost model for the bytes it was sent
and sent. Until a client's loss was heard twice there is no fall, and it is ordered the middle one.
The order is a scalar of what the client is sent; it encodes with that, and the server decodes with
what it ordered, not with what a client says. Losses are the clients' own word: who lies about its
own spoils orders, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedpeft.bandits.agents import Agents, Bandits, Policy, seen_of_bytes
from fedpeft.comms.ledger import entries
from fedpeft.comms.payloads import as_bytes
from fedpeft.message import Messages, Replies
from fedpeft.postprocess import Postprocessor
from fedpeft.streams import derive
from fedpeft.tree import Tree

DENSITY = "comms.up.density"
"""The scalar of a request that orders a density."""

LOSS = "loss"
"""The scalar of a reply that agents learn from."""


def groups(sent: Messages) -> list[tuple[float, Tensor]]:
    """Each density that is ordered, and whose it is: int64 ``[k]``, ascending."""
    values, which = torch.unique(sent.scalars[DENSITY], return_inverse=True)
    return [(float(value), (which == n).nonzero()[:, 0]) for n, value in enumerate(values)]


def alike(sent: Messages) -> list[Messages]:
    """A stack cut into such as are ordered one density; as it is where none is ordered."""
    if DENSITY not in sent.scalars:
        return [sent]
    return [sent.rows(at.tolist()) for _, at in groups(sent)]


@dataclass
class Densities(Postprocessor):
    """Orders densities, and learns from what came of them. The client's half is ``Uplink``.

    options: to choose from, ascending. It sees each client's own loss and bytes.
    """

    options: tuple[float, ...]
    seed: int
    individual: bool = field(default=True, init=False)
    tells: tuple[str, ...] = field(default=(LOSS,), init=False)
    bandits: Bandits = field(init=False)
    losses: dict[str, float] = field(default_factory=dict, init=False)
    heard: dict[str, float] = field(default_factory=dict, init=False)
    sizes: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.bandits = Bandits(derive(self.seed, "densities"))

    @property
    def policy(self) -> Policy:
        """Over places in ``options``, whatever their values are."""
        return Policy("grid", tuple(range(len(self.options))), levels=(0.0,))

    def announce(self, sent: Messages) -> Messages:
        _, places = self.bandits.orders(self.policy, sent.clients)
        ordered = torch.tensor(self.options, dtype=torch.float64)[places]
        told = replace(sent, scalars={**sent.scalars, DENSITY: ordered})
        self.sizes |= _sizes(told)
        return told

    def enter(
        self, sent: Sequence[Messages], like: Mapping[str, Tree], replies: Replies
    ) -> Iterator[Messages]:
        self.heard = {}
        for reply in replies:
            self.heard |= zip(reply.clients, reply.scalars[LOSS].tolist(), strict=True)
            self.sizes |= {n: self.sizes[n] + size for n, size in _sizes(reply).items()}
            yield reply

    def arrived(self, clients: Sequence[str]) -> None:
        loss = {name: x for name, x in sorted(self.heard.items()) if math.isfinite(x)}
        falls = {name: self.losses[name] - x for name, x in loss.items() if name in self.losses}
        sizes = torch.tensor([self.sizes[name] for name in falls])
        seen = seen_of_bytes(falls, sizes, self.seed)
        self.bandits = self.bandits.closed(self.policy, seen)
        self.losses |= loss
        self.heard, self.sizes = {}, {}

    def told(self, times: Mapping[str, float]) -> None:
        self.bandits = self.bandits.timed(self.policy, times)

    def memory(self) -> dict[str, Tree]:
        agents, losses = self.bandits.agents, dict(sorted(self.losses.items()))
        numbers = torch.tensor(list(losses.values()), dtype=torch.float64)
        found = {"rounds": {"count": torch.tensor(self.bandits.round)}}
        if losses:
            found["losses"] = {"clients": _text(losses), "losses": numbers}
        if agents.tables:
            names = sorted(agents.tables)
            found["agents"] = {
                "clients": _text(names),
                "tables": torch.stack([agents.tables[name] for name in names]),
                "orders": torch.tensor([agents.orders[n] for n in names], dtype=torch.float64),
            }
        return found

    def restore(self, memory: Mapping[str, Tree]) -> None:
        if "rounds" in memory:
            self.bandits = replace(self.bandits, round=int(memory["rounds"]["count"]))
        if "losses" in memory:
            own = memory["losses"]
            self.losses = dict(zip(_names(own), own["losses"].tolist(), strict=True))
        if "agents" in memory:
            own = memory["agents"]
            orders = [(int(cell), u, v) for cell, u, v in own["orders"].tolist()]
            tables = dict(zip(_names(own), own["tables"], strict=True))
            agents = Agents(tables, dict(zip(tables, orders, strict=True)))
            self.bandits = replace(self.bandits, agents=agents)


def _text(names: Iterable[str]) -> Tensor:
    return as_bytes("\n".join(names).encode())


def _names(tree: Tree) -> list[str]:
    return bytes(tree["clients"].tolist()).decode().split("\n")


def _sizes(messages: Messages) -> dict[str, int]:
    """Bytes of each client's message."""
    return {name: sum(entry.each.values()) for entry in entries(messages) for name in entry.clients}
