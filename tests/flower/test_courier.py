"""The courier: bounds on waiting, late, repeated and foreign replies; nodes that still owe one."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedpeft.flower.courier import Courier, Patience
from tests.flower.nodes import InProcess

pytestmark = pytest.mark.usefixtures("flower_task")

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


def content(value: float = 1.0) -> RecordDict:
    return RecordDict({"m": MetricRecord({"x": value})})


def grid(nodes: int, reply: Any = None) -> InProcess:
    return InProcess({k: {} for k in range(1, nodes + 1)}, reply, app)


def courier(at: InProcess, reply: float = 0.05) -> Courier:
    return Courier(at, Patience(join=0.05, reply=reply), lambda: None)


def ask(by: Courier, nodes: Iterable[int], share: float = 1.0) -> dict[int, Message | None]:
    return by.ask(MessageType.TRAIN, {n: content(n) for n in nodes}, 1, 0.05, share)


def test_everybody_is_asked_and_answers() -> None:
    answers = ask(courier(grid(3)), [1, 2, 3])
    assert {n: a.content["m"]["x"] for n, a in answers.items() if a} == {1: 1.0, 2: 2.0, 3: 3.0}


class Slow(InProcess):
    """Replies of nodes in ``slow`` come when ``now`` is set."""

    def __init__(self, nodes: int, slow: set[int]) -> None:
        super().__init__({k: {} for k in range(1, nodes + 1)}, None, app)
        self.slow, self.now = slow, False

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = [
            number
            for number in message_ids
            if number in self.pushed
            and (self.now or self.pushed[number].metadata.dst_node_id not in self.slow)
        ]
        return list(super().pull_messages(ready))


def test_a_late_node_is_left_alone_until_it_has_answered(caplog: pytest.LogCaptureFixture) -> None:
    at = Slow(3, {2})
    by = courier(at, reply=1000.0)
    answers = ask(by, [1, 2, 3])
    assert answers[2] is None and answers[1] is not None
    assert by.busy() == {2}
    at.now = True
    with caplog.at_level(logging.WARNING):
        assert by.busy() == set()
    assert "node 2: passed over a reply that came too late" in caplog.text
    assert all(ask(by, [1, 2, 3]).values())


def test_a_node_that_never_answers_is_given_up() -> None:
    by = courier(Slow(2, {2}), reply=1e-9)
    ask(by, [1, 2])
    assert by.busy() == set()


def test_enough_answers_end_the_wait_and_errors_are_not_among_them() -> None:
    def reply(asked: Message, found: Message) -> Message:
        if asked.metadata.dst_node_id == 1:
            return Message(Error(2, "no"), reply_to=asked)
        return found

    class OneByOne(InProcess):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            waiting = sorted(
                (i for i in message_ids if i in self.pushed),
                key=lambda i: self.pushed[i].metadata.dst_node_id,
            )
            return list(super().pull_messages(waiting[:1]))

    at = OneByOne({k: {} for k in range(1, 5)}, reply, app)
    by = Courier(at, Patience(reply=1000.0), lambda: None)
    answers = by.ask(MessageType.TRAIN, {n: content() for n in (1, 2, 3, 4)}, 1, 1000.0, 0.5)
    assert answers[1] is not None and answers[1].has_error()
    assert [n for n, a in answers.items() if a is None] == [4]
    assert by.busy() == set()  # what node 4 sent by now was thrown away


def test_repeated_and_foreign_replies_are_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    class Twice(InProcess):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            for found in super().pull_messages(message_ids):
                yield found
                yield found
                foreign = Message(found.content, reply_to=self.seen[0])
                foreign.metadata.__dict__["_reply_to_message_id"] = "another"
                yield foreign

    with caplog.at_level(logging.WARNING):
        answers = ask(courier(Twice({1: {}, 2: {}}, None, app)), [1, 2])
    assert all(answers.values())
    assert caplog.text.count("answers nothing, or once more") == 4


def test_a_node_that_goes_while_it_is_asked_is_not_waited_for() -> None:
    class Gone(InProcess):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            for number in super().push_messages(messages):
                gone = self.pushed[number].metadata.dst_node_id == 2
                yield "" if gone else number

    answers = ask(courier(Gone({1: {}, 2: {}}, None, app), reply=1000.0), [1, 2])
    assert answers[2] is None and answers[1] is not None
