"""The contract of the four verbs: what goes in and out, and that nothing else does.

Every function here checks one property of a strategy; see ``finding.Property``.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpeft import tree
from fedpeft.cohort.shelf import PREFIX, Shelf
from fedpeft.comms.ledger import message_bytes
from fedpeft.conformance.finding import Finding, NotApplicable, require
from fedpeft.conformance.play import (
    Played,
    answered,
    message_bits,
    play,
    sent_to,
    some,
    state_bits,
    toy_for,
    turn,
)
from fedpeft.conformance.toy import Toy, make
from fedpeft.errors import FedpeftError
from fedpeft.record import Checkpoint, latest, save
from fedpeft.strategy import Messages, Strategy
from fedpeft.tree import Tree
from fedpeft.validate import check_stack


def states_are_frozen_data(strategy: Strategy[Any]) -> str:
    """Strategy and state are frozen dataclasses; a checkpoint can hold every state."""
    for value in (strategy, strategy.init(toy_for(strategy).problem())):
        params: Any = vars(type(value)).get("__dataclass_params__")
        frozen = params is not None and params.frozen
        require(frozen, f"{type(value).__name__} is not a frozen dataclass")
    own: Any = strategy
    settings = {f.name: vars(strategy)[f.name] for f in dataclasses.fields(own)}
    require(type(strategy)(**settings) == strategy, "equal settings do not compare as equal")
    states = play(strategy, toy_for(strategy), present=some).states
    kinds = {type(state).__name__ for state in states}
    require(len(kinds) == 1, f"the state changes its class: {sorted(kinds)}")
    return f"{next(iter(kinds))}, {len(state_bits(states[-1])[1]):,} bytes"


def the_adapter_names_every_trainable_tensor(strategy: Strategy[Any]) -> str:
    """``adapter(state)`` has the model's names, shapes and dtypes after every round, all finite.

    In float32 and float64: a sum that was made in float64 has to be cast back.
    """
    for dtype in (torch.float32, torch.float64):
        toy = toy_for(strategy, dtype)
        for number, state in enumerate(play(strategy, toy, present=some).states):
            adapter = strategy.adapter(state)
            try:
                tree.check_same(toy.initial, adapter, "the model and adapter(state)")
            except ValueError as error:
                raise Finding(f"after round {number}, in {dtype}: {error}") from None
            _finite(f"adapter after round {number}", adapter)
    return f"{len(toy.initial)} tensors"


def messages_are_stacked(strategy: Strategy[Any]) -> str:
    """Trees are ``[K, ...]`` and finite, scalars ``[K]`` float64, blobs K; rows are the clients'.

    In a float32 federation no tensor is of another floating type: it would cost other bytes than
    the plan says, and a cohort would compute in another precision.
    """
    toy = toy_for(strategy, torch.float32)
    played = play(strategy, toy, present=some)
    asked = [client for number in (1, 2, 3) for client in some(number, toy.clients)]
    asked *= strategy.exchanges
    told = [client for sent in played.sent for client in sent.clients]
    require(sorted(told) == sorted(asked), f"messages go to {told}, not to {asked}")
    for number, (sent, reply) in enumerate(zip(played.sent, played.replies, strict=True), 1):
        same = reply.clients == sent.clients
        require(same, f"reply {number} has clients {reply.clients}, not {sent.clients}")
        _stacked(f"message {number}", sent)
        _stacked(f"reply {number}", reply)
    parts = {*played.sent[0].trees} | {*played.replies[0].trees}
    return f"trees {', '.join(sorted(parts)) or '(none)'}"


def _stacked(where: str, messages: Messages) -> None:
    k = len(messages)
    for part, own in messages.trees.items():
        for name, value in own.items():
            at = f"{where}, tree {part!r}, {name}"
            require(value.shape[:1] == (k,), f"{at}: {tuple(value.shape)} for {k} clients")
            odd = value.is_floating_point() and value.dtype != torch.float32
            require(not odd, f"{at}: is {value.dtype} in a float32 federation")
            require(not value.requires_grad, f"{at}: carries a graph")
        _finite(f"{where}, tree {part!r}", own)
    for name, scalar in messages.scalars.items():
        right = scalar.shape == (k,) and scalar.dtype == torch.float64
        require(right, f"{where}, scalar {name!r}: {scalar.dtype} {tuple(scalar.shape)}")
        require(bool(scalar.isfinite().all()), f"{where}, scalar {name!r} is not finite")
    for name, blobs in messages.blobs.items():
        require(len(blobs) == k, f"{where}, blob {name!r}: {len(blobs)} for {k} clients")


def _finite(where: str, values: Tree) -> None:
    for name, value in values.items():
        require(bool(torch.isfinite(value).all()), f"{where}: {name} is not finite")


def replies_are_what_was_announced(strategy: Strategy[Any]) -> str:
    """Each reply holds the trees that ``expects`` says, its own weight, and its training loss.

    Checked as the round loop checks them, for every client's message: what is refused there would
    exclude the client from the round. ``remembers`` tells whether clients keep private memory,
    ``keeps`` whether they may keep what the server sent (not all settings need to).
    """
    toy = toy_for(strategy)
    played = play(strategy, toy)
    for sent, reply in zip(played.sent, played.replies, strict=True):
        require("loss" in reply.scalars, "the scalar 'loss' is missing from the reply")
        for k, client in enumerate(reply.clients):
            like = strategy.expects(sent[k])
            _, reasons = check_stack(reply.rows([k]), like, {client: toy.weights[client]})
            require(not reasons, f"{client}: {reasons.get(client)}")
    kept = bool(toy.memory)
    require(
        kept == strategy.remembers,
        f"remembers={strategy.remembers}, but clients {'keep' if kept else 'keep no'} memory",
    )
    shelved = bool(toy.shelf.memory())
    require(
        strategy.keeps or not shelved,
        "keeps=False, but clients keep what the server sent",
    )
    return f"trees {', '.join(sorted(played.replies[0].trees)) or '(none)'}"


def the_base_changes_as_declared(strategy: Strategy[Any]) -> str:
    """``base`` changes LoRA layers only, in their shape, and only where ``folds`` says so.

    Without ``folds`` nobody has checked that the frozen weights can take a change and give it back.
    """
    toy, changed = toy_for(strategy), 0
    for number, state in enumerate(play(strategy, toy, present=some).states):
        base = strategy.base(state)
        require(strategy.folds or not base, f"folds=False, but after round {number} base changes")
        for layer, change in base.items():
            require(layer in toy.scaling, f"base names {layer!r}, which is no LoRA layer")
            wanted, got = tuple(toy.weight(layer).shape), tuple(change.shape)
            require(got == wanted, f"the base's change of {layer} is {got}, not {wanted}")
        _finite(f"the base after round {number}", base)
        changed += bool(base)
    return f"changed after {changed} of 3 rounds"


def nothing_given_is_written_to(strategy: Strategy[Any]) -> str:
    """State, messages, replies and the initial adapter have the same bits after every verb.

    They are shared: the initial adapter by all clients, a broadcast message by its rows, the state
    by whoever keeps it for a resume.
    """
    toy = toy_for(strategy)
    state = strategy.init(toy.problem())
    kept = {name: value.clone() for name, value in toy.initial.items()}
    for number in (1, 2, 3):
        for sent in sent_to(strategy, state, number, toy.clients):
            before, told = state_bits(state), message_bits(sent)
            strategy.personal(sent, toy.cohort(sent.clients))
            same = (state_bits(state), message_bits(sent)) == (before, told)
            require(same, f"round {number}: personal changed the state or the messages")
        for _ in range(strategy.exchanges):
            state = _untouched_exchange(strategy, toy, state, number)
        changed = [n for n, value in kept.items() if not torch.equal(value, toy.initial[n])]
        require(not changed, f"round {number}: the initial adapter changed, at {changed[:1]}")
    return "3 rounds"


def _untouched_exchange(strategy: Strategy[Any], toy: Toy, state: Any, number: int) -> Any:
    before, replies = state_bits(state), []
    for sent in sent_to(strategy, state, number, toy.clients):
        sent_before, cohort = message_bits(sent), toy.cohort(sent.clients)
        replies.append(answered(strategy, sent, cohort))
        require(message_bits(sent) == sent_before, f"round {number}: the messages changed")
    told = [message_bits(reply) for reply in replies]
    after = strategy.receive(state, iter(replies))
    strategy.adapter(after)
    same = told == [message_bits(reply) for reply in replies]
    require(same, f"round {number}: the replies changed")
    require(state_bits(state) == before, f"round {number}: the state given changed")
    return after


def a_resume_goes_on_bit_by_bit(strategy: Strategy[Any]) -> str:
    """A run that goes on from a checkpoint, as it is written and read, gives the same bits.

    State and the clients' private memory, the messages of the next round, the state after it.
    """
    toy = toy_for(strategy, torch.float32)
    played = play(strategy, toy, rounds=2, present=some)
    again = toy_for(strategy, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), Checkpoint(2, played.states[-1], _memory(toy), {}), 1)
        read, _ = latest(Path(folder), type(played.states[-1]))
    kept = {c: {n: dict(t) for n, t in own.items()} for c, own in read.memory.items()}
    again.shelf = Shelf.of(kept)
    for client, own in kept.items():
        private = {n: t for n, t in own.items() if not n.startswith(PREFIX)}
        again.memory |= {client: private} if private else {}
    require(state_bits(read.state) == state_bits(played.states[-1]), "the state came back changed")
    resumed = Played([read.state] * 3, [], [])
    first = len(played.sent)
    turn(strategy, toy, played, toy.clients)
    turn(strategy, again, resumed, toy.clients)
    told, again_told = ([message_bits(m) for m in p] for p in (played.sent[first:], resumed.sent))
    require(told == again_told, "another message is sent after a resume")
    require(
        state_bits(resumed.states[-1]) == state_bits(played.states[-1]),
        "another state follows after a resume",
    )
    return "round 3 after a resume of round 2"


def _memory(toy: Toy) -> dict[str, dict[str, Tree]]:
    """All that clients keep, as a checkpoint holds it: private memory, and what they were given."""
    shelved = toy.shelf.memory()
    names = sorted({*toy.memory, *shelved})
    return {c: toy.memory.get(c, {}) | shelved.get(c, {}) for c in names}


def equal_runs_are_equal_bit_by_bit(strategy: Strategy[Any]) -> str:
    """Two runs of one seed have the same bits, and no global generator is drawn from or set.

    All random draws come from ``fedpeft.streams`` under the problem's seed, or they would depend on
    the order in which clients train.
    """
    before = (torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()))
    pure = random.getstate()
    one, two = (play(strategy, toy_for(strategy, torch.float32)) for _ in range(2))
    _same_runs(one, two, "a second run differs")
    after = (torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()))
    require(before == after and pure == random.getstate(), "a global random generator was used")
    return "2 runs of 3 rounds"


def runs_know_nothing_of_each_other(strategy: Strategy[Any]) -> str:
    """Two runs that take turns give, bit by bit, what each gives alone: all memory is in the state.

    What a strategy keeps elsewhere (its instance, its module, a cache) is lost in a resume, and
    mixes runs.
    """
    wanted = [play(strategy, toy) for toy in _two_toys(strategy)]
    toys = _two_toys(strategy)
    mixed = [Played([strategy.init(toy.problem(3))], [], []) for toy in toys]
    for _ in range(3):
        for toy, played in zip(toys, mixed, strict=True):
            turn(strategy, toy, played, toy.clients)
    for alone, played in zip(wanted, mixed, strict=True):
        _same_runs(alone, played, "a run that takes turns with another differs")
    return "2 runs of 3 rounds"


def _two_toys(strategy: Strategy[Any]) -> tuple[Toy, Toy]:
    one, two = toy_for(strategy), toy_for(strategy)
    two.targets = {c: tree.scale(own, -0.5) for c, own in two.targets.items()}
    return one, two


def _same_runs(one: Played, two: Played, what: str) -> None:
    for number, (left, right) in enumerate(zip(one.sent, two.sent, strict=True), 1):
        require(message_bits(left) == message_bits(right), f"{what} in round {number}'s messages")
    for number, (left, right) in enumerate(zip(one.replies, two.replies, strict=True), 1):
        require(message_bits(left) == message_bits(right), f"{what} in round {number}'s replies")
    for number, (left, right) in enumerate(zip(one.states, two.states, strict=True)):
        require(state_bits(left) == state_bits(right), f"{what} in the state after round {number}")


def draws_depend_on_seed_and_layer(strategy: Strategy[Any]) -> str:
    """What a strategy draws itself differs with the run's seed, and between layers of one shape.

    Drawn is what differs from the initial adapter and is not one value throughout. It must not be
    the same under another seed, other initial values and other pretrained weights.
    """
    toy, fresh = toy_for(strategy), toy_for(strategy)
    fresh.initial = {n: x + x.mean() + 0.125 * (x != 0) for n, x in toy.initial.items()}
    fresh.pretraining = 1
    first = strategy.adapter(strategy.init(toy.problem(seed=7)))
    drawn = {
        name: value
        for name, value in first.items()
        if not torch.equal(value, toy.initial[name]) and bool((value != value.flatten()[0]).any())
    }
    if not drawn:
        raise NotApplicable("the strategy begins with the adapter as it was initialised")
    other = strategy.adapter(strategy.init(fresh.problem(seed=8)))
    for name, value in drawn.items():
        require(not torch.equal(value, other[name]), f"{name} is the same under every seed")
        twins = [n for n, x in drawn.items() if n != name and torch.equal(x, value)]
        require(not twins, f"{name} and {twins[:1]} are the same draw")
    return f"{len(drawn)} tensors"


def declared_bytes_are_the_serialised_bytes(strategy: Strategy[Any]) -> str:
    """The ledger's formula is the size of what Flower serialises, and that comes back unchanged.

    Exactly, for every client's message and reply of three rounds.
    """
    from fedpeft.flower.records import Header, decode, encode

    down = up = 0
    played = play(strategy, toy_for(strategy, torch.float32), present=some)
    for stack, back in [(s, False) for s in played.sent] + [(r, True) for r in played.replies]:
        for k, client in enumerate(stack.clients):
            content = encode(stack[k], Header(client=client))
            real = sum(part.count_bytes() for key, part in content.items() if key != "header")
            told = sum(message_bytes(stack[k]).values())
            require(told == real, f"{client}: {told} bytes counted, {real} serialised")
            again = Messages.stack((client,), [decode(content)[0]])
            require(
                message_bits(again) == message_bits(stack.rows([k])),
                f"{client}: a message does not survive serialisation",
            )
            down, up = (down, told) if back else (told, up)
    return f"{down:,} bytes down, {up:,} up for a client of the toy"


def another_adapter_works_or_is_refused_by_name(strategy: Strategy[Any]) -> str:
    """With an adapter that is not LoRA it works, or raises FedpeftError that names the way out.

    The message has to name the setting at fault (``strategy.``) and the one to change
    (``adapter.kind``).
    """
    toy = make(1 if strategy.pools else 5, lora=False)
    try:
        state = play(strategy, toy).states[-1]
    except FedpeftError as error:
        named = "strategy." in str(error) and "adapter.kind" in str(error)
        require(named, f"refused without naming strategy. and adapter.kind: {error}")
        return "refused by name"
    tree.check_same(toy.initial, strategy.adapter(state), "the model and adapter(state)")
    return "works"


def a_fleets_clock_can_be_told_and_tells(strategy: Strategy[Any]) -> str:
    """``efforts`` are of the clients asked, and possible; ``told`` gives a state that goes on.

    Neither writes into the state, and neither depends on the order of clients.
    """
    toy, found = toy_for(strategy), 0
    for number, state in enumerate(play(strategy, toy, present=some).states, 1):
        before, asked = state_bits(state), toy.clients[: 1 + number % len(toy.clients)]
        efforts = strategy.efforts(state, asked)
        require(set(efforts) <= set(asked), f"efforts of clients that were not asked, of {asked}")
        back = strategy.efforts(state, asked[::-1])
        require(dict(back) == dict(efforts), "efforts depend on the order of clients")
        for client, own in efforts.items():
            fine = 0 <= own.pruned < 1 and 0 < own.adapter <= 1 and own.forward >= 0
            require(fine and 0 <= own.step < float("inf"), f"{client}: {own} is not possible")
        times = {client: 1.0 + k for k, client in enumerate(asked)}
        one, two = strategy.told(state, times), strategy.told(state, dict([*times.items()][::-1]))
        require(state_bits(state) == before, "efforts or told changed the state")
        require(state_bits(one) == state_bits(two), "told depends on the order of clients")
        tree.check_same(strategy.adapter(state), strategy.adapter(one))
        sent_to(strategy, one, number, toy.clients)
        found += bool(efforts) + (state_bits(one) != before)
    if not found:
        raise NotApplicable("every client trains everything, and times do not matter")
    return "efforts and times"


PROPERTIES = (
    states_are_frozen_data,
    the_adapter_names_every_trainable_tensor,
    messages_are_stacked,
    replies_are_what_was_announced,
    the_base_changes_as_declared,
    nothing_given_is_written_to,
    a_resume_goes_on_bit_by_bit,
    equal_runs_are_equal_bit_by_bit,
    runs_know_nothing_of_each_other,
    draws_depend_on_seed_and_layer,
    declared_bytes_are_the_serialised_bytes,
    another_adapter_works_or_is_refused_by_name,
    a_fleets_clock_can_be_told_and_tells,
)
"""The properties of this file."""
