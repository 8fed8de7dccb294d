"""What an aggregate must be: of one client, of equal clients, in LoRA's updates, against an oracle.

Every function here checks one property of a strategy; see ``finding.Property``. They compare what
adapters do (``play.meaning``), because factors may be turned without changing their product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fedpeft import tree
from fedpeft.conformance.finding import NotApplicable, Property, require
from fedpeft.conformance.play import (
    ROUNDING,
    Played,
    Present,
    everyone,
    gap,
    meaning,
    numbers,
    play,
    require_close,
    some,
    stands_for,
    toy_for,
    trained_by,
    turn,
    used_by,
)
from fedpeft.conformance.toy import Arrays, Toy, a_of, b_of, make
from fedpeft.intake import average
from fedpeft.strategy import Messages, Strategy
from fedpeft.tree import Tree

EXACT = {torch.float64: ROUNDING, torch.float32: 1e-6}
"""How closely an exact aggregate meets the mean of updates: 8 roundings of float32, the cast of two
factors and their product; whatever else is lost was computed in float32 and need not have been."""

INEXACT = 1e-5
"""From here on, in float64, an aggregate is another one than the mean of updates."""

PARTS: tuple[Callable[[list[Messages]], list[list[Messages]]], ...] = (
    lambda own: [own],
    lambda own: [own[:1], own[1:]],
    lambda own: [own[1::2], own[::2]],
)
"""How replies are divided into parts: all in one, and in two ways in two."""

Oracle = Callable[[Toy, int, Present], Arrays]
"""``(toy, rounds, present) -> the global adapter``: a paper's rule in plain numpy.

It may also give the dense update of every LoRA layer, under the layer's name, and other tensors.
"""


def one_client_is_local_training(strategy: Strategy[Any]) -> str:
    """With one client the adapter is what that client trained, globally and its own (T3, m = 1).

    To rounding in float64, after 1 and 2 rounds, so that nothing of earlier rounds is averaged in.
    Truncated SVDs lose nothing here: the update of one client fits the rank. A strategy whose
    server takes steps of its own declares ``averages = False``.
    """
    if not strategy.averages:
        raise NotApplicable("averages=False: the server takes steps of its own")
    most = 0.0
    for rounds in (1, 2):
        toy = make(1)
        played = play(strategy, toy, rounds)
        state, client, what = played.states[-1], toy.clients[0], f"after round {rounds}"
        if client not in toy.trained:  # a first round that only prepares
            continue
        own, wanted = used_by(strategy, toy, state, rounds + 1)[client], trained_by(toy, client)
        most = max(most, require_close(own, wanted, ROUNDING, f"{what}, personal"))
        if strategy.shares:
            found = stands_for(strategy, toy, state)
            most = max(most, require_close(found, wanted, ROUNDING, f"{what}, adapter(state)"))
    return f"differs by {most:.0e}"


def equal_clients_give_what_any_of_them_gives(strategy: Strategy[Any]) -> str:
    """Five clients with the same data and steps leave what one of them alone leaves (IT3).

    To rounding in float64, and whatever their weights are. Not where clients begin from draws of
    their own, and so train to different adapters.
    """
    if strategy.pools:
        raise NotApplicable("there is one client, the pool")
    many, one = toy_for(strategy), make(1)
    for client in many.clients:
        many.targets[client] = one.targets[one.clients[0]]
        many.steps[client] = one.steps[one.clients[0]]
    found, wanted = (
        stands_for(strategy, toy, play(strategy, toy).states[-1]) for toy in (many, one)
    )
    first = trained_by(many, many.clients[0])
    if any(gap(trained_by(many, c), first)[0] > ROUNDING for c in many.clients):
        raise NotApplicable("equal clients train to different adapters: they begin from draws")
    most = require_close(found, wanted, ROUNDING, "five equal clients and one alone")
    return f"differs by {most:.0e}"


def no_movement_changes_nothing(strategy: Strategy[Any]) -> str:
    """While clients train with learning rate 0 the adapter does what it did, to rounding.

    From the start; and after one round of training, unless the server takes steps of its own
    (momentum moves on).
    """
    for warm in (False, True) if strategy.averages else (False,):
        toy = toy_for(strategy)
        played = play(strategy, toy, int(warm))
        toy.lr = toy.stride = 0.0
        before = stands_for(strategy, toy, played.states[-1])
        for number in (1, 2):
            turn(strategy, toy, played, toy.clients)
            now = stands_for(strategy, toy, played.states[-1])
            what = f"round {number} without training, {'after one' if warm else 'from the start'}"
            require_close(now, before, ROUNDING, what)
    return "2 rounds without training"


def exact_as_declared(strategy: Strategy[Any]) -> str:
    """``exact``: every layer's update is the mean by weight of the clients' updates (T1).

    After every round, clients away in some, s != 1, on wide, square and tall layers; relative to
    the mean update, within 1e-6 in float32 and 1e-9 in float64. Without ``exact`` it must be off by
    1e-5 somewhere: a strategy that is exact has to say so.
    """
    if strategy.pools:
        raise NotApplicable("one client: its update is the mean")
    if not strategy.shares:
        require(not strategy.exact, "exact=True, but there is no global adapter (shares=False)")
        raise NotApplicable("there is no global adapter")
    most = {dtype: (0.0, "") for dtype in EXACT}
    for dtype, bound in EXACT.items():
        for number, layers in _inexactness(strategy, toy_for(strategy, dtype)):
            for layer, off in layers.items():
                most[dtype] = max(most[dtype], (off, f"round {number}, {layer}"))
        off, where = most[dtype]
        if strategy.exact:
            require(
                off <= bound,
                f"exact=True, but the update is {off:.1e} off the mean of the clients' "
                f"({where}, {dtype}; at most {bound:.0e})",
            )
    off, where = most[torch.float64]
    if not strategy.exact:
        require(
            off > INEXACT,
            f"exact=False, but updates are the clients' mean to {off:.1e}: declare it",
        )
    return f"declared {strategy.exact}, off by {off:.0e}"


def _inexactness(strategy: Strategy[Any], toy: Toy) -> Iterator[tuple[int, dict[str, float]]]:
    """Round by round: layer -> ||dW - sum_k p_k dW_k|| / ||sum_k p_k dW_k||."""
    played = Played([strategy.init(toy.problem())], [], [])
    for number in (1, 2, 3):
        clients = tuple(some(number, toy.clients))
        toy.trained.clear()
        turn(strategy, toy, played, clients)
        if not toy.trained:
            continue
        mean = _mean(toy, clients, [trained_by(toy, c) for c in clients])
        found = stands_for(strategy, toy, played.states[-1])
        layers = {n: gap({n: found[n]}, {n: mean[n]})[0] for n in toy.scaling}
        yield number, layers


def _mean(toy: Toy, clients: tuple[str, ...], own: list[Tree]) -> Tree:
    weight = torch.tensor([toy.weights[c] for c in clients], dtype=torch.float64)
    doubles = [{n: x.double() for n, x in one.items()} for one in own]
    return tree.mean([(tree.stack(doubles), weight)])


def other_tensors_are_averaged_or_left_alone(strategy: Strategy[Any]) -> str:
    """What is not LoRA (a head) is the mean by weight of what clients trained, or stays as it was.

    To rounding in float64, after every round, clients away in some. A head that was trained must
    not be lost, unless the server takes steps of its own or there is no global adapter.
    """
    if not (strategy.averages and strategy.shares):
        raise NotApplicable("the server takes steps of its own, or there is no global adapter")
    toy = toy_for(strategy)
    played = Played([strategy.init(toy.problem())], [], [])
    averaged: set[str] = set()
    for number in (1, 2, 3):
        clients = toy.clients if strategy.pools else tuple(some(number, toy.clients))
        before = strategy.adapter(played.states[-1])
        toy.trained.clear()
        turn(strategy, toy, played, clients)
        if not toy.trained:
            continue
        after = strategy.adapter(played.states[-1])
        mean = _mean(toy, clients, [toy.trained[c] for c in clients])
        for name in (n for n in after if ".lora_" not in n):
            if torch.equal(after[name], before[name]) and (
                strategy.remembers or name not in toy.moved
            ):
                continue
            averaged.add(name)
            require_close({name: after[name]}, {name: mean[name]}, ROUNDING, f"round {number}")
    return f"{len(averaged)} averaged"


def linear_as_declared(strategy: Strategy[Any]) -> str:
    """``linear``: replies averaged in parts, with their total weights, leave the same state (T9).

    To rounding in float64, for all replies in one part, and in two ways in two. Where clients keep
    what they were sent (``keeps``), workers hand on whole replies, as the state must know whose
    they are; then what it stands for is compared. Without ``linear`` nothing is asked; if it would
    hold, the line says so.
    """
    try:
        most, where = _gap_of_parts(strategy)
    except Exception as error:
        if strategy.linear:
            raise
        return f"declared False; replies in parts are refused ({type(error).__name__})"
    if strategy.linear:
        require(
            most <= ROUNDING,
            f"linear=True, but with replies averaged in parts the state differs by {most:.1e} "
            f"(at most {ROUNDING:.0e}; {where})",
        )
    elif most <= ROUNDING:
        return "declared False; it would hold"
    return f"declared {strategy.linear}, differs by {most:.0e}"


def _gap_of_parts(strategy: Strategy[Any]) -> tuple[float, str]:
    toy, most = toy_for(strategy), (0.0, "")
    played = Played([strategy.init(toy.problem())], [], [])
    for number in (1, 2, 3):
        first = len(played.replies)
        turn(strategy, toy, played, tuple(some(number, toy.clients)), size=1)
        own, wanted = played.replies[first:], _compared(strategy, toy, played.states[-1])
        size = len(own) // strategy.exchanges
        for split in PARTS:
            after = played.states[-2]
            for k in range(strategy.exchanges):
                parts = split(own[k * size : (k + 1) * size])
                rows = [average(part, f"part {n}") for n, part in enumerate(parts) if part]
                after = strategy.receive(after, iter(rows))
            most = max(most, gap(_compared(strategy, toy, after), wanted))
    return most


def _compared(strategy: Strategy[Any], toy: Toy, state: Any) -> Tree:
    return stands_for(strategy, toy, state) if strategy.keeps else numbers(state)


def frozen_tensors_stay(strategy: Strategy[Any]) -> str:
    """A tensor that no client trained in a round has the same bits after it (T7).

    Also where a server's momentum could move it. Exempt are LoRA's factors of an exact strategy,
    which may be turned together: ``exact_as_declared`` holds their product.
    """
    if not strategy.shares:
        raise NotApplicable("there is no global adapter")
    toy = toy_for(strategy)
    played = Played([strategy.init(toy.problem())], [], [])
    frozen: set[str] = set()
    for number in (1, 2, 3):
        before = strategy.adapter(played.states[-1])
        toy.moved.clear()
        turn(strategy, toy, played, toy.clients)
        after = strategy.adapter(played.states[-1])
        for name in before.keys() - toy.moved:
            if strategy.exact and ".lora_" in name:
                continue
            frozen.add(name)
            same = torch.equal(before[name], after[name])
            require(same, f"round {number}: nobody trained {name}, but it changed")
    return f"{len(frozen)} frozen"


def clients_share_what_they_do_not_train(strategy: Strategy[Any]) -> str:
    """A tensor that a round does not train has the same bits on all its clients (RO2).

    Unless clients keep private memory.
    """
    if strategy.remembers:
        raise NotApplicable("clients keep memory of their own")
    toy = toy_for(strategy)
    played = Played([strategy.init(toy.problem())], [], [])
    shared: set[str] = set()
    for number in (1, 2, 3):
        toy.moved.clear()
        toy.trained.clear()
        turn(strategy, toy, played, toy.clients)
        if not toy.trained:
            continue
        first = toy.trained[toy.clients[0]]
        shared |= first.keys() - toy.moved
        for client in toy.clients[1:]:
            own = toy.trained[client]
            bad = [n for n in first if n not in toy.moved and not torch.equal(first[n], own[n])]
            require(not bad, f"round {number}: {bad[:1]} of {client} is not the others'")
    return f"{len(shared)} shared"


def factors_are_not_told_apart_by_shape(strategy: Strategy[Any]) -> str:
    """A layer whose A and B could be taken for each other (r = d_in = d_out) is treated as others.

    With one client its update is what that client trained, to rounding in float64.
    """
    if not strategy.averages:
        raise NotApplicable("averages=False: the server takes steps of its own")
    toy = make(1)
    for layer in toy.scaling:
        draw = torch.Generator().manual_seed(3)
        square = torch.randn(3, 3, generator=draw, dtype=torch.float64)
        toy.initial[a_of(layer)] = square
        toy.initial[b_of(layer)] = torch.zeros(3, 3, dtype=torch.float64)
        toy.targets[toy.clients[0]][layer] = square @ square.T - 1
    played = play(strategy, toy, 2)
    own = used_by(strategy, toy, played.states[-1], 3)[toy.clients[0]]
    most = require_close(own, trained_by(toy, toy.clients[0]), ROUNDING, "personal")
    return f"differs by {most:.0e}"


def unused_ranks_do_no_harm(strategy: Strategy[Any]) -> str:
    """Ranks that do nothing (a zero row of A, a zero column of B) lose and break nothing.

    So it is where unequal ranks are padded to the largest (``tree.pad``), and where factors are
    rank-deficient, of which an SVD or a solve can make NaN. With one client the update is that
    client's, to rounding in float64; with five all is finite.
    """
    most = 0.0
    for toy in (make(1), toy_for(strategy)):
        for layer in toy.scaling:
            toy.initial[a_of(layer)][-1] = 0
        played = play(strategy, toy)
        own = used_by(strategy, toy, played.states[-1], 4)
        for client, tensors in own.items():
            bad = [name for name, x in tensors.items() if not bool(torch.isfinite(x).all())]
            require(not bad, f"{client}: {bad[:1]} is not finite")
        if len(own) == 1 and strategy.averages:
            (client,) = own
            most = require_close(own[client], trained_by(toy, client), ROUNDING, "one client")
    return f"differs by {most:.0e}"


def agrees_with(oracle: Oracle, bound: float = ROUNDING) -> Property:
    """The property that 3 rounds give the global adapter that ``oracle`` gives, all or some there.

    Meanings are compared, within ``bound`` in float64. This is where the kit learns the paper's
    rule: what a strategy declares leaves open which mean, step or correction it computes.
    """

    def the_rule_is_the_oracles(strategy: Strategy[Any]) -> str:
        most = 0.0
        for who, present in (("all", everyone), ("some", some)):
            toy = toy_for(strategy)
            states = play(strategy, toy, 3, present).states
            for rounds in (1, 2, 3):
                arrays = oracle(toy_for(strategy), rounds, present)
                wanted = {n: torch.from_numpy(x) for n, x in arrays.items()}
                if not toy.scaling.keys() <= wanted.keys():
                    wanted = meaning(toy, wanted)
                found = stands_for(strategy, toy, states[rounds])
                what = f"{who} clients, after round {rounds}"
                most = max(most, require_close(found, wanted, bound, what))
        return f"differs by {most:.0e}"

    return the_rule_is_the_oracles


PROPERTIES: tuple[Property, ...] = (
    one_client_is_local_training,
    equal_clients_give_what_any_of_them_gives,
    no_movement_changes_nothing,
    exact_as_declared,
    other_tensors_are_averaged_or_left_alone,
    linear_as_declared,
    frozen_tensors_stay,
    clients_share_what_they_do_not_train,
    factors_are_not_told_apart_by_shape,
    unused_ranks_do_no_harm,
)
"""The properties of this file."""
