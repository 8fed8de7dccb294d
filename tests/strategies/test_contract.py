"""The conformance kit: what holds for every strategy, whatever its rule.

Walks every file in strategies/ with every value of its literal settings. Whether the rule itself is
the paper's is for the numeric oracles beside this file.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

from fedpeft import tree
from fedpeft.errors import FedpeftError
from fedpeft.intake import average
from fedpeft.record import codec
from fedpeft.strategy import (
    Messages,
    Strategy,
    addressed,
    available,
    build,
    load,
)
from fedpeft.tree import Tree
from tests.strategies.toy import (
    Played,
    Toy,
    distance,
    equal,
    make,
    meaning,
    play,
    some,
)

FILES = sorted((Path(__file__).parents[2] / "strategies").glob("[!_]*.py"))


def variants(name: str) -> list[dict[str, str]]:
    """Every combination of a strategy's literal settings."""
    choices = {
        key: get_args(hint)
        for key, hint in get_type_hints(load(name)).items()
        if get_origin(hint) is Literal
    }
    return [dict(zip(choices, one, strict=True)) for one in itertools.product(*choices.values())]


CASES = [
    pytest.param((path.stem, settings), id="-".join([path.stem, *settings.values()]))
    for path in FILES
    for settings in variants(path.stem)
]


@pytest.fixture(params=CASES)
def strategy(request: pytest.FixtureRequest) -> Strategy[Any]:
    return build(*request.param)


def toy_for(strategy: Strategy[Any], dtype: torch.dtype = torch.float64) -> Toy:
    """Five unequal clients, or the one pooled client of a strategy that pools."""
    return make(1 if strategy.pools else 5, dtype)


def to_bytes(state: Any) -> tuple[str, bytes]:
    """A whole state as a checkpoint holds it: JSON text and safetensors bytes."""
    tensors, plan = codec.encode(state)
    return json.dumps(plan), write_tensors(
        {n: x.clone(memory_format=torch.contiguous_format) for n, x in tensors.items()}
    )


def from_bytes(kind: type[Any], data: tuple[str, bytes]) -> Any:
    return codec.decode(kind, read_tensors(data[1]), json.loads(data[0]))


def message_bytes(messages: Messages) -> Any:
    """Everything that a stack of messages holds, for comparison bit by bit."""
    tensors: dict[str, Tensor] = {}
    content = [dict(messages.trees), dict(messages.scalars), messages.clients]
    plan = json.dumps(codec.pack(content, "messages", tensors))
    return (
        plan,
        write_tensors(
            {n: x.clone(memory_format=torch.contiguous_format) for n, x in tensors.items()}
        ),
        messages.blobs,
    )


def outcome(strategy: Strategy[Any], played: Played, toy: Toy) -> dict[str, Tensor]:
    """What a run leaves, as dense updates: the global adapter's and everybody's own."""
    state = played.states[-1]
    whole = meaning(toy, strategy.adapter(state), strategy.base(state))
    for client, own in personal(strategy, state, len(played.states), toy).items():
        whole.update({f"{client} {n}": t for n, t in own.items()})
    return whole


def personal(strategy: Strategy[Any], state: Any, round: int, toy: Toy) -> dict[str, Tree]:
    """What every client would use now, as dense updates."""
    found = {}
    for sent in addressed(strategy, state, round, toy.clients):
        cohort = toy.cohort(sent.clients)
        base, own = strategy.followed(sent, cohort), strategy.personal(sent, cohort)
        for k, client in enumerate(sent.clients):
            tree.check_same(tree.row(own, k), toy.initial)
            found[client] = meaning(toy, tree.row(own, k), base)
    return {client: found[client] for client in toy.clients}


def test_every_file_is_known_and_listed() -> None:
    assert sorted(available()) == [path.stem for path in FILES]
    assert (len(FILES), len(CASES)) == (23, 29)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_one_self_contained_algorithm(path: Path) -> None:
    text = path.read_text()
    module = ast.parse(text)
    header = ast.get_docstring(module) or ""
    assert re.search(r"arXiv \d{4}\.\d{5}|^Baseline, not a paper", header, re.M), "no source"
    assert re.search(r"<-|=|argmin", header), "no equation in the header"
    assert len(header.split("\n")[0]) <= 100
    assert 30 <= len(text.splitlines()) <= 150
    for node in ast.walk(module):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        assert not any(name.startswith("fedpeft.strategies") for name in names), "imports another"
    kind = load(path.stem)
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")
    assert kind() == kind(), "settings have defaults and are compared by value"


def test_states_are_frozen_dataclasses_of_data(strategy: Strategy[Any]) -> None:
    for state in play(strategy, toy_for(strategy)).states:
        assert state.__dataclass_params__.frozen
        to_bytes(state)


def test_the_adapter_keeps_the_names_shapes_and_dtypes_of_the_model(
    strategy: Strategy[Any],
) -> None:
    for dtype in (torch.float32, torch.float64):
        toy = toy_for(strategy, dtype)
        for state in play(strategy, toy, present=some).states:
            tree.check_same(strategy.adapter(state), toy.initial)


def test_messages_are_stacked_trees_of_trainable_tensors(strategy: Strategy[Any]) -> None:
    toy = toy_for(strategy, torch.float32)
    played = play(strategy, toy)
    names = [name for sent in played.sent for name in sent.clients]
    assert sorted(names) == sorted(3 * toy.clients)
    for messages in [*played.sent, *played.replies]:
        for own in messages.trees.values():
            for name, tensor in own.items():
                if name in toy.initial:
                    whole = (len(messages), *toy.initial[name].shape)
                    assert tensor.dim() == len(whole) and tensor.shape[0] == whole[0]
                    assert tensor.shape <= whole  # less where a client has a lower rank
                else:  # what takes a factor's place (a core, chosen columns), or changes the base
                    assert len(tensor) == len(messages)
                assert tensor.dtype == torch.float32 or not tensor.is_floating_point()
        for scalar in messages.scalars.values():
            assert scalar.shape == (len(messages),) and scalar.dtype == torch.float64
        assert all(len(own) == len(messages) for own in messages.blobs.values())


def test_replies_are_what_the_strategy_declares_and_nothing_more(strategy: Strategy[Any]) -> None:
    toy = toy_for(strategy)
    played = play(strategy, toy)
    for sent, reply in zip(played.sent, played.replies, strict=True):
        assert reply.clients == sent.clients
        assert reply.scalars.keys() >= {"weight", "loss"} and not reply.blobs
        assert torch.equal(reply.scalars["weight"], toy.cohort(sent.clients).weights)
        assert bool(torch.isfinite(reply.scalars["loss"]).all())
        expected = strategy.expects(sent[0])
        assert reply.trees.keys() == expected.keys()
        for part, like in expected.items():
            tree.check_same(tree.row(reply.trees[part], 0), like)
    assert bool(toy.memory) == strategy.remembers


def test_a_state_survives_serialisation_bit_by_bit(strategy: Strategy[Any]) -> None:
    toy = toy_for(strategy, torch.float32)
    state = play(strategy, toy, rounds=2).states[-1]
    again = from_bytes(type(state), to_bytes(state))
    assert to_bytes(again) == to_bytes(state)
    assert equal(strategy.adapter(again), strategy.adapter(state))
    sent, resent = (addressed(strategy, s, 3, toy.clients)[0] for s in (state, again))
    assert message_bytes(resent) == message_bytes(sent)


def test_equal_inputs_give_bit_equal_outputs(strategy: Strategy[Any]) -> None:
    one, two = (play(strategy, toy_for(strategy, torch.float32)) for _ in range(2))
    for left, right in zip(one.states, two.states, strict=True):
        assert to_bytes(left) == to_bytes(right)
    for sent, resent in zip(one.sent + one.replies, two.sent + two.replies, strict=True):
        assert message_bytes(sent) == message_bytes(resent)


def test_arguments_are_never_written_to(strategy: Strategy[Any]) -> None:
    toy = toy_for(strategy)
    initial = {name: tensor.clone() for name, tensor in toy.initial.items()}
    state = strategy.init(toy.problem())
    for number in (1, 2):
        before = to_bytes(state)
        sent = addressed(strategy, state, number, toy.clients)[0]
        sent_before = message_bytes(sent)
        cohort = toy.cohort(sent.clients)
        strategy.personal(sent, cohort)
        reply = strategy.train(sent, cohort)
        assert message_bytes(sent) == sent_before
        reply_before = message_bytes(reply)
        after = strategy.receive(state, iter([reply]))
        strategy.adapter(after)
        assert message_bytes(reply) == reply_before
        assert to_bytes(state) == before
        state = after
    assert equal(toy.initial, initial)


def test_the_order_of_clients_changes_nothing(strategy: Strategy[Any]) -> None:
    toy, other = toy_for(strategy), toy_for(strategy)
    one = play(strategy, toy)
    two = play(strategy, other, present=lambda _, clients: clients[::-1])
    assert distance(outcome(strategy, two, other), outcome(strategy, one, toy)) <= 1e-12


def test_a_common_factor_on_all_weights_changes_nothing(strategy: Strategy[Any]) -> None:
    toy, other = toy_for(strategy), toy_for(strategy)
    other.weights = {client: 37.0 * weight for client, weight in toy.weights.items()}
    one, two = play(strategy, toy), play(strategy, other)
    assert distance(outcome(strategy, two, other), outcome(strategy, one, toy)) <= 1e-12


def test_unequal_weights_matter_where_tensors_are_aggregated(strategy: Strategy[Any]) -> None:
    toy, other = toy_for(strategy), toy_for(strategy)
    other.weights = dict.fromkeys(toy.weights, 1.0)
    one, two = play(strategy, toy), play(strategy, other)
    apart = distance(strategy.adapter(two.states[-1]), strategy.adapter(one.states[-1]))
    aggregates = bool(one.replies[0].trees) and not strategy.pools
    assert apart > 1e-3 if aggregates else apart == 0


def test_absent_clients_have_no_influence(strategy: Strategy[Any]) -> None:
    toy, other = toy_for(strategy), toy_for(strategy)
    for client in toy.clients[1::2]:  # absent from round 1, the only round
        other.targets[client] = tree.scale(toy.targets[client], -3.0)
        other.weights[client] = 100.0
    one, two = (play(strategy, t, rounds=1, present=some) for t in (toy, other))
    assert to_bytes(one.states[-1]) == to_bytes(two.states[-1])
    assert toy.memory.keys() <= set(some(1, toy.clients))


def test_a_client_that_comes_back_takes_part_again(strategy: Strategy[Any]) -> None:
    toy = toy_for(strategy)
    away = lambda number, clients: clients[:1] if number == 2 else clients  # noqa: E731
    played = play(strategy, toy, present=away)
    replied = [name for reply in played.replies for name in reply.clients]
    assert sorted(replied[-len(toy.clients) :]) == list(toy.clients)
    assert all(bool(torch.isfinite(r.scalars["loss"]).all()) for r in played.replies)


def test_with_one_client_the_result_is_that_clients_training(strategy: Strategy[Any]) -> None:
    if not strategy.averages:
        return  # the server takes a step of its own: its oracle knows the rule
    for rounds in (1, 2):
        toy = make(1)
        played = play(strategy, toy, rounds=rounds)
        client = toy.clients[0]
        if not toy.trained:  # a first round that only prepares
            continue
        trained = meaning(toy, toy.trained[client], toy.bases[client])
        own = personal(strategy, played.states[-1], rounds + 1, toy)[client]
        assert distance(own, trained) <= 1e-15


def test_identical_clients_give_what_any_of_them_gives(strategy: Strategy[Any]) -> None:
    toy, alone = toy_for(strategy), make(1)
    for client in toy.clients:
        toy.targets[client] = alone.targets[alone.clients[0]]
        toy.steps[client] = alone.steps[alone.clients[0]]
    many, one = play(strategy, toy), play(strategy, alone)
    apart = distance(strategy.adapter(many.states[-1]), strategy.adapter(one.states[-1]))
    assert apart <= 1e-14


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_size_of_stacks_changes_nothing(strategy: Strategy[Any], size: int) -> None:
    for dtype, bound in ((torch.float32, 1e-7), (torch.float64, 1e-14)):
        toy, other = toy_for(strategy, dtype), toy_for(strategy, dtype)
        one, two = play(strategy, toy, present=some), play(strategy, other, 3, some, size)
        assert distance(outcome(strategy, two, other), outcome(strategy, one, toy)) <= bound


def gap_of_parts(strategy: Strategy[Any]) -> float:
    """How far states move when replies are averaged in parts, as workers average theirs."""
    toy, most = toy_for(strategy), 0.0
    played = play(strategy, toy, present=some, size=1)
    replies = iter(played.replies)
    for names, before, after in zip(played.present, played.states, played.states[1:], strict=False):
        own = list(itertools.islice(replies, len(names)))
        for parts in ([own], [own[:1], own[1:]], [own[1::2], own[::2]]):
            rows = [average(part, f"shard {n}") for n, part in enumerate(parts) if part]
            found, wanted = (
                codec.encode(s)[0] for s in (strategy.receive(before, iter(rows)), after)
            )
            most = max(most, distance(found, wanted))
    return most


def test_a_linear_strategy_reads_nothing_but_means_by_weight(strategy: Strategy[Any]) -> None:
    if strategy.linear:
        assert gap_of_parts(strategy) <= 1e-12


def first_reply(strategy: Strategy[Any], toy: Toy) -> Messages:
    (sent,) = addressed(strategy, strategy.init(toy.problem()), 1, toy.clients)
    return strategy.train(sent, toy.cohort(sent.clients))


def test_nothing_of_one_client_reaches_another(strategy: Strategy[Any]) -> None:
    """Every client in turn has NaN data; all others' replies and memory stay bit-equal."""
    clean = toy_for(strategy)
    one = first_reply(strategy, clean)
    for bad, client in enumerate(clean.clients):
        toy = toy_for(strategy)
        toy.targets[client] = tree.scale(toy.targets[client], float("nan"))
        two = first_reply(strategy, toy)
        others = [k for k in range(len(one)) if k != bad]
        assert bool(two.scalars["loss"][bad].isnan())
        if others:
            assert message_bytes(two.rows(others)) == message_bytes(one.rows(others))
        for other in set(clean.memory) - {client}:
            assert all(equal(toy.memory[other][n], kept) for n, kept in clean.memory[other].items())


def test_private_memory_belongs_to_its_client(strategy: Strategy[Any]) -> None:
    """In round 2 a client's reply depends on its own memory alone."""
    toy, other = toy_for(strategy), toy_for(strategy)
    state = play(strategy, toy, rounds=1).states[-1]
    play(strategy, other, rounds=1)
    first = toy.clients[0]
    for client in other.memory:
        if client != first:
            other.memory[client] = {
                name: tree.scale(kept, 5.0) for name, kept in other.memory[client].items()
            }
    sent = addressed(strategy, state, 2, toy.clients)[0]
    one, two = (strategy.train(sent, t.cohort(sent.clients)) for t in (toy, other))
    assert message_bytes(one.rows([0])) == message_bytes(two.rows([0]))


def test_personal_adapters_are_complete_and_global_where_nothing_is_private(
    strategy: Strategy[Any],
) -> None:
    toy = toy_for(strategy, torch.float32)
    state = play(strategy, toy).states[-1]
    whole = meaning(toy, strategy.adapter(state), strategy.base(state))
    ranks = getattr(state, "ranks", {})
    for client, own in personal(strategy, state, 4, toy).items():
        if ranks.get(client, 3) == 3:
            assert equal(own, whole) == strategy.shares, client


def test_another_adapter_works_or_is_refused_by_name(strategy: Strategy[Any]) -> None:
    toy = make(1 if strategy.pools else 5, lora=False)
    try:
        played = play(strategy, toy)
    except FedpeftError as error:
        assert re.search(r"strategy\.\w+='\w+'.*lora_A.*adapter\.kind=lora", str(error))
    else:
        tree.check_same(strategy.adapter(played.states[-1]), toy.initial)
