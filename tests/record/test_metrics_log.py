"""metrics.jsonl: one schema, valid JSON, whole lines whatever happens, cut back for a resume."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
from pathlib import Path

import pytest

from fedpeft.errors import FedpeftError
from fedpeft.record.metrics_log import MetricsLog

SCORE = {"items": 3, "loss": 0.5, "accuracy": 1.0, "macro_f1": math.nan, "perplexity": math.inf}
ROUND = {
    "clients": 3,
    "replies": 2,
    "failures": [{"client": "ä\n", "reason": "NaN in adapter"}],
    "loss": 1.25,
    "bytes_down": {"adapter": 12},
    "bytes_up": {"adapter": 8},
    "seconds": 0.1,
}


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    return MetricsLog(tmp_path / "metrics.jsonl")


def fill(log: MetricsLog, rounds: int) -> None:
    log.append("note", 0, {"text": "started"})
    for round in range(1, rounds + 1):
        log.append("round", round, ROUND)
        log.append("evaluation", round, {"scope": "test", "score": SCORE})
    log.append("evaluation", None, {"scope": "clients", "score": {"a": SCORE}})
    log.append("baseline", None, {"name": "local", "score": SCORE})
    log.append("summary", None, {"rows": []})


def rounds_of(log: MetricsLog) -> list[object]:
    return [line["round"] for line in log.read()]


def test_lines_come_back_in_order(log: MetricsLog) -> None:
    fill(log, 2)
    lines = log.read()
    assert [x["kind"] for x in lines] == [
        *("note", "round", "evaluation", "round", "evaluation"),
        *("evaluation", "baseline", "summary"),
    ]
    assert lines[1] == {"schema": 1, "kind": "round", "round": 1, **ROUND}
    assert MetricsLog(log.path.with_name("none.jsonl")).read() == []


def test_figures_that_are_not_finite_are_null_and_every_line_is_valid_json(log: MetricsLog) -> None:
    fill(log, 1)
    log.append("round", 2, {**ROUND, "loss": -math.inf, "extra": [(math.nan,), "NaN"]})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = [json.loads(x, parse_constant=refuse) for x in log.path.read_text().splitlines()]
    assert lines[2]["score"] == {**SCORE, "macro_f1": None, "perplexity": None}
    assert lines[-1]["loss"] is None
    assert lines[-1]["extra"] == [[None], "NaN"]
    assert log.path.read_bytes().isascii()


WRONG = [
    (
        "rounds",
        1,
        ROUND,
        "kind 'rounds' is not one of round, bytes, fleet, evaluation, baseline, summary, note",
    ),
    ("round", 1, {**ROUND, "schema": 2}, "['schema'] are not fields"),
    ("note", 1, {"text": "x", "round": 3}, "['round'] are not fields"),
    ("round", 1, {}, "needs bytes_down, bytes_up, clients, failures, loss, replies, seconds"),
    ("evaluation", 1, {"scope": "test"}, "needs score"),
    ("round", -1, ROUND, "round -1 of a round is neither null nor a number from 0"),
    ("round", 1.0, ROUND, "round 1.0"),
    ("round", True, ROUND, "round True"),
    ("summary", 3, {"rows": []}, "a summary belongs to the whole run: its round must be null"),
    ("baseline", 3, {"name": "local", "score": {}}, "a baseline belongs to the whole run"),
]


@pytest.mark.parametrize(("kind", "round", "fields", "message"), WRONG)
def test_a_line_that_breaks_the_schema_is_not_written(
    log: MetricsLog, kind: str, round: int, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        log.append(kind, round, fields)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert not log.path.exists()


@pytest.mark.parametrize("after", range(4))
def test_truncate_keeps_what_a_resumed_run_does_not_write_again(
    log: MetricsLog, after: int
) -> None:
    fill(log, 3)
    log.truncate_after(after)
    assert rounds_of(log) == [0] + [r for r in (1, 2, 3) if r <= after for _ in range(2)]
    log.append("note", after, {"text": "resumed"})
    assert log.read()[-1]["text"] == "resumed"


def test_a_resumed_run_writes_the_same_file_as_one_that_never_stopped(
    log: MetricsLog, tmp_path: Path
) -> None:
    whole = MetricsLog(tmp_path / "whole.jsonl")
    fill(whole, 3)
    data = whole.path.read_bytes()
    tail = b"".join(data.splitlines(keepends=True)[3:])
    kept = len(data) - len(tail)
    for size in (*range(kept, len(data), 41), len(data)):
        log.path.write_bytes(data[:size])
        log.truncate_after(1)
        assert log.path.read_bytes() == data[:kept], size
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_torn_last_line_is_passed_over_while_reading(log: MetricsLog) -> None:
    fill(log, 1)
    data = log.path.read_bytes()
    whole = len(log.read())
    for size in range(data[:-1].rfind(b"\n") + 1, len(data) - 1):
        log.path.write_bytes(data[:size])
        assert len(log.read()) == whole - 1, size
    log.path.write_bytes(data[:-1])
    assert len(log.read()) == whole  # only the line's end is missing
    log.path.write_bytes(data + b"\0" * 9)  # what some file systems leave after a power cut
    assert len(log.read()) == whole


def test_a_torn_line_without_its_end_is_completed_by_truncate(log: MetricsLog) -> None:
    log.append("note", 1, {"text": "x"})
    log.path.write_bytes(log.path.read_bytes()[:-1])
    log.truncate_after(1)
    log.append("note", 1, {"text": "y"})
    assert [line["text"] for line in log.read()] == ["x", "y"]


FOREIGN = [
    (b'{"schema": 2, "kind": "note"}', "line 2 has schema 2, this fedpeft reads schema 1"),
    (b'{"schema": "1", "kind": "note"}', "line 2 has schema '1'"),
    (b'{"loss": 1}', "line 2 has no schema number"),
    (b"[1]", "line 2 has no schema number"),
    (b"round,loss", "line 2 is not JSON"),
    (b"\xff\xfe", "line 2 is not JSON"),
    (b'{"schema": 1, "kind": "roumd", "round": 1}', "line 2 kind 'roumd' is not one of"),
    (b'{"schema": 1, "kind": "note", "round": 1}', "line 2 a note needs text"),
]


@pytest.mark.parametrize(("line", "message"), FOREIGN)
def test_a_file_of_another_kind_or_schema_is_refused_by_line(
    log: MetricsLog, line: bytes, message: str
) -> None:
    fill(log, 1)
    lines = log.path.read_bytes().splitlines()
    log.path.write_bytes(b"\n".join([lines[0], line, *lines[1:], b""]))
    for use in (log.read, lambda: log.truncate_after(1)):
        before = log.path.read_bytes()
        with pytest.raises(FedpeftError) as caught:
            use()
        assert message in str(caught.value) and str(log.path) in str(caught.value)
        assert log.path.read_bytes() == before


def test_a_full_disk_leaves_the_lines_before_whole(log: MetricsLog) -> None:
    fill(log, 1)
    before = log.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(
            FedpeftError, match=r"the disk is full.*lines before are intact.*resume"
        ):
            log.append("note", 1, {"text": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.path.read_bytes() == before


def test_a_full_disk_while_truncating_leaves_the_file(
    log: MetricsLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(log, 2)
    before = log.path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FedpeftError, match="the disk is full"):
        log.truncate_after(1)
    assert log.path.read_bytes() == before
    assert [p.name for p in log.path.parent.iterdir()] == ["metrics.jsonl"]
