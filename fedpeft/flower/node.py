"""What a node itself sees to, whatever the server asks: its operator's rules and its own ledger.

The recipe comes with every request, from the server. So what the operator configured binds the node
more than the recipe does: with ``identity`` it trains under secure aggregation only, with
``privacy-ledger`` only by DP-SGD (``privacy.unit=record``), and of each round that it trains, its
own ledger is charged first. With ``policy`` it takes only recipes that this file allows, and the
file's ``max_epsilon`` bounds the ledger too, over all runs. A simulated node has no operator: it is
one machine with the server, and the run's own ledger is charged there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import RecordDict

from fedpeft.config import Recipe
from fedpeft.errors import FedpeftError
from fedpeft.flower.records import Header
from fedpeft.prepare import Prepared
from fedpeft.privacy.events import Event, flatten
from fedpeft.privacy.ledger import Budget, Ledger
from fedpeft.privacy.terms import Terms
from fedpeft.site.policy import Policy, read_policy


@dataclass(frozen=True)
class Node:
    """A node as it is when a request comes.

    config: the node's, from its operator. state: what lasts between requests, in Flower's context.
    simulated: whether it is a part of a simulation, which only the process that runs it can say.
    """

    config: Mapping[str, object]
    state: RecordDict
    simulated: bool


def policy_of(node: Node) -> Policy | None:
    """What the node's operator allows (node config ``policy=FILE``), read anew; None: anything."""
    path = node.config.get("policy")
    return None if node.simulated or not path else read_policy(Path(str(path)))


def check_rules(node: Node, prepared: Prepared, secure: bool) -> None:
    """Raises FedpeftError where this node does not train for such a recipe, or request.

    secure: whether the request is one of secure aggregation.
    """
    recipe = prepared.recipe
    if recipe.secure_aggregation.enabled != secure:
        raise FedpeftError(
            "secure_aggregation.enabled: this client answers under secure aggregation only, and "
            "was asked for its update in clear."
            if recipe.secure_aggregation.enabled
            else "this client was asked for a masked update, and the recipe does not say so: set "
            "secure_aggregation.enabled=true."
        )
    if node.simulated:
        return
    if node.config.get("identity") and not secure:
        raise FedpeftError(
            "node config identity: this node trains under secure aggregation only. Set "
            "secure_aggregation.enabled=true in the recipe, or start the node without an identity."
        )
    if node.config.get("privacy-ledger") and recipe.privacy.unit != "record":
        raise FedpeftError(
            f"node config privacy-ledger: this node trains with privacy.unit=record only, not "
            f"{recipe.privacy.unit!r}. Change the recipe, or start the node without a ledger."
        )
    if recipe.privacy.unit != "none" and recipe.privacy.randomness == "seeded":
        raise FedpeftError(
            "privacy.randomness=seeded on a real node: whoever has the recipe could take the noise "
            "away. Set privacy.randomness=secure."
        )


def protected(recipe: Recipe) -> bool:
    """Whether a recipe promises that no figure of a single client leaves it as it is."""
    return recipe.privacy.unit != "none" or recipe.secure_aggregation.enabled


def check_scores(node: Node, recipe: Recipe) -> None:
    """Raises FedpeftError where a real node tells nobody its score on its own hold-out."""
    if not node.simulated and protected(recipe):
        raise FedpeftError(
            "evaluation.clients: a score on this client's own hold-out is neither noised nor "
            "masked, and the recipe has privacy or secure aggregation: set "
            "evaluation.clients=false."
        )


@contextmanager
def charged(node: Node, prepared: Prepared, own: Header) -> Iterator[None]:
    """Charges the node's own ledger before what is inside trains; of records on real nodes only.

    A round's first exchange is charged, each time that it is asked for. Later ones are free and may
    not train again: that raises FedpeftError behind them, before anything has left.
    """
    terms = prepared.terms
    if node.simulated or terms is None or terms.unit != "record":
        yield
        return
    randomness = terms.mechanism.randomness
    before = randomness.drawn
    if own.exchange == 0:
        _charge(node, prepared, terms, own)
    yield
    if own.exchange > 0 and randomness.drawn != before:
        raise FedpeftError(
            f"exchange {own.exchange} of round {own.round} trained again, which is not charged: a "
            f"round's data are used in its first exchange only."
        )


def _charge(node: Node, prepared: Prepared, terms: Terms, own: Header) -> None:
    """Raises FedpeftError, and charges nothing, where the client's budget does not hold a round."""
    path = node.config.get("privacy-ledger")
    if not path:
        raise FedpeftError(
            "privacy.unit=record needs node config privacy-ledger=FILE on a real node: the node's "
            "own account of what its records have spent, which survives the node."
        )
    privacy = prepared.recipe.privacy
    policy = policy_of(node)
    most = math.inf if policy is None or policy.max_epsilon is None else policy.max_epsilon
    epsilon = min(privacy.epsilon or math.inf, most)
    budget = Budget(epsilon, terms.delta, privacy.accountant)
    event = terms.event(prepared.population.clients.roster[own.client])
    with Ledger.open(Path(str(path)), budget) as ledger:
        taken = _releases(ledger.spent(own.client)) // _releases(event)
        if terms.sampled == "cap" and taken >= terms.rounds:
            raise FedpeftError(
                f"client {own.client!r} has taken part in {taken} rounds, and privacy.max_rounds "
                f"or the sampling's groups allow {terms.rounds}: its privacy budget is spent."
            )
        ledger.charge(own.round, {own.client: event})


def _releases(event: Event) -> int:
    return sum(flatten(event).values())
