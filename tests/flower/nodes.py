"""A Flower grid in this process: nodes that call the ClientApp, no Ray."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedpeft.flower.client_app import app

Reply = Callable[[Message, Message], Message | None]


class InProcess(Grid):
    """Nodes that call the ClientApp when they are pulled, the last pushed first.

    ``reply`` may change or withhold (None) a node's reply to a train message. ``answers`` holds
    what left the nodes.
    """

    def __init__(
        self,
        nodes: Mapping[int, Mapping[str, Any]],
        reply: Reply | None = None,
        app: ClientApp = app,
    ) -> None:
        self.app = app
        self.answers: list[tuple[str, Message]] = []
        self.contexts = {n: Context(1, n, dict(c), RecordDict(), {}) for n, c in nodes.items()}
        self.reply = reply
        self.pushed: dict[str, Message] = {}
        self.seen: list[Message] = []

    def set_run(self, run: Run) -> None:
        raise AssertionError("not called")

    @property
    def run(self) -> Run:
        raise AssertionError("not called")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise AssertionError("deprecated")

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        raise AssertionError("it cannot be interrupted")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self.pushed[message.metadata.message_id] = message
            self.seen.append(message)
            yield message.metadata.message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for number in reversed([i for i in message_ids if i in self.pushed]):
            message = self.pushed.pop(number)
            kind = message.metadata.message_type
            before = copy.deepcopy(message.content)
            found: Message | None = self.app(message, self.contexts[message.metadata.dst_node_id])
            assert message.content == before, "the client changed the request"
            if self.reply is not None and kind.split(".")[0] == "train":
                assert found is not None
                found = self.reply(message, found)
            if found is not None:
                self.answers.append((kind, found))
                yield found
