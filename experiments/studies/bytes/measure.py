"""Bytes of a client in a round, by width and number of clients, from the messages themselves.

    python experiments/studies/bytes/measure.py

Nothing is trained: a query and a value layer of each width, no head, rank 16, float32. One round of
every strategy is sent and answered by clients that do not move; message sizes are the ledger's.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from fedpeft.comms.ledger import message_bytes
from fedpeft.conformance.play import Played, turn
from fedpeft.conformance.toy import Toy, a_of, b_of
from fedpeft.strategy import build

RANK = 16
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("fedavg", {}),
    "ffa_lora": ("ffa_lora", {}),
    "rolora": ("rolora", {}),
    "fedsvd": ("fedsvd", {}),
    "fedex_lora": ("fedex_lora", {}),
    "flora": ("flora", {}),
    "fedask": ("fedask", {}),
    "fed_sb, random": ("fed_sb", {}),
    "fed_sb, weights": ("fed_sb", {"start": "weights"}),
}


class Layers(Toy):
    """A Toy whose pretrained weights are drawn by shape."""

    def weight(self, layer: str) -> torch.Tensor:
        """A pretrained weight, square."""
        draw = torch.Generator().manual_seed(1)
        width = len(self.initial[b_of(layer)])
        return torch.randn(width, width, generator=draw)


def federation(width: int, clients: int) -> Layers:
    """Clients with two layers of this width."""
    layers = [f"base_model.model.layer.0.{name}" for name in ("query", "value")]
    draw = torch.Generator().manual_seed(0)
    initial = {a_of(n): torch.randn(RANK, width, generator=draw) / width**0.5 for n in layers}
    initial |= {b_of(n): torch.zeros(width, RANK) for n in layers}
    names = [f"client-{k}" for k in range(clients)]
    targets = {
        c: {n: torch.randn(width, width, generator=draw) / width for n in layers} for c in names
    }
    return Layers(
        initial=dict(sorted(initial.items())),
        scaling=dict.fromkeys(layers, 1.0),
        targets=targets,
        weights=dict.fromkeys(names, 1.0),
        steps=dict.fromkeys(names, 1),
    )


def main() -> None:
    print("| strategy | width | clients | first round, down | up | third round, down | up |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (label, (name, settings)), (width, clients) in product(
        WAYS.items(), [(128, 5), (128, 20), (1024, 5)]
    ):
        toy = federation(width, clients)
        strategy = build(name, settings)
        played = Played([strategy.init(toy.problem())], [], [])
        figures = []
        for _ in range(3):
            first, back = len(played.sent), len(played.replies)
            turn(strategy, toy, played, toy.clients)
            down = sum(sum(message_bytes(m[0]).values()) for m in played.sent[first:])
            up = sum(sum(message_bytes(m[0]).values()) for m in played.replies[back:])
            figures.append((down, up))
        shown = " | ".join(f"{n:,}" for n in (*figures[0], *figures[2]))
        print(f"| {label} | {width} | {clients} | {shown} |")


if __name__ == "__main__":
    main()
