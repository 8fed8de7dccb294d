"""The Flower client: one node, one client, a cohort of one.

``query`` says who the node is, ``train`` and ``evaluate`` do what a round asks. The recipe comes
with every request; the process keeps what it prepared from the last one, so that in Flower's
simulation an actor loads model and data once. The node's configuration names its client by
``client``, or by ``partition-id``, its place among the sorted client names.

Private memory (``Strategy.remembers``) stays on the node (``keep``). Of an error, what leaves the
node is what ``redact`` lets through; the whole of it is in the node's log, which is a file of JSON
lines (``fedpeft.logs``) where the node's configuration has ``log=FILE``.

``app`` is for real nodes, whose operators' rules and keys it goes by (``node``, ``identity``);
``simulated`` is for simulations, which have none. Under secure aggregation a client answers to
``train.secure`` and to no other training (``secure_client``).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flwr.app import Context, Error, MessageType, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedpeft import errors, logs
from fedpeft.config import Engine, Recipe
from fedpeft.config_remote import parse_remote
from fedpeft.errors import FedpeftError, PayloadError
from fedpeft.federation import Failure
from fedpeft.flower.digests import Digests, digests_of
from fedpeft.flower.keep import Memory, memory_of
from fedpeft.flower.node import Node, charged, check_rules, check_scores, policy_of
from fedpeft.flower.reasons import ClientError, reason
from fedpeft.flower.records import Header, decode, encode
from fedpeft.flower.secure_client import answer_stage
from fedpeft.message import PAYLOAD
from fedpeft.prepare import Prepared, prepare
from fedpeft.privacy.accountants import epsilon_of
from fedpeft.privacy.events import history
from fedpeft.redact import public_reason
from fedpeft.site.policy import Policy
from fedpeft.site.rules import check_model, check_promise, check_recipe, check_text
from fedpeft.strategy import Message, Messages
from fedpeft.tree import finite_rows, row

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """A request as it is worked on: own header, node, and what the client keeps."""

    own: Header
    node: Node
    memory: Memory


Work = Callable[[Prepared, Messages, Asked], Message]


def client_app(is_simulated: bool) -> ClientApp:
    """The app of real nodes, or of simulated ones; no message and no configuration can tell."""
    found = ClientApp()

    @found.query()
    def query(message: FlowerMessage, context: Context) -> FlowerMessage:
        """Who this node is: client's name, training examples, digests, whether it kept anything."""
        return _answer(message, context, is_simulated)

    @found.train()
    def train(message: FlowerMessage, context: Context) -> FlowerMessage:
        """The strategy's ``train`` on this node's client."""
        return _answer(message, context, is_simulated)

    @found.train("secure")
    def train_securely(message: FlowerMessage, context: Context) -> FlowerMessage:
        """A stage of secure aggregation; in one of them the client trains."""
        return _answer(message, context, is_simulated)

    @found.evaluate()
    def evaluate(message: FlowerMessage, context: Context) -> FlowerMessage:
        """The score of this node's client on its own hold-out."""
        return _answer(message, context, is_simulated)

    return found


@logs.scope()
def _answer(message: FlowerMessage, context: Context, is_simulated: bool) -> FlowerMessage:
    """The reply to a message, or an error for this client alone."""
    kind = message.metadata.message_type
    try:
        log_to(context.node_config.get("log"))
        node = Node(context.node_config, context.state, is_simulated)
        return FlowerMessage(answer(kind, message.content, node), reply_to=message)
    except Exception as error:  # one faulty client costs only itself
        log.warning("%s failed", kind, exc_info=error)
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        return FlowerMessage(Error(code, reason(error)), reply_to=message)


def answer(kind: str, content: RecordDict, node: Node) -> RecordDict:
    """What a node answers to a message of Flower's type ``kind``.

    What the client keeps is saved when it returns. Raises whatever goes wrong; of that, ``reason``
    says what may leave the node. To be called in a ``logs.scope``.
    """
    work = _WORK[kind]
    request, header = decode(content)
    logs.bind(header.run or None, header.round or None)
    policy = policy_of(node)
    prepared = allowed(header.recipe, node, policy)
    client = client_of(node.config, prepared.problem.clients)
    logs.bind(client=client)
    if policy is not None and policy.max_epsilon is not None:
        check_promise(policy, _promised(header.recipe, client, _listed(node, policy)))
    own = _own_header(_digests(header.recipe, _listed(node, policy)), client, header)
    _check(header, own)
    with memory_of(node, own, trains=work is not _evaluate) as memory:
        asked = Asked(own, node, memory)
        request = _opened(prepared, request, memory)
        reply = work(prepared, Messages.stack((client,), [request]), asked)
        found = encode(reply, own)
        memory.save(prepared.recipe.output)
    return found


def allowed(recipe: str, node: Node, policy: Policy | None) -> Prepared:
    """What a recipe prepares, where the policy allows it: nothing is loaded for one it does not."""
    listed = _listed(node, policy)
    if policy is not None:
        own = _parsed(recipe, listed)
        check_text(policy, recipe)
        check_recipe(policy, own)
    prepared = _prepared(recipe, listed)
    if policy is not None:
        clients = len(prepared.problem.clients)
        check_model(policy, prepared.recipe, prepared.network.digest, clients)
    return prepared


def _listed(node: Node, policy: Policy | None) -> frozenset[str] | None:
    """Strategies that the operator lets a recipe name beside those that ship; None for any."""
    if node.simulated:
        return None
    named = str(node.config.get("strategies", "")).split(",")
    return frozenset([*named, *((policy.strategies or ()) if policy is not None else ())])


@functools.lru_cache(maxsize=1)
def _promised(recipe: str, client: str, strategies: frozenset[str] | None) -> float:
    """The epsilon, at the recipe's delta, of the whole run for this client; infinite for none."""
    prepared = _prepared(recipe, strategies)
    terms = prepared.terms
    if terms is None:
        return math.inf
    whole = terms.whole(prepared.population.clients.roster[client])
    return epsilon_of(history(whole), terms.delta, prepared.recipe.privacy.accountant)


@functools.lru_cache(maxsize=1)
def _parsed(recipe: str, strategies: frozenset[str] | None) -> Recipe:
    return parse_remote(recipe, "the recipe in the request", strategies)


@functools.cache
def log_to(path: object) -> None:
    """Begins the node's structured log, once in a process, where its operator wants one."""
    if path:
        logs.write_to(Path(str(path)))


@functools.lru_cache(maxsize=1)
def _prepared(recipe: str, strategies: frozenset[str] | None) -> Prepared:
    """What a recipe (YAML) prepares, kept for the next request; strategies: as in parse_remote.

    How to compute is the node's own affair: one client at a time, on the threads that the process
    was given (an actor of the simulation: its share of the cores), on its own CUDA device.
    """
    found = _parsed(recipe, strategies)
    device = found.engine.device.split(":")[0]
    found = replace(found, data=replace(found.data, public=None))  # the server's own
    return prepare(replace(found, engine=Engine(kind="sequential", chunk=1, device=device)))


@functools.lru_cache(maxsize=1)
def _digests(recipe: str, strategies: frozenset[str] | None) -> Digests:
    return digests_of(_prepared(recipe, strategies))


def client_of(node_config: Mapping[str, object], clients: Sequence[str]) -> str:
    """The client that a node is, by its configuration. Raises FedpeftError if there is none.

    clients: the names of all, ascending.
    """
    name = node_config.get("client")
    if name is not None:
        if name not in clients:
            raise FedpeftError(
                f"node config client={name!r} is no client of this recipe. "
                f"{errors.suggest(str(name), clients)}"
            )
        return str(name)
    place = str(node_config.get("partition-id"))
    if not place.isdecimal() or int(place) >= len(clients):
        raise FedpeftError(
            f"node config partition-id={place} must be a number below {len(clients)}, this "
            f"recipe's number of clients; or name the client: client=NAME."
        )
    return clients[int(place)]


def _own_header(digests: Digests, client: str, asked: Header) -> Header:
    same = {name: getattr(asked, name) for name in ("exchange", "run", "nonce")}
    return Header(asked.round, client, **vars(digests), **same)


def _check(asked: Header, own: Header) -> None:
    """Raises FedpeftError where the server means another client, base or adapter."""
    for what in ("client", *vars(Digests())):
        theirs, ours = getattr(asked, what), getattr(own, what)
        if theirs and theirs != ours:
            raise FedpeftError(f"the server asks for {what} {theirs!r}, this node has {ours!r}")


def _describe(prepared: Prepared, request: Messages, asked: Asked) -> Message:
    examples = prepared.population.clients.roster[asked.own.client]
    kept = asked.memory.kept()  # a server that resumes wants to know
    return Message(scalars={"examples": float(examples), "kept": float(kept)})


def _opened(prepared: Prepared, request: Message, memory: Memory) -> Message:
    """The request with the trees that are in its payload, which the client keeps."""
    blobs = dict(request.blobs)
    payload = blobs.pop(PAYLOAD, None)
    if payload is None:
        return request
    if prepared.downlink is None:
        raise PayloadError("the request holds a payload, and the recipe names no comms.down.codec")
    trees, kept = prepared.downlink.read(payload, memory.recall())
    memory.remember(kept)
    whole = {tree: row(tensors, 0) for tree, tensors in trees.items()}
    return Message(whole, request.scalars, blobs)


def _train(prepared: Prepared, request: Messages, asked: Asked) -> Message:
    check_rules(asked.node, prepared, secure=False)
    reply = _trained(prepared, request, asked)
    if reply.coded is not None and not all(bool(finite_rows(t)) for t in reply.trees.values() if t):
        raise ClientError("NaN or Inf in what was trained: it cannot be encoded")
    return reply.travelling(0)


def _train_securely(prepared: Prepared, request: Messages, asked: Asked) -> Message:
    check_rules(asked.node, prepared, secure=True)

    def train(sent: Messages) -> Messages:
        return _trained(prepared, sent, asked)

    return answer_stage(prepared, request, asked.node, train)


def _trained(prepared: Prepared, request: Messages, asked: Asked) -> Messages:
    """The reply of this node's client, one row."""
    own, memory = asked.own, asked.memory
    federation = prepared.federation()
    federation.restore({own.client: memory.recall()})
    memory.redo()
    with charged(asked.node, prepared, own):
        [result] = federation.run(own.round, request)
    if isinstance(result, Failure):
        raise ClientError(public_reason(result.reason))
    memory.remember(federation.memory().get(own.client, {}))
    return result


def _evaluate(prepared: Prepared, request: Messages, asked: Asked) -> Message:
    own = asked.own
    check_scores(asked.node, prepared.recipe)
    federation = prepared.federation()
    federation.restore({own.client: asked.memory.recall()})
    [result] = federation.evaluate(own.round, request)
    if isinstance(result, Failure):
        raise ClientError(public_reason(result.reason))
    score = asdict(result[own.client])
    return Message(scalars={name: float(value) for name, value in score.items()})


_WORK: Mapping[str, Work] = {
    MessageType.QUERY: _describe,
    MessageType.TRAIN: _train,
    f"{MessageType.TRAIN}.secure": _train_securely,
    MessageType.EVALUATE: _evaluate,
}

app = client_app(is_simulated=False)
simulated = client_app(is_simulated=True)
