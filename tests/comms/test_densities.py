"""Densities by bandit: the server's orders, and what clients make of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from fedpeft.bandits.agents import Agents, Bandits, Policy, seen_of_bytes
from fedpeft.codecs.settings import Codec, Name
from fedpeft.comms.densities import DENSITY, Densities, alike
from fedpeft.comms.ledger import Entry, entries
from fedpeft.comms.uplink import Uplink
from fedpeft.errors import PayloadError
from fedpeft.flower.records import Header, encode
from fedpeft.message import Messages
from fedpeft.streams import derive
from fedpeft.tree import Tree, row
from tests.kept import Memory

BASE = "0123456789abcdef"
NAMES = ("ada", "bob", "cyd", "dan", "eve")
OPTIONS = (0.05, 0.2, 0.5)
UNEQUAL = (0.5, 0.05, 0.2, 0.5, 0.05)
HEAD = "classifier.modules_to_save.default.weight"
CODECS: tuple[Name, ...] = ("topk", "randk", "dare", "compeft")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sent(names: tuple[str, ...] = NAMES, ordered: tuple[float, ...] = ()) -> Messages:
    tree = {"a": numbers(8, 20), HEAD: numbers(3, 8, seed=2)}
    one = Messages.broadcast(names, {"adapter": tree}, {"rank": 2.0})
    if not ordered:
        return one
    order = torch.tensor(ordered, dtype=torch.float64)
    return dataclasses.replace(one, scalars={**one.scalars, DENSITY: order})


def replied(to: Messages, seed: int = 3, loss: Mapping[str, float] | None = None) -> Messages:
    trees: dict[str, Tree] = {
        "adapter": {
            n: v + 0.1 * numbers(*v.shape, seed=seed) for n, v in to.trees["adapter"].items()
        }
    }
    trees["flags"] = {"x": torch.arange(len(to))[:, None]}
    told = torch.tensor([(loss or {}).get(n, 1.0) for n in to.clients], dtype=torch.float64)
    return to.reply(trees, weight=torch.ones(len(to)), loss=told)


def uplink(name: Name = "topk") -> Uplink:
    return Uplink(Codec(name, densities=OPTIONS), 7, BASE)


def serialised(left: Messages, k: int) -> int:
    """Flower's own count of everything but the header."""
    content = encode(left.travelling(k), Header())
    return sum(record.count_bytes() for key, record in content.items() if key != "header")


def size_of(entry: Entry) -> int:
    return sum(entry.each.values())


@pytest.mark.parametrize("name", CODECS)
def test_clients_of_unequal_densities_are_what_they_are_one_by_one(name: Name) -> None:
    """Numbers, payloads, books; and those of one density as without a bandit."""
    to = sent(ordered=UNEQUAL)
    together = uplink(name).leave(to, replied(to), Memory())
    assert together.coded is not None
    for k, density in enumerate(UNEQUAL):
        plain = Uplink(Codec(name, density=density), 7, BASE)
        for link in (uplink(name), plain):
            alone = link.leave(to.rows([k]), replied(to).rows([k]), Memory())
            assert alone.travelling(0).blobs == together.travelling(k).blobs
            assert entries(alone) == entries(together.rows([k]))
            for part, own in alone.trees.items():
                assert all(torch.equal(v[0], together.trees[part][n][k]) for n, v in own.items())
    turned = together.rows([3, 1, 0])
    for place, k in enumerate((3, 1, 0)):
        assert turned.travelling(place).blobs == together.travelling(k).blobs


@pytest.mark.parametrize("name", CODECS)
def test_the_books_are_what_is_serialised_with_unequal_densities(name: Name) -> None:
    to = sent(ordered=UNEQUAL)
    left = uplink(name).leave(to, replied(to), Memory())
    own = {client: size_of(entry) for entry in entries(left) for client in entry.clients}
    assert own == {client: serialised(left, k) for k, client in enumerate(NAMES)}
    assert own["bob"] < own["cyd"] < own["ada"] or name == "dare"
    [down] = entries(to)
    assert down.each["scalar"] == entries(sent())[0].each["scalar"] + 8 + len(DENSITY)
    assert size_of(down) == serialised(to, 0)


@pytest.mark.parametrize("name", CODECS)
def test_the_server_reads_what_it_ordered(name: Name) -> None:
    to = sent(ordered=UNEQUAL)
    left = uplink(name).leave(to, replied(to), Memory(round=4))
    like = {tree: row(own, 0) for tree, own in left.trees.items()}
    for k in range(len(NAMES)):
        found = uplink(name).read(left.travelling(k), to.rows([k]), like, 4)
        for part, own in found.trees.items():
            assert all(torch.equal(v[0], left.trees[part][n][k]) for n, v in own.items())
        assert sum(map(size_of, entries(found))) == serialised(left, k)


def test_a_client_that_sends_another_density_than_it_was_ordered_is_refused() -> None:
    to = sent(ordered=UNEQUAL)
    like = {tree: row(own, 0) for tree, own in replied(to).trees.items()}
    greedy = sent(ordered=(0.5,) * len(NAMES))
    left = uplink().leave(greedy, replied(greedy), Memory())
    with pytest.raises(PayloadError):
        uplink().read(left.travelling(1), to.rows([1]), like, 1)


def test_what_is_lost_under_one_density_is_sent_under_the_next() -> None:
    """Error feedback against a plain loop: top-k by hand, client by client, densities that vary."""
    memory, residual = Memory(), np.zeros((3, 160), np.float32)
    orders = [(0.05, 0.5, 0.2), (0.5, 0.5, 0.05), (0.2, 0.05, 0.05), (0.05, 0.2, 0.5)]
    for number, ordered in enumerate(orders, start=1):
        to, memory.round = sent(NAMES[:3], ordered), number
        reply = replied(to, seed=10 * number)
        left = uplink().leave(to, reply, memory)
        start = to.trees["adapter"]["a"].reshape(3, -1).numpy()
        for k, density in enumerate(ordered):
            moved = reply.trees["adapter"]["a"][k].flatten().numpy() - start[k] + residual[k]
            kept = np.argsort(-abs(moved), kind="stable")[: math.ceil(density * 160)]
            read = np.zeros_like(moved)
            read[kept] = moved[kept]
            residual[k] = moved - read
            found = left.trees["adapter"]["a"][k].flatten().numpy() - start[k]
            assert abs(found - read).max() < 1e-6
    [own] = memory.trees.values()
    assert abs(own["0"].numpy() - residual).max() < 1e-6 and abs(residual).max() > 0.1


@pytest.mark.parametrize("wrong", [0.1, 0.05000001, 1.0, -0.5, math.inf, math.nan])
def test_a_client_obeys_no_density_but_its_recipes(wrong: float) -> None:
    to = sent(ordered=(*UNEQUAL[:4], wrong))
    with pytest.raises(PayloadError, match=rf"orders {DENSITY}={wrong}, which is none of"):
        uplink().leave(to, replied(to), Memory())


def test_a_client_that_is_ordered_none_says_so() -> None:
    with pytest.raises(PayloadError, match=rf"no scalar '{DENSITY}'.*comms\.up\.densities"):
        uplink().leave(sent(), replied(sent()), Memory())


def test_stacks_are_cut_by_what_is_ordered() -> None:
    parts = alike(sent(ordered=UNEQUAL))
    assert [one.clients for one in parts] == [("bob", "eve"), ("cyd",), ("ada", "dan")]
    assert [one.clients for one in alike(sent())] == [NAMES]


def played(
    server: Densities, number: int, names: tuple[str, ...], times: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """A round of two stacks; what was ordered, the losses, and bytes both ways, by client."""
    loss = {n: 3.0 / (number + k + len(n) % 2) for k, n in enumerate(names)}
    stacks = [server.announce(sent(part)) for part in (names[:1], names[1:])]
    left = [uplink().leave(one, replied(one, number, loss), Memory(number)) for one in stacks]
    assert list(server.enter(stacks, {}, left)) == left
    server.arrived(names)
    if times:
        server.told(times)
    ordered = {
        n: x
        for one in stacks
        for n, x in zip(one.clients, one.scalars[DENSITY].tolist(), strict=True)
    }
    both = [*stacks, *left]
    sizes = {
        n: sum(size_of(e) for one in both for e in entries(one) if n in e.clients) for n in names
    }
    return ordered, loss, sizes


def attendance(number: int) -> tuple[str, ...]:
    return tuple(n for k, n in enumerate(NAMES) if (k + number) % 3)


@pytest.mark.parametrize("timed", [False, True])
def test_orders_are_those_of_the_bandits(timed: bool) -> None:
    """Agents by hand: who has lost something since it was there last teaches them, no one else."""
    server, policy = Densities(OPTIONS, 7), Policy("grid", (0, 1, 2), levels=(0.0,))
    agents, losses, orders = Bandits(derive(7, "densities")), dict[str, float](), set[float]()
    for number in range(1, 13):
        names = attendance(number)
        times = {n: 1.0 + k * number % 4 for k, n in enumerate(names)} if timed else {}
        wanted = [OPTIONS[k] for k in agents.orders(policy, names)[1].tolist()]
        ordered, loss, sizes = played(server, number, names, times)
        assert ordered == dict(zip(names, wanted, strict=True))
        orders |= set(wanted)
        falls = {n: losses[n] - loss[n] for n in names if n in losses}
        each = torch.tensor([sizes[n] for n in falls])
        agents = agents.closed(policy, seen_of_bytes(falls, each, 7)).timed(policy, times)
        losses |= loss
    assert orders == set(OPTIONS)


def test_everybody_begins_in_the_middle_until_a_loss_can_have_fallen() -> None:
    server = Densities(OPTIONS, 7)
    for number in (1, 2):
        ordered, _, _ = played(server, number, NAMES, {})
        assert set(ordered.values()) == {0.2}
    assert set(played(server, 3, NAMES, {})[0].values()) != {0.2}


def test_times_of_a_round_of_newcomers_change_nothing() -> None:
    """What agents know of earlier rounds is not judged again by the times of this one."""
    server = Densities(OPTIONS, 7)
    for number in (1, 2, 3):
        played(server, number, NAMES[:3], {"ada": 1.0, "bob": 5.0, "cyd": 2.0})
    before = server.bandits.agents
    played(server, 4, NAMES[3:], {"dan": 1.0, "eve": 9.0})
    assert before.orders == server.bandits.agents.orders
    assert all(torch.equal(t, server.bandits.agents.tables[n]) for n, t in before.tables.items())


def test_a_loss_that_is_no_number_teaches_nothing() -> None:
    server = Densities(OPTIONS, 7)
    for loss in (2.0, math.nan, 1.0):
        before = server.bandits.agents
        one = server.announce(sent(("ada",)))
        reply = replied(one, loss={"ada": loss})
        list(server.enter([one], {}, [uplink().leave(one, reply, Memory())]))
        server.arrived(("ada",))
        if math.isnan(loss):
            assert server.bandits.agents == before == Agents()
    assert server.losses == {"ada": 1.0} and set(server.bandits.agents.tables) == {"ada"}


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_what_agents_know_is_in_the_memory(after: int) -> None:
    """A server that was restored goes on as the one that never stopped."""
    whole = Densities(OPTIONS, 7)
    for number in range(1, after + 1):
        played(whole, number, attendance(number), {})
    again = Densities(OPTIONS, 7)
    again.restore(whole.memory())
    for number in range(after + 1, after + 9):
        wanted = played(whole, number, attendance(number), {})
        assert played(again, number, attendance(number), {}) == wanted
    assert again.bandits.round == whole.bandits.round
