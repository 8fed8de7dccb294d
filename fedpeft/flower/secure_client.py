"""Secure aggregation on a node: its half of the protocol, one blob each way in every stage.

The message of the round comes with the stage ``mask``: only then, and only once, is anything
trained, and what comes of it leaves as a masked vector, nothing beside it. Between the stages the
participant's secrets are in the node's ``store``, before an answer is sent; after the last stage
nothing is left there but the number of the round.
"""

from __future__ import annotations

from collections.abc import Callable

from fedpeft.errors import ReplyError
from fedpeft.flower.identity import Keyring, own_keyring, simulated_keyring
from fedpeft.flower.node import Node
from fedpeft.flower.store import Kept, alone, load, save
from fedpeft.flower.summed import Rules
from fedpeft.prepare import Prepared
from fedpeft.secagg.envelope import Kind, kind_of
from fedpeft.secagg.fixed import Floats
from fedpeft.secagg.messages import Setup
from fedpeft.secagg.participant import Participant
from fedpeft.strategy import Message, Messages

BLOB = "secagg"
"""The blob of a request or an answer of the protocol; a strategy's own have other names."""

Train = Callable[[Messages], Messages]
"""What training makes of a message (one row): a reply as it would leave the client (one row)."""


def answer_stage(prepared: Prepared, request: Messages, node: Node, train: Train) -> Message:
    """The answer to a stage's request. Raises FedpeftError where the client refuses it."""
    blobs = dict(request.blobs)
    if BLOB not in blobs:
        raise ReplyError(f"blob {BLOB!r} is missing from the request")
    (question,) = blobs.pop(BLOB)
    sent = Messages(request.clients, request.trees, request.scalars, blobs)
    keys = _keyring(prepared, request.clients[0], node)
    with alone(node):
        return Message(blobs={BLOB: _answer(prepared, question, sent, keys, node, train)})


def _answer(
    prepared: Prepared, question: bytes, sent: Messages, keys: Keyring, node: Node, train: Train
) -> bytes:
    """As ``answer_stage``; what it needs next is saved when it returns."""
    (client,) = sent.clients
    participant = Participant(client, keys.secret, keys.identities)
    before = load(node)
    if before.participant:
        participant.restore(before.participant)
    rules, setup = Rules(prepared), before.setup
    if kind_of(question) == Kind.SETUP:
        setup = question
        rules.check_setup(Setup.from_bytes(setup), prepared.population.clients.roster[client])

    def vector() -> Floats:
        rules.check_sent(Setup.from_bytes(setup).fixed, sent)
        own: Floats = rules.summed(sent).rows(train(sent))[0]
        return own

    answer = participant.answer(question, vector)
    over = kind_of(question) == Kind.CONFIRMED
    save(node, Kept(participant.state(), b"" if over else setup))
    return answer


def _keyring(prepared: Prepared, client: str, node: Node) -> Keyring:
    if node.simulated:
        return simulated_keyring(prepared.recipe.seed, client, tuple(prepared.problem.clients))
    return own_keyring(node.config)
