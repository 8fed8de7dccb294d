"""Messages to Flower's nodes and what comes back, within bounds of time.

A node that has not answered when its time is up may still be at work: until it has, or another
such time has passed, it is asked nothing more, and what it then sends is thrown away.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds, and for how many.

    join: for all nodes to join, and for each to introduce itself. reply: for a node's reply,
    training included. enough: the share of a round's clients whose replies end the wait, for
    over-selection: who then is late is excluded.
    """

    join: float = 120.0
    reply: float = 3600.0
    enough: float = 1.0


class Courier:
    """Asks nodes of a grid. alive: called while waiting; it may raise to end the wait."""

    def __init__(self, grid: Grid, patience: Patience, alive: Callable[[], None]) -> None:
        self._grid = grid
        self._patience = patience
        self._alive = alive
        self._late: dict[str, tuple[int, float]] = {}  # message -> its node, when it is given up

    def nodes(self) -> list[int]:
        """The nodes that are connected, ascending."""
        return sorted(self._grid.get_node_ids())

    def busy(self) -> set[int]:
        """The nodes that still owe an answer to an earlier request."""
        for answer in self._grid.pull_messages(list(self._late)) if self._late else ():
            node, _ = self._late.pop(answer.metadata.reply_to_message_id, (None, 0.0))
            log.warning("node %s: passed over a reply that came too late", node)
        now = time.monotonic()
        self._late = {number: own for number, own in self._late.items() if own[1] > now}
        return {node for node, _ in self._late.values()}

    def ask(
        self, kind: str, contents: dict[int, RecordDict], round: int, wait: float, share: float = 1
    ) -> dict[int, Message | None]:
        """Each node's answer, None where there was none in time. ``contents`` is emptied.

        wait: in seconds. share: of the nodes, answers without an error that end the wait.
        """
        answers: dict[int, Message | None] = dict.fromkeys(contents)
        enough = math.ceil(share * len(contents))
        waiting: dict[str, int] = {}
        while contents:  # serialised messages are let go one by one
            node, content = contents.popitem()
            message = Message(content, node, kind, group_id=str(round))
            waiting.update({i: node for i in self._grid.push_messages([message]) if i})
        began, good = time.monotonic(), 0
        while waiting and good < enough and time.monotonic() - began < wait:
            for answer in self._grid.pull_messages(list(waiting)):
                asked = waiting.pop(answer.metadata.reply_to_message_id, None)
                if asked is None:
                    log.warning("passed over a reply that answers nothing, or once more")
                    continue
                answers[asked] = answer
                good += not answer.has_error()
            if waiting and good < enough:
                self.pause(began)
        until = time.monotonic() + self._patience.reply
        self._late |= {number: (node, until) for number, node in waiting.items()}
        return answers

    def pause(self, began: float) -> None:
        """Waits a fiftieth of the time waited since ``began``, within [5 ms, 1 s]."""
        self._alive()
        time.sleep(min(1.0, max(0.005, (time.monotonic() - began) / 50)))
