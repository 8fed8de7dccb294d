"""Structured logs: what a line holds, what is bound to it, who reads the file."""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedpeft import logs

OWN, OTHER, FLOWER = (logging.getLogger(n) for n in ("fedpeft.some", "library", "flwr.fedpeft"))


@pytest.fixture(autouse=True)
def nothing_bound() -> Iterator[None]:
    """Whatever tests before these have bound."""
    with logs.scope():
        logs._PLACE.set(logs.Place())
        yield


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    root, own = logging.getLogger(), logging.getLogger("fedpeft")
    before = (list(root.handlers), root.level, own.level)
    end = logs.write_to(tmp_path / "log.jsonl")
    yield tmp_path / "log.jsonl"
    end()
    assert (list(root.handlers), root.level, own.level) == before


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def test_a_line_says_what_where_and_when(path: Path) -> None:
    with logs.scope():
        logs.bind(run="r1", round=3)
        OWN.info("%d of %s", 2, "ü\x1b[2J\n")
    [line] = lines(path)
    when = datetime.fromisoformat(line.pop("time"))
    assert when.utcoffset() == timedelta(0)
    assert line == {
        "level": "INFO",
        "logger": "fedpeft.some",
        "message": "2 of ü\x1b[2J\n",
        "run": "r1",
        "round": 3,
        "client": None,
    }


def test_what_is_bound_ends_with_its_scope(path: Path) -> None:
    @logs.scope()
    def inner(client: str) -> None:
        logs.bind(client=client)
        OWN.info("in")

    with logs.scope():
        logs.bind(round=1)
        inner("a")
        inner("b")
        OWN.info("out")
        logs.bind(round=0)
        OWN.info("zero")
    OWN.info("nowhere")
    found = [(line["round"], line["client"]) for line in lines(path)]
    assert found == [(1, "a"), (1, "b"), (1, None), (0, None), (None, None)]


def test_a_record_of_its_own_place_goes_before_what_is_bound(path: Path) -> None:
    with logs.scope():
        logs.bind(round=1, client="a")
        OWN.warning("x", extra={"round": 2, "client": "b"})
    [line] = lines(path)
    assert (line["round"], line["client"]) == (2, "b")


def test_a_traceback_is_a_field(path: Path) -> None:
    try:
        raise ValueError("of one client")
    except ValueError:
        OWN.warning("failed", exc_info=True)
    [line] = lines(path)
    assert line["message"] == "failed"
    assert line["traceback"].endswith("ValueError: of one client")


def test_of_others_only_warnings(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "flwr")  # as Flower does
    for logger in (OWN, OTHER, FLOWER):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logger.log(level, "x")
    found = [(line["logger"], line["level"]) for line in lines(path)]
    assert found == [
        ("fedpeft.some", "INFO"),
        ("fedpeft.some", "WARNING"),
        ("library", "WARNING"),
        ("flwr.fedpeft", "INFO"),
        ("flwr.fedpeft", "WARNING"),
    ]


def test_the_file_is_its_owners_and_may_be_moved_away(path: Path) -> None:
    OWN.info("before")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.rename(path.with_name("old"))
    OWN.info("after")
    assert [line["message"] for line in lines(path)] == ["after"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_is_written_after_the_end(tmp_path: Path) -> None:
    end = logs.write_to(tmp_path / "log.jsonl")
    OWN.info("before")
    end()
    OWN.warning("after")
    assert [line["message"] for line in lines(tmp_path / "log.jsonl")] == ["before"]


def test_warnings_are_still_shown_where_nobody_else_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    end = logs.write_to(tmp_path / "log.jsonl")
    OWN.info("detail")
    OWN.warning("of fedpeft")
    FLOWER.warning("shown by Flower")
    end()
    assert capsys.readouterr().err == "of fedpeft\n"
    assert logging.getLogger().handlers == []
