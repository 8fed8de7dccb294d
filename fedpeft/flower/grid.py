"""CohortGrid: Flower's own strategies and ServerApps on the batched engine, in this process.

    strategy = flwr.serverapp.strategy.FedAvg()
    strategy.start(grid=CohortGrid(federation), initial_arrays=ArrayRecord(...), num_rounds=5)

All messages of a push are trained together, in the federation's chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from uuid import uuid4

import torch
from flwr.app import ArrayRecord, Error, MessageType, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedpeft import tree as trees
from fedpeft.errors import FedpeftError
from fedpeft.federation import Failure, Federation
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

    A train message holds one ArrayRecord of every trainable tensor, under any key; the reply holds
    the trained ones under the same key, and ``metrics`` with ``num-examples`` and the strategy's
    scalars (``loss``). The reply to an evaluate message holds ``metrics`` with ``num-examples``,
    ``loss`` and ``accuracy`` on the client's own hold-out. A client that fails, or trains to NaN,
    gives an error reply. The learning-rate schedule runs over the federation's own number of rounds.
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
        """Trains or evaluates the clients of all messages, at once; replies wait to be pulled.

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
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[FlowerMessage], *, timeout: float | None = None
    ) -> Iterable[FlowerMessage]:
        """The replies, by client name. Nothing is awaited in one process: no timeout applies."""
        return self.pull_messages(self.push_messages(messages))
