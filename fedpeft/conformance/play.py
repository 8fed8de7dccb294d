"""Runs on the toy federation, and comparisons of what they leave."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fedpeft import tree
from fedpeft.conformance.finding import require
from fedpeft.conformance.toy import Arrays, Toy, make
from fedpeft.record import codec
from fedpeft.strategy import Cohort, Messages, Strategy, addressed
from fedpeft.tree import Tree

ROUNDING = 1e-9
"""What counts as equal in float64: sums in another order differ by 1e-16 of a value, and server
optimizers and SVDs enlarge that by their condition; a wrong rule differs by 1e-3 and more."""


@dataclass(frozen=True)
class Played:
    """A run: the states before round 1 and after each round, and the messages both ways."""

    states: list[Any]
    sent: list[Messages]
    replies: list[Messages]


Present = Callable[[int, tuple[str, ...]], Iterable[str]]
"""``(round, all clients) -> who takes part``."""


def everyone(round: int, clients: tuple[str, ...]) -> Iterable[str]:
    """All clients in every round."""
    return clients


def some(round: int, clients: tuple[str, ...]) -> Iterable[str]:
    """Every other client in round 1, the next two in round 2, all in round 3; a lone one always."""
    if len(clients) == 1:
        return clients
    return {1: clients[::2], 2: clients[1:3]}.get(round, clients)


def play(
    strategy: Strategy[Any], toy: Toy, rounds: int = 3, present: Present = everyone, size: int = 99
) -> Played:
    """Runs ``rounds`` rounds, training in stacks of ``size`` clients."""
    played = Played([strategy.init(toy.problem(rounds))], [], [])
    for number in range(1, rounds + 1):
        turn(strategy, toy, played, tuple(present(number, toy.clients)), size)
    return played


def turn(
    strategy: Strategy[Any], toy: Toy, played: Played, clients: tuple[str, ...], size: int = 99
) -> None:
    """One more round of ``played``, with these clients."""
    state = played.states[-1]
    for _ in range(strategy.exchanges):
        stacks = sent_to(strategy, state, len(played.states), clients)
        parts = [
            answered(strategy, p, toy.cohort(p.clients))
            for sent in stacks
            for p in sent.split(size)
        ]
        state = strategy.receive(state, iter(parts))
        played.sent.extend(stacks)
        played.replies.extend(parts)
    played.states.append(state)


def answered(strategy: Strategy[Any], sent: Messages, cohort: Cohort) -> Messages:
    """The clients' half: their replies, which leave them as they are."""
    reply = strategy.train(sent, cohort)
    strategy.left(sent, reply, cohort)
    return reply


def sent_to(
    strategy: Strategy[Any], state: Any, number: int, clients: Sequence[str]
) -> list[Messages]:
    """What is sent to these clients in a round: a stack for each of the strategy's groups."""
    return addressed(strategy, state, number, clients)


def replied(strategy: Strategy[Any], toy: Toy, state: Any, number: int) -> dict[str, Messages]:
    """Every client's reply in a round, alone in its stack: client -> reply. Changes no state."""
    found: dict[str, Messages] = {}
    for sent in sent_to(strategy, state, number, toy.clients):
        reply = answered(strategy, sent, toy.cohort(sent.clients))
        found |= {client: reply.rows([k]) for k, client in enumerate(reply.clients)}
    return found


def toy_for(strategy: Strategy[Any], dtype: torch.dtype = torch.float64) -> Toy:
    """Five unequal clients, or the one pooled client of a strategy that pools."""
    return make(1 if strategy.pools else 5, dtype)


def arrays(adapter: Tree) -> Arrays:
    """A tree as numpy arrays that share nothing with it."""
    return {name: t.numpy().copy() for name, t in adapter.items()}


def distance(left: Tree, right: Tree) -> float:
    """The largest difference, relative to the largest entry of ``right``; same names and dtypes."""
    tree.check_same(left, right)
    most = max(float((left[n].double() - right[n].double()).abs().max()) for n in left)
    return most / max(float(t.double().abs().max()) for t in right.values())


def equal(left: Tree, right: Tree) -> bool:
    """Bit-equal trees."""
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def meaning(toy: Toy, adapter: Tree, base: Tree | None = None) -> Tree:
    """What an adapter does: the dense update of every LoRA layer, and every other tensor itself.

    Two pairs of factors with one product are one adapter, and so are those whose product is folded
    into the base: ``base`` is how far that is from the pretrained. Of a stacked adapter, stacked.
    """
    found = {layer: toy.update(adapter, layer) for layer in toy.scaling}
    for layer, change in (base or {}).items():
        found[layer] = found[layer] + change
    return found | tree.select(adapter, lambda name: ".lora_" not in name)


def stands_for(strategy: Strategy[Any], toy: Toy, state: Any) -> Tree:
    """The meaning of the global adapter, on the base as it is by now."""
    return meaning(toy, strategy.adapter(state), strategy.base(state))


def trained_by(toy: Toy, client: str) -> Tree:
    """The meaning of what a client last trained."""
    return meaning(toy, toy.trained[client], toy.bases[client])


def used_by(strategy: Strategy[Any], toy: Toy, state: Any, number: int) -> dict[str, Tree]:
    """The meaning of what every client would use in a round: client -> tree.

    Raises ValueError where a client's adapter has not the model's names, shapes and dtypes.
    """
    found = {}
    for sent in sent_to(strategy, state, number, toy.clients):
        cohort = toy.cohort(sent.clients)
        own, base = strategy.personal(sent, cohort), strategy.followed(sent, cohort)
        for k, client in enumerate(sent.clients):
            mine = tree.row(own, k)
            tree.check_same(toy.initial, mine, f"the model and the adapter of {client}")
            found[client] = meaning(toy, mine, base)
    return found


def outcome(strategy: Strategy[Any], played: Played, toy: Toy) -> Tree:
    """What a run leaves: the meaning of the global adapter and of everybody's own."""
    state, number = played.states[-1], len(played.states)
    whole = stands_for(strategy, toy, state)
    for client, own in sorted(used_by(strategy, toy, state, number).items()):
        whole |= {f"{n} of {client}": t for n, t in own.items()}
    return whole


def gap(left: Tree, right: Tree) -> tuple[float, str]:
    """The largest relative difference of two trees, and the tensor where it is.

    Of each tensor the Frobenius norm of the difference over that of ``right``, or over a thousandth
    of the largest norm in ``right`` where that is more; infinite where NaN is on one side. Raises
    Finding where names differ.
    """
    require(left.keys() == right.keys(), f"tensors differ: {sorted(left.keys() ^ right.keys())}")
    if not right:
        return 0.0, ""
    norms = {name: float(value.double().norm()) for name, value in right.items()}
    floor = max(1e-3 * max(norms.values()), 1e-30)
    sizes = {
        name: float((left[name].double() - right[name].double()).norm()) / max(norms[name], floor)
        for name in right
    }
    sizes = {name: math.inf if math.isnan(size) else size for name, size in sizes.items()}
    worst = max(sizes, key=lambda name: sizes[name])
    return sizes[worst], worst


def require_close(left: Tree, right: Tree, bound: float, what: str) -> float:
    """Raises Finding, beginning with ``what``, where the gap is above ``bound``; returns it."""
    size, name = gap(left, right)
    require(size <= bound, f"{what}: {name} differs by {size:.1e} (at most {bound:.0e})")
    return size


def numbers(value: Any, at: str = "state") -> Tree:
    """All tensors and numbers of a state, under their place in it; numbers as float64."""
    if isinstance(value, Tensor):
        return {at: value}
    if isinstance(value, bool | int | float):
        return {at: torch.tensor(float(value), dtype=torch.float64)}
    parts: Iterable[tuple[object, Any]] = ()
    if dataclasses.is_dataclass(value):
        parts = vars(value).items()
    elif isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    found: Tree = {}
    for name, part in parts:
        found |= numbers(part, f"{at}.{name}")
    return found


def state_bits(state: Any) -> tuple[str, bytes]:
    """A whole state as a checkpoint holds it: JSON text and safetensors bytes."""
    tensors, plan = codec.encode(state)
    return json.dumps(plan), _bits(tensors)


def message_bits(messages: Messages) -> tuple[str, bytes, object]:
    """Everything that a stack of messages holds, for comparison bit by bit."""
    tensors: dict[str, Tensor] = {}
    trees = {part: tree.sort(messages.trees[part]) for part in sorted(messages.trees)}
    content = [trees, tree.sort(messages.scalars), messages.clients]
    plan = json.dumps(codec.pack(content, "messages", tensors))
    return plan, _bits(tensors), messages.blobs


def _bits(tensors: dict[str, Tensor]) -> bytes:
    data: bytes = save(
        {n: x.clone(memory_format=torch.contiguous_format) for n, x in tensors.items()}
    )
    return data
