"""Requests through codecs: versions, who holds which, and what the strategy gets back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from fedpeft.codecs.settings import Codec
from fedpeft.comms.downlink import Downlink
from fedpeft.comms.ledger import entries, stack_bytes
from fedpeft.errors import FedpeftError, PayloadError
from fedpeft.message import PAYLOAD, Messages
from fedpeft.tree import Tree

BASE = "0123456789abcdef"
START = {"a": torch.linspace(-1, 1, 600).view(20, 30), "b": torch.zeros(100)}
CODEC = Codec("topk", density=0.1)


def model(round_: int) -> Tree:
    """What the strategy means to send: as initialised in round 1."""
    stream = torch.Generator().manual_seed(round_)
    if round_ == 1:
        return dict(START)
    return {n: x + 0.1 * torch.randn(x.shape, generator=stream) for n, x in START.items()}


def sent(round_: int, names: Sequence[str]) -> Messages:
    return Messages.broadcast(list(names), {"adapter": model(round_)})


class Clients:
    """What clients read, each with a memory of its own."""

    def __init__(self, downlink: Downlink) -> None:
        self.downlink = downlink
        self.memory: dict[str, dict[str, Tree]] = {}

    def read(self, stack: Messages, k: int) -> Tree:
        own = self.memory.setdefault(stack.clients[k], {})
        trees, kept = self.downlink.read(stack.travelling(k).blobs[PAYLOAD], own)
        own.update(kept)
        return {name: value[0] for name, value in trees["adapter"].items()}


def downlink(codec: Codec = CODEC) -> Downlink:
    return Downlink(codec, 3, BASE, dict(START))


def play(own: Downlink, clients: Clients, round_: int, names: Sequence[str]) -> Messages:
    """A round in which everybody answers; all read what the server says that they read."""
    stack = own.announce(sent(round_, names))
    for k in range(len(names)):
        found = clients.read(stack, k)
        for name, value in found.items():
            assert torch.equal(value, stack.trees["adapter"][name][k])
        assert sum(stack_bytes(stack.rows([k])).values()) == len(
            stack.travelling(k).blobs[PAYLOAD]
        ) + len(PAYLOAD)
    own.arrived(names)
    return stack


def test_whoever_missed_rounds_is_brought_along_by_the_changes() -> None:
    own = downlink()
    clients = Clients(own)
    cost = {}
    for round_, names in enumerate([("ada", "bob"), ("ada",), ("ada",), ("ada", "bob")], start=1):
        stack = play(own, clients, round_, names)
        cost[round_] = [sum(entry.each.values()) for entry in entries(stack)]
    assert len(cost[4]) == 2, "ada is sent one change, bob three"
    assert 2.5 < max(cost[4]) / min(cost[4]) < 3.5
    assert max(cost[4]) < 4 * 700


def test_a_newcomer_is_told_the_schema_once() -> None:
    own = downlink()
    clients = Clients(own)
    told = [
        stack_bytes(play(own, clients, round_, ("ada", "bob"))).get("schema", 0)
        for round_ in (1, 2, 3)
    ]
    assert told[0] > 0 and told[1:] == [0, 0]
    late = play(own, clients, 4, ("ada", "cyd"))
    assert 2 * stack_bytes(late)["schema"] == told[0]


def test_what_clients_have_by_themselves_is_not_sent() -> None:
    """The start is the initial adapter: next to nothing; another start is sent whole."""
    compeft = Codec("compeft", density=0.1)
    free = sum(stack_bytes(downlink(compeft).announce(sent(1, ["ada"]))).values())
    whole = sum(stack_bytes(downlink(compeft).announce(sent(2, ["ada"]))).values())
    assert whole > 4 * 700 > 4 * free


def test_what_was_left_out_is_in_the_next_difference() -> None:
    own = downlink()
    clients = Clients(own)
    play(own, clients, 1, ("ada",))
    gaps = []
    for _ in range(12):
        stack = play(own, clients, 2, ("ada",))
        gaps.append(float((stack.trees["adapter"]["a"][0] - model(2)["a"]).norm()))
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-6 < gaps[0]


def test_replies_are_moved_to_the_strategys_own_model() -> None:
    own = downlink()
    own.announce(sent(1, ["ada", "bob"]))
    own.arrived(["ada", "bob"])
    stack = own.announce(sent(2, ["ada", "bob"]))
    change = {name: 0.01 * torch.ones_like(x) for name, x in stack.trees["adapter"].items()}
    moved = {name: x + change[name] for name, x in stack.trees["adapter"].items()}
    reply = stack.reply({"adapter": moved}, weight=torch.ones(2))
    (found,) = own.enter([stack], {"adapter": model(2)}, iter([reply]))
    for name, value in found.trees["adapter"].items():
        assert torch.allclose(value, model(2)[name] + change[name][0], atol=1e-6)
        assert not torch.allclose(moved[name], value, atol=1e-3)


def test_who_did_not_answer_is_sent_the_change_again() -> None:
    own = downlink()
    clients = Clients(own)
    play(own, clients, 1, ("ada", "bob"))
    own.announce(sent(2, ("ada", "bob")))  # lost on its way to bob
    own.arrived(["ada"])
    stack = own.announce(sent(3, ("bob",)))
    assert torch.equal(clients.read(stack, 0)["a"], stack.trees["adapter"]["a"][0])


def test_who_lost_its_memory_is_refused_then_sent_the_whole() -> None:
    own = downlink()
    clients = Clients(own)
    for round_ in (1, 2):
        play(own, clients, round_, ("ada",))
    clients.memory.clear()
    stack = own.announce(sent(3, ("ada",)))
    with pytest.raises(PayloadError, match="says not what it holds"):
        clients.read(stack, 0)
    own.arrived([])
    del own.held[next(iter(own.held))].clients["ada"]  # type: ignore[attr-defined]
    play(own, clients, 4, ("ada",))


def test_a_change_of_another_version_is_refused() -> None:
    own = downlink()
    clients = Clients(own)
    for round_ in (1, 2):
        play(own, clients, round_, ("ada",))
    before = {name: dict(tree) for name, tree in clients.memory["ada"].items()}
    play(own, clients, 3, ("ada",))
    stack = own.announce(sent(4, ("ada",)))
    clients.memory["ada"] = before
    with pytest.raises(PayloadError, match="changes version 3.*does not hold: it needs the whole"):
        clients.read(stack, 0)


def test_groups_that_are_sent_the_same_share_a_version() -> None:
    own = downlink()
    one, two = own.announce(sent(1, ("ada",))), own.announce(sent(1, ("bob",)))
    own.arrived(("ada", "bob"))
    (held,) = own.held.values()
    assert held.version == 1 and held.clients == {"ada": 1, "bob": 1}
    assert torch.equal(one.trees["adapter"]["a"], two.trees["adapter"]["a"])


def test_weights_of_flasc_have_no_reference() -> None:
    own = downlink(Codec("topk", density=0.25, form="weights"))
    clients = Clients(own)
    for round_ in (1, 2):
        stack = play(own, clients, round_, ("ada",))
        kept = torch.cat([x[0].flatten() for x in stack.trees["adapter"].values()])
        want = torch.cat([x.flatten() for x in model(round_).values()])
        assert int((kept != 0).sum()) == 175
        there = kept != 0
        assert torch.equal(kept[there], want[there])
        assert want[there].abs().min() >= want[~there].abs().max()


def test_a_checkpoint_holds_versions_and_who_has_them() -> None:
    own, again = downlink(), downlink()
    clients = Clients(own)
    for round_, names in enumerate([("ada", "bob"), ("ada",), ("ada",)], start=1):
        play(own, clients, round_, names)
    again.restore(own.memory())
    clients.downlink = again
    one, two = own.announce(sent(4, ("ada", "bob"))), again.announce(sent(4, ("ada", "bob")))
    assert entries(one) == entries(two)
    for k in range(2):
        assert one.travelling(k).blobs == two.travelling(k).blobs
    empty = downlink()
    empty.restore(downlink().memory())
    assert not empty.held


def test_a_strategy_that_sends_each_its_own_is_refused() -> None:
    tree = {"a": torch.stack([START["a"], START["a"] + 1])}
    with pytest.raises(FedpeftError, match="sends all clients of a group the same"):
        downlink().announce(Messages(("ada", "bob"), {"adapter": tree}))


def test_another_base_is_refused() -> None:
    stack = downlink().announce(sent(1, ("ada",)))
    other = dataclasses.replace(downlink(), base="f" * 16)
    with pytest.raises(PayloadError, match="base"):
        other.read(stack.travelling(0).blobs[PAYLOAD], {})
