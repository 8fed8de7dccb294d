"""Clients among themselves: who takes part, with what weight, and what must stay private.

Every function here checks one property of a strategy; see ``finding.Property``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedpeft import tree
from fedpeft.conformance.finding import NotApplicable, require
from fedpeft.conformance.play import (
    ROUNDING,
    Played,
    equal,
    gap,
    message_bits,
    outcome,
    play,
    replied,
    require_close,
    sent_to,
    some,
    stands_for,
    state_bits,
    toy_for,
    turn,
    used_by,
)
from fedpeft.conformance.toy import Toy
from fedpeft.strategy import Messages, Strategy
from fedpeft.tree import Tree

CHANGED = 1e-6
"""From here on two float64 results are different ones, not the same with other rounding."""


def the_order_of_clients_changes_nothing(strategy: Strategy[Any]) -> str:
    """Clients listed in reverse leave the same adapters, to rounding in float64."""
    toy, other = toy_for(strategy), toy_for(strategy)
    one = play(strategy, toy)
    two = play(strategy, other, present=lambda _, clients: clients[::-1])
    most = require_close(
        outcome(strategy, two, other), outcome(strategy, one, toy), ROUNDING, "clients in reverse"
    )
    return f"differs by {most:.0e}"


def the_size_of_stacks_changes_nothing(strategy: Strategy[Any]) -> str:
    """Clients in stacks of 1, 2 and 3 leave what they leave in one, to rounding in float64."""
    toy, most = toy_for(strategy), 0.0
    wanted = outcome(strategy, play(strategy, toy, present=some), toy)
    for size in (1, 2, 3):
        other = toy_for(strategy)
        found = outcome(strategy, play(strategy, other, 3, some, size), other)
        most = max(most, require_close(found, wanted, ROUNDING, f"clients in stacks of {size}"))
    return f"differs by {most:.0e}"


def a_common_factor_on_weights_changes_nothing(strategy: Strategy[Any]) -> str:
    """37 times everybody's weight leaves the same adapters, to rounding in float64."""
    toy, other = toy_for(strategy), toy_for(strategy)
    other.weights = {client: 37.0 * weight for client, weight in toy.weights.items()}
    one, two = play(strategy, toy, present=some), play(strategy, other, present=some)
    most = require_close(
        outcome(strategy, two, other), outcome(strategy, one, toy), ROUNDING, "weights times 37"
    )
    return f"differs by {most:.0e}"


def unequal_weights_matter(strategy: Strategy[Any]) -> str:
    """Weights 1, 2.5, 4 ... and equal weights leave another global adapter."""
    toy, other = toy_for(strategy), toy_for(strategy)
    other.weights = dict.fromkeys(toy.weights, 1.0)
    one, two = play(strategy, toy), play(strategy, other)
    _needs_aggregate(strategy, one)
    apart, _ = gap(_global(strategy, two, other), _global(strategy, one, toy))
    require(apart < math.inf, "the adapter is not finite")
    require(apart > CHANGED, f"equal weights give the same adapter (differs by {apart:.0e})")
    return f"differs by {apart:.0e}"


def every_reply_counts(strategy: Strategy[Any]) -> str:
    """Another target of any one client leaves another global adapter, in LoRA and in the rest.

    Of the two, in what training moves at all.
    """
    toy = toy_for(strategy)
    one = play(strategy, toy)
    _needs_aggregate(strategy, one)
    wanted, begun = _global(strategy, one, toy), _global(strategy, play(strategy, toy, 0), toy)
    layers = tree.select(wanted, lambda name: name in toy.scaling)
    rest = tree.select(wanted, lambda name: name not in toy.scaling)
    parts = [p for p in (layers, rest) if any(not torch.equal(x, begun[n]) for n, x in p.items())]
    least = float("inf")
    for client in toy.clients:
        other = toy_for(strategy)
        other.targets[client] = tree.scale(other.targets[client], 1.5)
        found = _global(strategy, play(strategy, other), other)
        for part in parts:
            apart, name = gap({n: found[n] for n in part}, part)
            require(apart < math.inf, f"{name} is not finite")
            require(apart > CHANGED, f"the data of {client} do not matter, even for {name}")
            least = min(least, apart)
    return f"differs by {least:.0e} or more"


def _global(strategy: Strategy[Any], played: Played, toy: Toy) -> Tree:
    """What clients get from each other: the global adapter; without one, what the server sends."""
    if strategy.shares:
        return stands_for(strategy, toy, played.states[-1])
    held = _held(strategy, played, toy.clients)
    return {f"{n} to {client}": x for client, own in held.items() for n, x in own.items()}


def _needs_aggregate(strategy: Strategy[Any], played: Played) -> None:
    if strategy.pools:
        raise NotApplicable("there is one client, the pool")
    if not any(reply.trees for reply in played.replies):
        raise NotApplicable("replies hold no tensors")


def absent_clients_have_no_influence(strategy: Strategy[Any]) -> str:
    """Other data and weights of clients that are away in the only round: the state's bits stay."""
    toy, other = toy_for(strategy), toy_for(strategy)
    away = set(toy.clients) - set(some(1, toy.clients))
    for client in away:
        other.targets[client] = tree.scale(toy.targets[client], -3.0)
        other.weights[client] = 100.0
    one, two = (play(strategy, t, rounds=1, present=some) for t in (toy, other))
    same = state_bits(one.states[-1]) == state_bits(two.states[-1])
    require(same, "the state depends on a client that did not take part")
    require(not away & {*toy.memory, *toy.shelf.memory()}, "a client that was away keeps something")
    return f"{len(away)} away"


def a_client_that_was_away_is_not_forgotten(strategy: Strategy[Any]) -> str:
    """What the server sends to one client only is not lost while that client is away.

    The first client takes part in round 1, the last never does. Where their messages differed in
    round 2, they differ in round 3 as well, although the first was away in round 2.
    """
    if strategy.pools:
        raise NotApplicable("there is one client, the pool")
    toy = toy_for(strategy)
    known, new = toy.clients[0], toy.clients[-1]
    played = play(strategy, toy, 1, lambda _, clients: clients[:3])
    own = _apart(strategy, played, known, new)
    turn(strategy, toy, played, toy.clients[1:4])
    still = _apart(strategy, played, known, new)
    lost = [name for name, apart in own.items() if apart and not still.get(name, True)]
    require(not lost, f"a client that was away gets what a new one gets: {lost[:2]}")
    turn(strategy, toy, played, toy.clients)
    if not any(own.values()):
        return "the server knows nothing of single clients; one that comes back takes part"
    return f"{sum(own.values())} tensors or scalars of its own"


def _apart(strategy: Strategy[Any], played: Played, one: str, two: str) -> dict[str, bool]:
    """Tensor or scalar of the next messages -> whether these two clients get another one."""
    held = _held(strategy, played, (one, two))
    left, right = held[one], held[two]
    both = left.keys() & right.keys()
    return {n: n not in both or not torch.equal(left[n], right[n]) for n in {*left, *right}}


def _held(strategy: Strategy[Any], played: Played, clients: Sequence[str]) -> dict[str, Tree]:
    """The tensors and scalars of the next messages: client -> tree/name -> value."""
    held: dict[str, Tree] = {}
    for sent in sent_to(strategy, played.states[-1], len(played.states), clients):
        for k, client in enumerate(sent.clients):
            own = {f"{p}/{n}": x[k] for p, t in sent.trees.items() for n, x in t.items()}
            held[client] = own | {name: x[k] for name, x in sent.scalars.items()}
    return held


def nothing_of_one_client_reaches_another(strategy: Strategy[Any]) -> str:
    """Every client in turn has NaN data: all others' replies and memory keep their bits.

    And its own loss is NaN, so it is its own.
    """
    clean = toy_for(strategy)
    one = replied(strategy, clean, strategy.init(clean.problem()), 1)
    for bad in clean.clients:
        toy = toy_for(strategy)
        toy.targets[bad] = tree.scale(toy.targets[bad], float("nan"))
        two = replied(strategy, toy, strategy.init(toy.problem()), 1)
        require(bool(two[bad].scalars["loss"].isnan()), f"the loss told for {bad} is not its own")
        _others_unchanged(one, two, bad, f"the data of {bad}")
        for other in set(clean.memory) - {bad}:
            kept = clean.memory[other]
            same = all(equal(toy.memory[other][n], own) for n, own in kept.items())
            require(same, f"the memory of {other} depends on the data of {bad}")
    return f"{len(clean.clients)} clients in turn"


def _others_unchanged(
    one: dict[str, Messages], two: dict[str, Messages], bad: str, what: str
) -> None:
    for client in set(one) - {bad}:
        same = message_bits(one[client]) == message_bits(two[client])
        require(same, f"the reply of {client} depends on {what}")


def private_memory_is_its_owners_alone(strategy: Strategy[Any]) -> str:
    """NaN, and 5 times the value, in one client's memory: others' replies and adapters stay.

    Bit by bit, in each exchange of round 2, for every client in turn; marks in memory must reach
    nobody else.
    """
    if not strategy.remembers:
        raise NotApplicable("clients keep no memory")
    toy = toy_for(strategy)
    state = play(strategy, toy, rounds=1).states[-1]
    for number in range(strategy.exchanges):
        memory = {client: dict(own) for client, own in toy.memory.items()}
        wanted = {} if number else used_by(strategy, toy, state, 2)
        one = replied(strategy, toy, state, 2)
        after = toy.memory
        for mark in (float("nan"), 5.0):
            for bad in toy.clients:
                toy.memory = {c: dict(own) for c, own in memory.items()}
                toy.memory[bad] = {n: tree.scale(t, mark) for n, t in memory[bad].items()}
                found = {} if number else used_by(strategy, toy, state, 2)
                for other in found.keys() - {bad}:
                    same = equal(found[other], wanted[other])
                    require(same, f"the adapter of {other} depends on the memory of {bad}")
                two = replied(strategy, toy, state, 2)
                _others_unchanged(one, two, bad, f"the memory of {bad}")
        toy.memory = after
        state = strategy.receive(state, iter(one.values()))
    return f"{len(toy.clients)} clients in turn"


def private_memory_does_not_travel(strategy: Strategy[Any]) -> str:
    """No tensor of a reply equals, bit by bit, one in the memory that the client keeps afterwards.

    What may travel need not be remembered; what is a client's own, such as a head, must not be in
    its reply. Memory that was zero so far is exempt: a difference to it is what replaces it.
    """
    if not strategy.remembers:
        raise NotApplicable("clients keep no memory")
    toy = toy_for(strategy)
    played = play(strategy, toy, rounds=1)
    for number in (2, 3):
        before = {client: dict(own) for client, own in toy.memory.items()}
        first = len(played.replies)
        turn(strategy, toy, played, toy.clients)
        for reply in played.replies[first:]:
            for k, client in enumerate(reply.clients):
                private = _private(before[client], toy.memory[client])
                for part, own in reply[k].trees.items():
                    bad = [(n, p) for n, x in own.items() for p, y in private if torch.equal(x, y)]
                    where = f"round {number}: tensor and private memory of {client}"
                    require(not bad, f"{where} are the same in tree {part!r}: {bad[:1]}")
    return "2 rounds"


def _private(before: dict[str, Tree], after: dict[str, Tree]) -> list[tuple[str, Tensor]]:
    """(name, tensor) of a client's memory, but for what is, or was, one value throughout."""
    found = []
    for part, own in after.items():
        for name, value in own.items():
            old = before.get(part, {}).get(name, value)
            if all(bool((x != x.flatten()[0]).any()) for x in (old, value)):
                found.append((f"{part}/{name}", value))
    return found


def personal_adapters_are_complete(strategy: Strategy[Any]) -> str:
    """``personal`` gives every trainable tensor of every client, stacked, in the model's dtypes.

    Where clients keep nothing, it is the global adapter, to rounding in float64; also for clients
    that have not taken part yet.
    """
    toys = [toy_for(strategy, dtype) for dtype in (torch.float32, torch.float64, torch.float64)]
    toys[-1].targets = {c: tree.scale(own, -0.5) for c, own in toys[-1].targets.items()}
    for toy in toys:
        state = play(strategy, toy, rounds=2, present=some).states[-1]
        for client, mine in used_by(strategy, toy, state, 3).items():
            if toy is not toys[0] and not strategy.remembers:
                wanted = stands_for(strategy, toy, state)
                require_close(mine, wanted, ROUNDING, f"{client} and the global one")
    return "clients have their own" if strategy.remembers else "the global adapter for all"


def what_clients_are_asked_is_declared(strategy: Strategy[Any]) -> str:
    """``asks`` names the gradients and losses that ``train`` asks of clients' data, no others.

    And ``steps``, where it gives ``fit`` a number of its own. No noise covers these: it is by this
    declaration that they are refused under privacy. ``walks`` tells whether clients walk, for which
    local settings are checked.
    """
    toy = toy_for(strategy)
    play(strategy, toy)
    declared, asked = set(strategy.asks()), toy.asked
    require(asked <= declared, f"it asks for {sorted(asked - declared)}, which asks() leaves out")
    require(declared <= asked, f"asks() names {sorted(declared - asked)}, which it never asks for")
    require(strategy.walks == toy.walked, f"walks={strategy.walks}, but clients do otherwise")
    return f"asks for {', '.join(sorted(asked)) or 'nothing beside training'}"


PROPERTIES: tuple[Callable[[Strategy[Any]], str], ...] = (
    the_order_of_clients_changes_nothing,
    the_size_of_stacks_changes_nothing,
    a_common_factor_on_weights_changes_nothing,
    unequal_weights_matter,
    every_reply_counts,
    absent_clients_have_no_influence,
    a_client_that_was_away_is_not_forgotten,
    nothing_of_one_client_reaches_another,
    private_memory_is_its_owners_alone,
    private_memory_does_not_travel,
    personal_adapters_are_complete,
    what_clients_are_asked_is_declared,
)
"""The properties of this file."""
