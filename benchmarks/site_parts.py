"""The processes of ``benchmarks.site``: one message's, and a worker that notes its first step.

``python -m benchmarks.site_parts message APP REQUEST CONFIG NOTES`` does what Flower's process for
a message does once it has the message: load the client app, call it. ``... worker FOLDER SOCKET``
is the resident process's worker. Both write when the first training step of a message begins.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

FIRST_STEP = "FEDPEFT_BENCHMARK_FIRST_STEP"
"""Environment: the file that gets the time of each message's first training step."""


def note(path: Path, value: object) -> None:
    """Appends a line of JSON."""
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def mark_first_steps() -> None:
    """From now on every training of a client notes when its first forward pass begins."""
    from fedpeft.cohort.federation import CohortFederation
    from fedpeft.cohort.lanes import LoopLane

    path = Path(os.environ[FIRST_STEP])
    armed = False
    run, logits = CohortFederation.run, LoopLane.logits

    def noted_run(self: Any, round: int, *stacks: Any) -> Any:
        nonlocal armed
        armed = True
        yield from run(self, round, *stacks)

    def noted_logits(self: Any, stacked: Any, batch: Any) -> Any:
        nonlocal armed
        if armed:
            armed = False
            note(path, time.monotonic())
        return logits(self, stacked, batch)

    CohortFederation.run = noted_run  # type: ignore[method-assign]
    LoopLane.logits = noted_logits  # type: ignore[method-assign]


def message(app: str, request: Path, config: Path, notes: Path) -> None:
    """Hands a message to a client app; notes when it was in hand, answered, and the answer."""
    from flwr.app import Context, RecordDict
    from flwr.app import Message as FlowerMessage
    from flwr.supercore.task_identity import TaskIdentity

    from fedpeft.flower import wire
    from fedpeft.site.frames import receive

    for name in ("run_id", "node_id", "task_id"):
        setattr(TaskIdentity, name, 1)
    frame = receive(_File(request))  # type: ignore[arg-type]
    asked = FlowerMessage(wire.unpack(frame), 1, str(frame.head["kind"]))
    asked.metadata.__dict__["_message_id"] = "1"
    context = Context(1, 1, json.loads(config.read_text()), RecordDict(), {})
    in_hand = time.monotonic()
    if app == "fedpeft.flower.client_app":
        importlib.import_module(app)
        mark_first_steps()
    reply = importlib.import_module(app).app(asked, context)
    answered = time.monotonic()
    if reply.has_error():
        raise SystemExit(str(reply.error.reason))
    note(notes, {"in_hand": in_hand, "answered": answered, "digest": _digest(reply.content)})


class _File:
    """A frame in a file, read as from a socket."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")

    def recv(self, count: int) -> bytes:
        return self._file.read(count)

    def sendall(self, data: bytes) -> None:
        raise AssertionError("it is read only")


def _digest(content: Any) -> str:
    """Of a reply's trees."""
    found = hashlib.sha256()
    for key in sorted(key for key in content if key.startswith("tree.")):
        for name, array in sorted(content[key].items()):
            found.update(name.encode() + array.data)
    return found.hexdigest()


if __name__ == "__main__":
    role, *rest = sys.argv[1:]
    if role == "message":
        message(rest[0], *(Path(word) for word in rest[1:]))
    else:
        from fedpeft.flower import resident

        mark_first_steps()
        resident.main(Path(rest[0]), int(rest[1]))
