"""The seam: updates and back, chains in their order, and what remembers keeps apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedpeft.message import Messages, Replies
from fedpeft.postprocess import NOTHING, Chain, Kept, Postprocessor, applied, flat, unflat, updates
from fedpeft.tree import Tree
from tests.kept import Memory

SENT = Messages.broadcast(["a", "b"], {"adapter": {"x": torch.tensor([1.0, 2.0])}})


@dataclass
class Marks(Postprocessor):
    """Writes down when it is called, and scales what passes."""

    name: str
    calls: list[str]
    factor: float = 1.0
    individual: bool = False
    always: bool = False
    remembers: bool = False
    kept: dict[str, Tree] = field(default_factory=dict)

    def announce(self, sent: Messages) -> Messages:
        self.calls.append(f"announce {self.name}")
        return sent

    def leave(self, sent: Messages, reply: Messages, kept: Kept) -> Messages:
        self.calls.append(f"leave {self.name}")
        return reply

    def enter(
        self, sent: Sequence[Messages], like: Mapping[str, Tree], replies: Replies
    ) -> Replies:
        self.calls.append(f"enter {self.name}")
        return replies

    def memory(self) -> dict[str, Tree]:
        return self.kept

    def restore(self, memory: Mapping[str, Tree]) -> None:
        self.kept = dict(memory)


class Other(Marks):
    """The same under another name."""


def test_an_update_is_what_was_added_to_what_was_sent() -> None:
    reply = SENT.reply({"adapter": {"x": torch.tensor([[1.5, 2.0], [0.0, 2.5]])}})
    moved = updates(SENT, reply)
    assert moved["adapter"]["x"].tolist() == [[0.5, 0.0], [-1.0, 0.5]]
    assert moved["adapter"]["x"].dtype == torch.float64
    back = applied(SENT, moved)
    assert torch.equal(back["adapter"]["x"].float(), reply.trees["adapter"]["x"])
    one = applied(SENT.rows([0]), {"adapter": {"x": torch.tensor([[1.0, 1.0]])}})
    assert one["adapter"]["x"].tolist() == [[2.0, 3.0]]


def test_clients_that_were_sent_other_things_have_their_own_updates() -> None:
    sent = Messages(("a", "b"), {"t": {"x": torch.tensor([[1.0], [5.0]])}})
    reply = sent.reply({"t": {"x": torch.tensor([[2.0], [5.5]])}})
    assert updates(sent, reply)["t"]["x"].tolist() == [[1.0], [0.5]]


def test_what_nothing_like_it_was_sent_for_is_its_own_update() -> None:
    reply = SENT.reply({"adapter": {"x": torch.ones(2, 3)}, "sketch": {"x": torch.ones(2, 2)}})
    moved = updates(SENT, reply)
    assert moved["adapter"]["x"].tolist() == [[1.0] * 3] * 2  # another shape
    assert moved["sketch"]["x"].tolist() == [[1.0] * 2] * 2  # another tree


def test_flat_names_part_and_tensor() -> None:
    trees = {"one": {"x": torch.ones(1)}, "two": {"x": torch.zeros(1)}}
    assert list(flat(trees)) == ["one/x", "two/x"]
    assert unflat(flat(trees), trees) == trees


def test_clients_go_forth_and_the_server_back() -> None:
    calls: list[str] = []
    chain = Chain((Marks("1", calls), Other("2", calls)))
    chain.announce(SENT)
    chain.leave(SENT, SENT, Memory())
    chain.enter([SENT], {}, iter([]))
    assert calls == ["announce 1", "announce 2", "leave 1", "leave 2", "enter 2", "enter 1"]


def test_a_chain_is_individual_or_always_if_a_link_is() -> None:
    plain = Marks("1", [])
    for links, individual, always in (
        ((plain,), False, False),
        ((plain, Marks("2", [], individual=True)), True, False),
        ((Marks("2", [], always=True), plain), False, True),
    ):
        chain = Chain(links)
        assert (chain.individual, chain.always) == (individual, always)


def test_links_that_remember_do_not_see_one_another() -> None:
    one, two = Marks("1", []), Other("2", [])
    one.kept, two.kept = {"n": {"x": torch.ones(1)}}, {"n": {"x": torch.zeros(1)}}
    memory = Chain((one, two)).memory()
    assert sorted(memory) == ["Marks.n", "Other.n"]
    again = Marks("1", []), Other("2", [])
    Chain(again).restore(memory)
    assert float(again[0].kept["n"]["x"]) == 1.0 and float(again[1].kept["n"]["x"]) == 0.0


def test_nothing_changes_nothing() -> None:
    replies = [SENT]
    assert NOTHING.announce(SENT) is SENT and NOTHING.leave(SENT, SENT, Memory()) is SENT
    assert list(NOTHING.enter([SENT], {}, replies)) == replies
    plain = Postprocessor()
    assert plain.announce(SENT) is SENT and plain.leave(SENT, SENT, Memory()) is SENT
    assert plain.enter([SENT], {}, replies) is replies and plain.memory() == {}
    plain.restore({})
    assert not (NOTHING.individual or NOTHING.always or NOTHING.memory())
