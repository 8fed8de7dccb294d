"""CohortGrid: Flower's own strategies and ServerApps on the batched engine, in this process.

    strategy = flwr.serverapp.strategy.FedAvg()
    strategy.start(grid=CohortGrid(federation), initial_arrays=ArrayRecord(...), num_rounds=5)

All messages of a push are trained together, in the federation's chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from uuid import uuid4

from flwr.app import Error, MessageType, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedpeft import tree as trees
from fedpeft.errors import FedpeftError
from fedpeft.federation import Failure, Federation, Partial
from fedpeft.flower.records import decode_tree, encode_tree
from fedpeft.metrics import Score
from fedpeft.strategy import Message, Messages
from fedpeft.tree import Tree

FIRST_NODE = 2
"""Node ids count from here, in the order of the sorted client names; 1 is Flower's server."""

_ROUND = "server-round"
Config = Mapping[str, object]


@dataclass(frozen=True)
class _Request:
    """A message to a client: its adapter, under which record key it came, and its settings."""

    message: FlowerMessage
    client: str
    key: str
    adapter: Tree
    config: Config


class CohortGrid(Grid):
    """The clients of an in-process federation as Flower nodes.

    federation: one whose strategy takes the tree ``adapter`` and replies with it alone, such as a
    ``CohortFederation`` with ``fedavg``; it does the clients' half. config: what the ServerApp's
    messages say besides ``server-round`` that this strategy does, e.g. ``{"proximal-mu": 0.1}``
    with ``fedprox``; any other setting raises FedpeftError, for no client would heed it.

    A train message holds one ArrayRecord of every trainable tensor, under any key (other floating
    types, such as the float64 of Flower's FedAdam, are cast to float32); the reply holds the
    trained ones under the same key, and ``metrics`` with ``num-examples`` and the strategy's
    scalars (``loss``). The reply to an evaluate message holds ``metrics`` with ``num-examples``,
    ``loss`` and ``accuracy`` on the client's own hold-out. A client that fails, or trains to NaN,
    gives an error reply. A learning-rate schedule runs over the rounds of the federation's recipe.
    """

    def __init__(self, federation: Federation, config: Config | None = None) -> None:
        _identify()
        self._federation = federation
        self._config = dict(config or {})
        self._examples = dict(federation.clients())
        self._replies: dict[str, FlowerMessage] = {}
        self._round = 0
        self._run = Run.create_empty(TaskIdentity.run_id)
        self.names: Mapping[int, str] = dict(enumerate(sorted(self._examples), FIRST_NODE))

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> FlowerMessage:
        return FlowerMessage(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.names)

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
        """Trains or evaluates the clients of all messages at once; replies wait to be pulled.

        Raises FedpeftError for messages that the federation cannot serve.
        """
        pushed = list(messages)
        for message in pushed:
            message.metadata.__dict__["_message_id"] = str(uuid4())  # as Flower's own grids do
        for kind in sorted({m.metadata.message_type for m in pushed}):
            requests = self._requests([m for m in pushed if m.metadata.message_type == kind])
            for request, content in self._answers(kind, requests):
                reply = FlowerMessage(content, reply_to=request.message)
                self._replies[request.message.metadata.message_id] = reply
        return [message.metadata.message_id for message in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[FlowerMessage]:
        wanted = set(message_ids)
        return [self._replies.pop(i) for i in list(self._replies) if i in wanted]

    def send_and_receive(
        self, messages: Iterable[FlowerMessage], *, timeout: float | None = None
    ) -> Iterable[FlowerMessage]:
        """The replies, by client name. Nothing is awaited in one process: no timeout applies."""
        return self.pull_messages(self.push_messages(messages))

    def _requests(self, messages: list[FlowerMessage]) -> list[_Request]:
        """The messages by client name, each one's content read; a content that all share, once."""
        seen: dict[int, tuple[str, Tree, Config]] = {}
        found = []
        for message in messages:
            client = self.names.get(message.metadata.dst_node_id)
            if client is None:
                raise FedpeftError(
                    f"node {message.metadata.dst_node_id} does not exist: send to get_node_ids()."
                )
            content = message.content
            if id(content) not in seen:
                seen[id(content)] = self._read(content)
            found.append(_Request(message, client, *seen[id(content)]))
        found.sort(key=lambda request: request.client)
        names = [request.client for request in found]
        if len(set(names)) != len(names):
            raise FedpeftError("two messages of one push are for the same node: send one.")
        return found

    def _read(self, content: RecordDict) -> tuple[str, Tree, Config]:
        """Record key, adapter and settings of a message."""
        arrays = dict(content.array_records)
        if len(arrays) != 1:
            raise FedpeftError(
                f"a message holds {len(arrays)} ArrayRecords ({sorted(arrays)}): send one, with "
                f"every trainable tensor of the model."
            )
        config = {k: v for record in content.config_records.values() for k, v in record.items()}
        for name, value in config.items():
            if name != _ROUND and self._config.get(name) != value:
                raise FedpeftError(
                    f"the ServerApp's setting {name}={value!r} would go unheeded: clients train as "
                    f"the federation's strategy and recipe say. If these do it, say so with "
                    f"CohortGrid(federation, config={{{name!r}: {value!r}}})."
                )
        [(key, record)] = arrays.items()
        adapter = decode_tree(record, key).items()
        return key, {n: t.float() if t.is_floating_point() else t for n, t in adapter}, config

    def _answers(
        self, kind: str, requests: list[_Request]
    ) -> Iterator[tuple[_Request, RecordDict | Error]]:
        if kind not in (MessageType.TRAIN, MessageType.EVALUATE):
            raise FedpeftError(f"message type {kind!r} is unknown here: send train or evaluate.")
        by_client = {request.client: request for request in requests}
        number = requests[0].config.get(_ROUND)
        if isinstance(number, int):
            self._round = number
        elif kind == MessageType.TRAIN:
            self._round += 1
        messages = _stack(requests)
        if kind == MessageType.TRAIN:
            for reply in self._federation.run(self._round, messages):
                for client, content in self._trained(reply, by_client):
                    yield by_client[client], content
        else:
            for scores in self._federation.evaluate(self._round, messages):
                for client, content in self._evaluated(scores):
                    yield by_client[client], content

    def _trained(
        self, reply: Messages | Failure | Partial, by_client: Mapping[str, _Request]
    ) -> Iterator[tuple[str, RecordDict | Error]]:
        if isinstance(reply, Failure):
            yield reply.client, _error(reply.reason)
            return
        if isinstance(reply, Partial):
            raise FedpeftError(
                "the federation averages replies before they get here, and Flower's strategies "
                "want each client's own: use a CohortFederation (engine.workers=1)."
            )
        if set(reply.trees) != {"adapter"}:
            raise FedpeftError(
                f"the federation's strategy replies with the trees {sorted(reply.trees)}: Flower's "
                f"strategies take one. Use a strategy that replies with 'adapter', such as fedavg."
            )
        finite = trees.finite_rows(reply.trees["adapter"])
        for k, client in enumerate(reply.clients):
            if not finite[k]:
                yield client, _error("NaN or Inf in the trained adapter")
                continue
            one = reply[k]
            metrics = {name: v for name, v in one.scalars.items() if name != "weight"}
            content = _metrics(self._examples[client], metrics)
            content[by_client[client].key] = encode_tree(one.trees["adapter"])
            yield client, content

    def _evaluated(
        self, scores: dict[str, Score] | Failure
    ) -> Iterator[tuple[str, RecordDict | Error]]:
        if isinstance(scores, Failure):
            yield scores.client, _error(scores.reason)
            return
        for client, score in scores.items():
            if not score.items:
                yield client, _error("it holds out no example to be evaluated on")
                continue
            metrics = {"loss": score.loss, "accuracy": score.accuracy}
            yield client, _metrics(score.items, metrics)


def _metrics(examples: int, metrics: Mapping[str, float]) -> RecordDict:
    return RecordDict({"metrics": MetricRecord({"num-examples": examples, **metrics})})


def _stack(requests: list[_Request]) -> Messages:
    """All requests as one stack; views on one copy where all are the same content."""
    names = [request.client for request in requests]
    first = requests[0].adapter
    if all(request.adapter is first for request in requests):
        return Messages.broadcast(names, {"adapter": first})
    try:
        return Messages.stack(names, [Message({"adapter": r.adapter}) for r in requests])
    except ValueError as error:
        raise FedpeftError(
            f"the messages of one push hold different arrays: {error}. Send all nodes the same "
            f"tensors, or push each kind by itself."
        ) from None


def _error(reason: str) -> Error:
    return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)


def _identify() -> None:
    """Gives this process a Flower identity, if it has none; no message can be made without."""
    try:
        _ = TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id
    except RuntimeError:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
