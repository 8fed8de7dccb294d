"""The Flower client: one node, one client, a cohort of one.

``query`` says who the node is, ``train`` and ``evaluate`` do what a round asks. The recipe comes
with every request; the process keeps what it prepared from the last one, so that in Flower's
simulation an actor loads model and data once. The node's configuration names its client by
``client``, or by ``partition-id``, its place among the sorted client names.

Private memory (``Strategy.remembers``) stays on the node, in Flower's context. Of an error, nothing
but the type leaves the node unless fedpeft wrote the message; the traceback is in the node's log.

``app`` is for real nodes, whose operators' rules and keys it goes by (``node``, ``identity``);
``simulated`` is for simulations, which have none. Under secure aggregation a client answers to
``train.secure`` and to no other training (``secure_client``).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

from flwr.app import ArrayRecord, Context, Error, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedpeft import errors
from fedpeft.config import Engine
from fedpeft.config_load import parse_recipe
from fedpeft.errors import FedpeftError, PayloadError
from fedpeft.federation import Failure
from fedpeft.flower.node import Node, charged, check_rules
from fedpeft.flower.records import Header, decode, decode_tree, encode, encode_tree
from fedpeft.flower.secure_client import answer_stage
from fedpeft.message import PAYLOAD
from fedpeft.prepare import Prepared, prepare
from fedpeft.strategy import Message, Messages
from fedpeft.tree import Tree, finite_rows, row

log = logging.getLogger(__name__)

_MEMORY = "memory."
_OWN_ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type)}

Work = Callable[[Prepared, Messages, Header, Node], Message]


class _ClientError(Exception):
    """A client's training or evaluation failed; the text is what may leave the node."""


def client_app(is_simulated: bool) -> ClientApp:
    """The app of real nodes, or of simulated ones; no message and no configuration can tell."""
    found = ClientApp()

    @found.query()
    def query(message: FlowerMessage, context: Context) -> FlowerMessage:
        """Who this node is: its client's name and number of training examples, and the digests."""
        return _answer(message, context, _describe, is_simulated)

    @found.train()
    def train(message: FlowerMessage, context: Context) -> FlowerMessage:
        """The strategy's ``train`` on this node's client."""
        return _answer(message, context, _train, is_simulated)

    @found.train("secure")
    def train_securely(message: FlowerMessage, context: Context) -> FlowerMessage:
        """A stage of secure aggregation; in one of them the client trains."""
        return _answer(message, context, _train_securely, is_simulated)

    @found.evaluate()
    def evaluate(message: FlowerMessage, context: Context) -> FlowerMessage:
        """The score of this node's client on its own hold-out."""
        return _answer(message, context, _evaluate, is_simulated)

    return found


def _answer(
    message: FlowerMessage, context: Context, work: Work, is_simulated: bool
) -> FlowerMessage:
    """The reply of ``work``, or an error for this client alone."""
    try:
        request, header = decode(message.content)
        prepared = _prepared(header.recipe)
        client = client_of(context.node_config, prepared.problem.clients)
        own = _own_header(prepared, client, header)
        _check(header, own)
        node = Node(context.node_config, context.state, is_simulated)
        request = _opened(prepared, request, node)
        reply = work(prepared, Messages.stack((client,), [request]), own, node)
        return FlowerMessage(encode(reply, own), reply_to=message)
    except Exception as error:  # one faulty client costs only itself
        log.warning("%s failed", message.metadata.message_type, exc_info=error)
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        return FlowerMessage(Error(code, _reason(error)), reply_to=message)


@functools.lru_cache(maxsize=1)
def _prepared(recipe: str) -> Prepared:
    """What a recipe (YAML) prepares, kept for the next request.

    How to compute is the node's own affair: one client at a time, on the threads that the process
    was given (an actor of the simulation: its share of the cores), on its own CUDA device.
    """
    found = parse_recipe(recipe, "the recipe in the request")
    device = found.engine.device.split(":")[0]
    found = replace(found, data=replace(found.data, public=None))  # the server's own
    return prepare(replace(found, engine=Engine(kind="sequential", chunk=1, device=device)))


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


def public_reason(text: str) -> str:
    """Of ``Type: message``, what may leave the node: the message only of fedpeft's own errors."""
    kind = text.partition(": ")[0]
    return text if kind in _OWN_ERRORS else f"{kind} (the traceback is in the node's log)"


def _reason(error: Exception) -> str:
    """Of an error, what may leave the node."""
    if isinstance(error, _ClientError):
        return errors.redacted(str(error))
    text = f"{type(error).__name__}: {error}"
    return errors.redacted(text if isinstance(error, FedpeftError) else public_reason(text))


def _own_header(prepared: Prepared, client: str, asked: Header) -> Header:
    network = prepared.network
    digests = network.digest, network.layout.digest
    same = {name: getattr(asked, name) for name in ("exchange", "run", "nonce")}
    return Header(asked.round, client, *digests, **same)


def _check(asked: Header, own: Header) -> None:
    """Raises FedpeftError where the server means another client, base or adapter."""
    for what in ("client", "base", "layout"):
        theirs, ours = getattr(asked, what), getattr(own, what)
        if theirs and theirs != ours:
            raise FedpeftError(f"the server asks for {what} {theirs!r}, this node has {ours!r}")


def _describe(prepared: Prepared, request: Messages, own: Header, node: Node) -> Message:
    examples = prepared.population.clients.roster[own.client]
    return Message(scalars={"examples": float(examples)})


def _opened(prepared: Prepared, request: Message, node: Node) -> Message:
    """The request with the trees that are in its payload, which the client keeps."""
    blobs = dict(request.blobs)
    payload = blobs.pop(PAYLOAD, None)
    if payload is None:
        return request
    if prepared.downlink is None:
        raise PayloadError("the request holds a payload, and the recipe names no comms.down.codec")
    trees, kept = prepared.downlink.read(payload, recall(node.state))
    remember(node.state, kept)
    whole = {tree: row(tensors, 0) for tree, tensors in trees.items()}
    return Message(whole, request.scalars, blobs)


def _train(prepared: Prepared, request: Messages, own: Header, node: Node) -> Message:
    check_rules(node, prepared, secure=False)
    reply = _trained(prepared, request, own, node)
    if reply.coded is not None and not all(bool(finite_rows(t)) for t in reply.trees.values() if t):
        raise _ClientError("NaN or Inf in what was trained: it cannot be encoded")
    return reply.travelling(0)


def _train_securely(prepared: Prepared, request: Messages, own: Header, node: Node) -> Message:
    check_rules(node, prepared, secure=True)

    def train(sent: Messages) -> Messages:
        return _trained(prepared, sent, own, node)

    return answer_stage(prepared, request, node, train)


def _trained(prepared: Prepared, request: Messages, own: Header, node: Node) -> Messages:
    """The reply of this node's client, one row."""
    federation = prepared.federation()
    federation.restore({own.client: recall(node.state)})
    with charged(node, prepared, own):
        [result] = federation.run(own.round, request)
    if isinstance(result, Failure):
        raise _ClientError(public_reason(result.reason))
    remember(node.state, federation.memory().get(own.client, {}))
    return result


def _evaluate(prepared: Prepared, request: Messages, own: Header, node: Node) -> Message:
    federation = prepared.federation()
    federation.restore({own.client: recall(node.state)})
    [result] = federation.evaluate(own.round, request)
    if isinstance(result, Failure):
        raise _ClientError(public_reason(result.reason))
    score = asdict(result[own.client])
    return Message(scalars={name: float(value) for name, value in score.items()})


def recall(state: RecordDict) -> dict[str, Tree]:
    """The client's private memory in Flower's context, name -> tree."""
    return {
        key.removeprefix(_MEMORY): decode_tree(record, key)
        for key, record in state.items()
        if key.startswith(_MEMORY) and isinstance(record, ArrayRecord)
    }


def remember(state: RecordDict, memory: Mapping[str, Tree]) -> None:
    """Writes the client's private memory into Flower's context."""
    for name, tree in memory.items():
        state[f"{_MEMORY}{name}"] = encode_tree(tree)


app = client_app(is_simulated=False)
simulated = client_app(is_simulated=True)
