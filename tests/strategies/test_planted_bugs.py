"""The conformance kit finds what is wrong: every planted bug, by the property named beside it.

And nothing else: the same strategies without their bugs have every property.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedpeft.conformance import PROPERTIES, Property, agrees_with, check, clients, contract, rule
from fedpeft.conformance.finding import examine
from fedpeft.strategy import Strategy
from tests.strategies.planted_clients import Alone, Clients, Frozen, Private, Pulled, Table
from tests.strategies.planted_folders import Folder, HidesFolding, HidesKeeping, Twice
from tests.strategies.planted_servers import (
    Claim,
    ClaimsExact,
    HidesExact,
    History,
    Mean,
    Momentum,
    Slow,
    Svd,
)
from tests.strategies.planted_walkers import HidesWalking, Steps
from tests.strategies.test_fedkseed import rule_of
from tests.strategies.toy import Arrays, Present, Toy, arrays


def local(toy: Toy, client: str, w: Arrays, active: set[str], mu: float = 0.0) -> Arrays:
    """A client's SGD from w on the tensors in ``active``."""
    own = {name: value.copy() for name, value in w.items()}
    for _ in range(toy.steps[client]):
        gradient = toy.gradient(client, own)
        own |= {n: own[n] - toy.lr * (gradient[n] + mu * (own[n] - w[n])) for n in active}
    return own


def averaged(toy: Toy, names: list[str], w: Arrays, active: set[str], mu: float = 0.0) -> Arrays:
    total = sum(toy.weights[c] for c in names)
    trained = {c: local(toy, c, w, active, mu) for c in names}
    return {n: sum(toy.weights[c] / total * trained[c][n] for c in names) for n in w}


def mean_rule(toy: Toy, rounds: int, present: Present) -> Arrays:
    w = arrays(toy.initial)
    for t in range(1, rounds + 1):
        w = averaged(toy, list(present(t, toy.clients)), w, set(w))
    return w


def proximal_rule(toy: Toy, rounds: int, present: Present) -> Arrays:
    w = arrays(toy.initial)
    for t in range(1, rounds + 1):
        w = averaged(toy, list(present(t, toy.clients)), w, set(w), mu=0.5)
    return w


def momentum_rule(toy: Toy, rounds: int, present: Present) -> Arrays:
    """v <- 0.9 v + (mean - w), w <- w + v, of B in odd rounds, A in even ones, and the head."""
    w = arrays(toy.initial)
    v = {name: np.zeros_like(value) for name, value in w.items()}
    for t in range(1, rounds + 1):
        active = {n for n in w if (".lora_A." if t % 2 else ".lora_B.") not in n}
        mean = averaged(toy, list(present(t, toy.clients)), w, active)
        v |= {n: 0.9 * v[n] + mean[n] - w[n] for n in active}
        w |= {n: w[n] + v[n] for n in active}
    return w


BUGS: list[tuple[Strategy[Any], Property]] = [
    (Mean("a tensor is missing"), contract.the_adapter_names_every_trainable_tensor),
    (Mean("result in float64"), contract.the_adapter_names_every_trainable_tensor),
    (Mean("noise without a seed"), contract.equal_runs_are_equal_bit_by_bit),
    (Mean("writes into the state"), contract.nothing_given_is_written_to),
    (Mean("history in the module"), contract.runs_know_nothing_of_each_other),
    (Mean("half of what came before"), clients.the_order_of_clients_changes_nothing),
    (Mean("only the last stack"), clients.the_size_of_stacks_changes_nothing),
    (Mean("weights ignored"), clients.unequal_weights_matter),
    (Mean("only client 0"), clients.every_reply_counts),
    (Mean("only client 0 in lora"), clients.every_reply_counts),
    (Mean("weights not normalised"), rule.equal_clients_give_what_any_of_them_gives),
    (Mean("weights squared"), rule.other_tensors_are_averaged_or_left_alone),
    (Mean("divided by all clients"), rule.other_tensors_are_averaged_or_left_alone),
    (Mean("head trained and lost"), rule.other_tensors_are_averaged_or_left_alone),
    (Mean("half a step"), rule.one_client_is_local_training),
    (Claim("weights squared"), rule.linear_as_declared),
    (Claim("weights ignored in lora"), rule.linear_as_declared),
    (Claim("mean of squares"), rule.linear_as_declared),
    (Claim("divided by the count"), rule.linear_as_declared),
    (Claim("times the largest weight"), rule.linear_as_declared),
    (Claim("only client 0"), rule.linear_as_declared),
    (ClaimsExact(), rule.exact_as_declared),
    (Slow("everything pruned"), contract.a_fleets_clock_can_be_told_and_tells),
    (Slow("all that there are"), contract.a_fleets_clock_can_be_told_and_tells),
    (Slow("by place"), contract.a_fleets_clock_can_be_told_and_tells),
    (Slow("writes into the state"), contract.a_fleets_clock_can_be_told_and_tells),
    (HidesExact(), rule.exact_as_declared),
    (Clients("replies in another order"), contract.messages_are_stacked),
    (Clients("another client's weight"), contract.replies_are_what_was_announced),
    (Clients("expects nothing"), contract.replies_are_what_was_announced),
    (Clients("writes into the initial adapter"), contract.nothing_given_is_written_to),
    (Clients("adjust writes into the adapter"), rule.one_client_is_local_training),
    (Clients("message from a cache"), clients.personal_adapters_are_complete),
    (Clients("losses asked in secret"), clients.what_clients_are_asked_is_declared),
    (Clients("one loss for all"), clients.nothing_of_one_client_reaches_another),
    (Clients("centred over the cohort"), clients.nothing_of_one_client_reaches_another),
    (History("a set in the state"), contract.states_are_frozen_data),
    (History("averages over history"), rule.one_client_is_local_training),
    (History("a round behind"), rule.no_movement_changes_nothing),
    (Frozen(bug="A trained though frozen"), rule.exact_as_declared),
    (Frozen(bug="mean in bfloat16"), rule.exact_as_declared),
    (Frozen(bug="one seed for all layers"), contract.draws_depend_on_seed_and_layer),
    (Frozen(bug="a seed of its own"), contract.draws_depend_on_seed_and_layer),
    (Svd("transposed"), rule.one_client_is_local_training),
    (Svd("alpha over r forgotten"), rule.one_client_is_local_training),
    (Svd("s forgotten in the mean"), rule.one_client_is_local_training),
    (Svd("root of S on one side"), rule.one_client_is_local_training),
    (Svd("a rank lost"), rule.one_client_is_local_training),
    (Svd("factors by shape"), rule.factors_are_not_told_apart_by_shape),
    (Svd("by the norms of ranks"), rule.unused_ranks_do_no_harm),
    (Svd("weights on both factors"), rule.equal_clients_give_what_any_of_them_gives),
    (Momentum("moves what is frozen"), rule.frozen_tensors_stay),
    (Table("those away are dropped"), clients.a_client_that_was_away_is_not_forgotten),
    (Private("a head travels"), clients.private_memory_does_not_travel),
    (Private("the neighbour's head"), clients.private_memory_is_its_owners_alone),
    (Private("anchors from outside"), clients.the_size_of_stacks_changes_nothing),
    (Folder("transposed residual"), rule.exact_as_declared),
    (Folder("s forgotten in the residual"), rule.exact_as_declared),
    (Folder("residual taken away"), rule.exact_as_declared),
    (Folder("the last residual only"), rule.exact_as_declared),
    (Folder("trains on the old base"), rule.one_client_is_local_training),
    (Folder("measured on the old base"), clients.personal_adapters_are_complete),
    (Folder("all are held to have followed"), clients.personal_adapters_are_complete),
    (Folder("a group is forgotten"), contract.messages_are_stacked),
    (Folder("a group twice"), contract.messages_are_stacked),
    (HidesFolding(), contract.the_base_changes_as_declared),
    (HidesKeeping(), contract.replies_are_what_was_announced),
    (Twice("the neighbour's rest"), clients.private_memory_is_its_owners_alone),
    (Twice("the second exchange is lost"), rule.one_client_is_local_training),
    (Twice("the first exchange is lost"), rule.one_client_is_local_training),
    (Alone(), rule.one_client_is_local_training),
    (Steps(bug="the walk is ignored"), rule.one_client_is_local_training),
    (Steps(bug="the other way"), rule.one_client_is_local_training),
    (Steps(bug="the next seed"), rule.one_client_is_local_training),
    (Steps(bug="a move is lost"), rule.one_client_is_local_training),
    (Steps(bug="a of this round only"), rule.no_movement_changes_nothing),
    (Steps(bug="clients forget a"), clients.personal_adapters_are_complete),
    (Steps(bug="all moves of the first client"), clients.nothing_of_one_client_reaches_another),
    (HidesWalking(), clients.what_clients_are_asked_is_declared),
    (Mean("weights ignored in lora"), agrees_with(mean_rule)),
    (Pulled("pushes away"), agrees_with(proximal_rule)),
    (Momentum("beta squared"), agrees_with(momentum_rule)),
    (Steps(bug="draws of round 1"), agrees_with(rule_of("uniform"))),
    (Steps(draw="pro", bug="moves times K p"), agrees_with(rule_of("pro"))),
]

NEEDS_ORACLE = [
    (Mean("weights ignored in lora"), Mean(), mean_rule),
    (Pulled("pushes away"), Pulled(), proximal_rule),
    (Momentum("beta squared"), Momentum(), momentum_rule),
    (Steps(bug="draws of round 1"), Steps(), rule_of("uniform")),
    (Steps(draw="pro", bug="moves times K p"), Steps(draw="pro"), rule_of("pro")),
]

RIGHT = [
    *(Mean(), Claim(), Clients(), History(), Frozen(), Svd(), Momentum(), Table(), Private()),
    *(Folder(), Twice(), Steps(), Slow()),
]


def name(value: object) -> str:
    bug = getattr(value, "bug", None)
    return type(value).__name__ + (f" {bug}" if bug else "") if bug is not None else str(value)


@pytest.mark.parametrize(("strategy", "of"), BUGS, ids=[f"{s}" for s, _ in BUGS])
def test_every_planted_bug_is_found(strategy: Strategy[Any], of: Property) -> None:
    verdict = examine(strategy, of)
    assert verdict.verdict == "broken", verdict
    assert len(verdict.found) > 20, "a finding says where and what"


def test_there_are_at_least_20_bugs_each_another() -> None:
    assert len(BUGS) >= 82
    assert len({repr(strategy) for strategy, _ in BUGS}) >= len(BUGS) - 1
    used = {of.__name__ for _, of in BUGS}
    assert len(used) >= 20, "the bugs need many properties, not one that refuses everything"


@pytest.mark.parametrize("strategy", RIGHT, ids=lambda s: type(s).__name__)
def test_without_its_bug_a_strategy_has_every_property(strategy: Strategy[Any]) -> None:
    found = [line for line in check(strategy, PROPERTIES) if line.verdict == "broken"]
    assert found == []


@pytest.mark.parametrize(("wrong", "right", "oracle"), NEEDS_ORACLE, ids=lambda v: name(v))
def test_what_only_an_oracle_can_know(wrong: Any, right: Any, oracle: Any) -> None:
    """The kit alone has no finding; with the paper's rule it has, and the right one has none."""
    assert [line for line in check(wrong, PROPERTIES) if line.verdict == "broken"] == []
    assert examine(wrong, agrees_with(oracle)).verdict == "broken"
    assert examine(right, agrees_with(oracle)).verdict == "holds"
