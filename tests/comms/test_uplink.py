"""Replies through codecs: what is read is what the codec says, what is lost comes later."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fedpeft.codecs.settings import Codec
from fedpeft.comms.ledger import entries
from fedpeft.comms.uplink import Uplink
from fedpeft.errors import PayloadError
from fedpeft.message import Messages
from fedpeft.tree import row
from tests.kept import Memory

BASE = "0123456789abcdef"
NAMES = ("ada", "bob", "cyd")
HEAD = "classifier.modules_to_save.default.weight"


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sent(names: tuple[str, ...] = NAMES) -> Messages:
    tree = {"a": numbers(4, 5), "b": numbers(6, seed=1), HEAD: numbers(3, 4, seed=2)}
    return Messages.broadcast(names, {"adapter": tree}, {"rank": 2.0})


def replied(to: Messages, size: float = 0.1, seed: int = 3) -> Messages:
    trees = {
        tree: {
            name: value + size * numbers(*value.shape, seed=seed + k)
            for k, (name, value) in enumerate(own.items())
        }
        for tree, own in to.trees.items()
    }
    return to.reply(trees, weight=torch.arange(1.0, len(to) + 1))


def like(messages: Messages) -> dict[str, dict[str, torch.Tensor]]:
    return {tree: row(own, 0) for tree, own in messages.trees.items()}


def through(codec: Codec, to: Messages, reply: Messages, memory: Memory | None = None) -> Messages:
    return Uplink(codec, 7, BASE).leave(to, reply, memory or Memory())


def test_top_k_keeps_the_largest_changes_and_drops_the_rest() -> None:
    to = sent()
    left = through(Codec("topk", density=0.25, feedback="never"), to, replied(to))
    start, want, got = (m.trees["adapter"] for m in (to, replied(to), left))
    for names, kept in ((("a", "b"), 7), ((HEAD,), 3)):  # ceil(0.25 * 26), of 12: head by itself
        moved = torch.cat([(got[n] - start[n]).flatten(1) for n in names], dim=1)
        change = torch.cat([(want[n] - start[n]).flatten(1) for n in names], dim=1)
        for k in range(3):
            largest = change[k].abs().argsort(descending=True)[:kept]
            assert moved[k].nonzero()[:, 0].tolist() == sorted(largest.tolist())
            assert torch.allclose(moved[k][largest], change[k][largest], atol=1e-6)


def test_what_was_lost_is_sent_later() -> None:
    """sum of what was read + e = sum of the updates."""
    to, memory = sent(), Memory()
    total = torch.zeros(3, 38)
    read = torch.zeros(3, 38)
    for round_ in range(1, 9):
        memory.round = round_
        reply = replied(to, seed=10 * round_)
        left = through(Codec("topk", density=0.1), to, reply, memory)
        names = ["a", "b", HEAD]
        start = torch.cat([to.trees["adapter"][n].flatten(1) for n in names], dim=1)
        total += torch.cat([reply.trees["adapter"][n].flatten(1) for n in names], dim=1) - start
        read += torch.cat([left.trees["adapter"][n].flatten(1) for n in names], dim=1) - start
    (residual,) = memory.trees.values()
    kept = torch.cat([residual["0"], residual["1"]], dim=1)
    assert kept.norm() > 0.1 and torch.allclose(read + kept, total, atol=1e-5)


def test_without_feedback_nothing_is_kept() -> None:
    to, memory = sent(), Memory()
    for codec in (Codec("topk", feedback="never"), Codec("dense", "int8"), Codec("randk")):
        through(codec, to, replied(to), memory)
        assert not memory.trees and not Uplink(codec, 7, BASE).remembers
    assert Uplink(Codec("topk"), 7, BASE).remembers


def test_what_was_not_sent_goes_as_it_is_and_feeds_nothing_back() -> None:
    to, memory = sent(), Memory()
    reply = dataclasses.replace(replied(to), trees={"sketch": {"y": numbers(3, 8) + 5}})
    left = through(Codec("topk", density=0.5), to, reply, memory)
    assert int((left.trees["sketch"]["y"] != 0).sum(dim=1).max()) == 4 and not memory.trees


def test_whole_numbers_are_not_touched() -> None:
    to = sent()
    index = torch.arange(9, dtype=torch.int32).view(3, 3)
    reply = dataclasses.replace(replied(to), trees={"x": {"index": index, "move": numbers(3, 8)}})
    uplink = Uplink(Codec("dense", "int4", block=4), 7, BASE)
    left = uplink.leave(to, reply, Memory())
    assert torch.equal(left.trees["x"]["index"], index)
    one = uplink.read(left.travelling(1), to.rows([1]), like(left), 1)
    assert torch.equal(one.trees["x"]["index"], index[1:2])
    assert one.trees["x"]["index"].dtype == torch.int32


def test_the_server_reads_what_the_client_meant_and_the_books_say_it() -> None:
    to, uplink = sent(), Uplink(Codec("topk", "fp16", density=0.3), 7, BASE)
    left = uplink.leave(to, replied(to), Memory(round=5))
    for k in range(3):
        one = left.travelling(k)
        assert not one.trees and set(one.blobs) == {"payload"}
        found = uplink.read(one, to.rows([k]), like(left), 5)
        assert all(
            torch.equal(found.trees["adapter"][n][0], left.trees["adapter"][n][k])
            for n in left.trees["adapter"]
        )
        assert float(found.scalars["weight"][0]) == k + 1
        (ours,), (theirs,) = entries(left.rows([k])), entries(found)
        assert ours == dataclasses.replace(theirs, clients=ours.clients)
        assert sum(ours.each.values()) == len(one.blobs["payload"]) + len("payload") + 14


def test_clients_of_one_stack_do_not_depend_on_each_other() -> None:
    to, codec = sent(), Codec("dense", "int8", block=8)
    together = through(codec, to, replied(to))
    for k, name in enumerate(NAMES):
        alone = through(codec, sent((name,)), replied(to).rows([k]))
        for key, value in alone.trees["adapter"].items():
            assert torch.equal(value[0], together.trees["adapter"][key][k])


def test_rounding_differs_from_round_to_round_and_client_to_client() -> None:
    to, codec = sent(), Codec("dense", "int4", block=8)
    reply = dataclasses.replace(replied(to), trees={"x": {"y": numbers(1, 64).expand(3, 64)}})
    one = through(codec, to, reply, Memory(1)).trees["x"]["y"]
    two = through(codec, to, reply, Memory(2)).trees["x"]["y"]
    assert not torch.equal(one, two) and not torch.equal(one[0], one[1])
    assert torch.equal(one, through(codec, to, reply, Memory(1)).trees["x"]["y"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_faulty_client_spoils_only_itself(bad: float) -> None:
    to, memory = sent(), Memory()
    reply = replied(to)
    reply.trees["adapter"]["a"][1, 0, 0] = bad
    left = through(Codec("topk"), to, reply, memory)
    whole = through(Codec("topk"), to, replied(to))
    assert not torch.isfinite(left.trees["adapter"]["a"][1]).all()
    for k in (0, 2):
        for name, value in whole.trees["adapter"].items():
            assert torch.equal(left.trees["adapter"][name][k], value[k])
    assert all(bool(torch.isfinite(v).all()) for t in memory.trees.values() for v in t.values())


def test_under_client_level_privacy_replies_are_updates_already() -> None:
    to = sent()
    reply = dataclasses.replace(replied(to), trees={"adapter": {"a": numbers(3, 4, 5)}})
    bounded = Uplink(Codec("topk", density=0.2), 7, BASE, updates=True)
    left = bounded.leave(to, reply, Memory())
    assert int((left.trees["adapter"]["a"] != 0).flatten(1).sum(dim=1).max()) == 4


def test_what_the_server_refuses() -> None:
    to, uplink = sent(), Uplink(Codec("topk"), 7, BASE)
    left = uplink.leave(to, replied(to), Memory())
    one, here = left.travelling(0), to.rows([0])
    cases = [
        (dataclasses.replace(one, blobs={}), "must hold a payload"),
        (left[0], "must hold a payload"),
        (dataclasses.replace(one, blobs={"payload": one.blobs["payload"][:-3]}), "truncated"),
        (dataclasses.replace(one, blobs={"payload": b"x" * 5_000_000}), "at most"),
    ]
    for reply, why in cases:
        with pytest.raises(PayloadError, match=why):
            uplink.read(reply, here, like(left), 1)
    for other, round_, why in (
        (Uplink(Codec("topk"), 7, "f" * 16), 1, "base"),
        (Uplink(Codec("compeft"), 7, BASE), 1, "codec"),
        (uplink, 2, "round"),
    ):
        with pytest.raises(PayloadError, match=why):
            other.read(one, here, like(left), round_)
    with pytest.raises(PayloadError, match="schema"):
        uplink.read(one, here, {"adapter": {"a": numbers(4, 4)}}, 1)


def test_dare_drops_nothing_of_a_head() -> None:
    """Spec: a classifier's changes are large, and a tenth of them times ten is noise."""
    to = sent()
    left = through(Codec("dare", density=0.25), to, replied(to)).trees["adapter"]
    want = replied(to).trees["adapter"]
    assert torch.allclose(left[HEAD], want[HEAD], atol=1e-6)
    assert bool((left["a"] == to.trees["adapter"]["a"]).any())
