from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

from fedpeft.cli import jsonl
from fedpeft.engine import RoundReport
from fedpeft.events import Summary
from fedpeft.plan import Plan
from tests.cli import fakes


def names(kind: type) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)}


def events() -> list[dict[str, Any]]:
    out = io.StringIO()
    fakes.act(jsonl.Json(out), "some/folder")
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_an_object_per_event_in_order() -> None:
    one = ["round_began", "chunk_done", "chunk_done", "round_done", "note"]
    two = ["round_began", "chunk_done", "round_done"]
    baseline = ["stage", "round_began", "round_done"]
    wanted = ["planned", "stage", *one, *two, *baseline, "summary"]
    assert [event["event"] for event in events()] == wanted


def test_the_fields_are_those_documented() -> None:
    found = {event["event"]: event for event in events()}
    assert found["planned"].keys() == {"event", "folder", "plan"}
    assert found["planned"]["plan"].keys() == names(Plan)
    assert found["stage"].keys() == {"event", "name", "rounds"}
    assert found["round_began"].keys() == {"event", "stage", "round", "clients", "tokens"}
    assert found["chunk_done"].keys() == {"event", "stage", "clients", "tokens"}
    assert found["round_done"].keys() == {"event", "stage", "score"} | names(RoundReport)
    assert found["note"].keys() == {"event", "text"}
    assert found["summary"].keys() == {"event"} | names(Summary)
    assert all(f"``{event}``" in (jsonl.__doc__ or "") for event in found)


def test_values() -> None:
    found = events()
    rounds = [event for event in found if event["event"] == "round_done"]
    assert [event["stage"] for event in rounds] == ["fedavg", "fedavg", "local"]
    assert rounds[0]["excluded"]["client-4"] == "NaN in client-4"
    assert rounds[0]["score"] is None
    assert rounds[1]["score"]["accuracy"] == 0.8765
    assert rounds[1]["up"] == {"adapter": 6 * 2**20}
    rows = found[-1]["rows"]
    assert [row["name"] for row in rows] == ["untrained", "local", "fedavg", "centralised"]
    assert rows[2]["score"]["perplexity"] > 7.38
    assert rows[3]["mean"] is None and rows[3]["score"]["accuracy"] is None  # NaN


def test_every_line_is_there_at_once() -> None:
    class Slow(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    out = Slow()
    jsonl.Json(out).note("text")
    assert json.loads(out.flushed) == {"event": "note", "text": "text"}
