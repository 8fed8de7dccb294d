"""Watchers put together: every event reaches all of them, and log lines know their round."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fedpeft import logs
from fedpeft.config_load import dump_recipe, load_recipe
from fedpeft.deploy.local import free_ports
from fedpeft.errors import FedpeftError
from fedpeft.events import Watcher
from fedpeft.observe.watchers import LogLines, Several, watching
from fedpeft.record.folder import RunFolder
from tests.cli.fakes import NAMES, act

EVENTS = [name for name, _ in inspect.getmembers(Watcher, inspect.isfunction) if name[0] != "_"]


@pytest.mark.parametrize("event", EVENTS)
def test_several_are_told_every_event_in_order(event: str) -> None:
    told: list[tuple[int, tuple[Any, ...]]] = []

    class Told(Watcher):
        def __init__(self, number: int) -> None:
            setattr(self, event, lambda *arguments: told.append((number, arguments)))

    count = len(inspect.signature(getattr(Watcher, event)).parameters) - 1
    getattr(Several([Told(1), Told(2)]), event)(*range(count))
    assert told == [(1, tuple(range(count))), (2, tuple(range(count)))]
    assert len(EVENTS) == 7


def test_a_run_as_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    act(LogLines("fedpeft.test"))
    said = [(r.levelname, getattr(r, "round", None), r.getMessage()) for r in caplog.records]
    assert said[0] == (
        "INFO",
        None,
        "fedavg: 2 rounds over 6 clients, engine cohort on cpu",
    )
    assert ("INFO", 1, "round 1: 1 replies, loss 1.2500") in said
    assert ("INFO", 2, "round 2: test loss 2.0000, accuracy 0.8765") in said
    assert ("WARNING", None, "a checkpoint was skipped") in said
    assert ("INFO", None, "complete: 2 rounds, 3 excluded, 61.0 s") in said
    excluded = [r for r in caplog.records if "excluded: NaN" in r.getMessage()]
    assert [r.__dict__["client"] for r in excluded] == list(NAMES[:5])
    assert {r.__dict__["round"] for r in excluded} == {1}


def test_a_server_is_watched_as_its_run_config_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "flwr")  # as Flower does
    [port] = free_ports(1)
    folder = RunFolder.create(tmp_path / "run")
    folder.describe(dump_recipe(load_recipe("quickstart")), "data")
    config = {"log": str(tmp_path / "log.jsonl"), "metrics-port": port}
    with watching(config, "flwr.fedpeft") as watcher:
        logs.bind(run="abc")
        act(watcher, str(folder.path))
    logging.getLogger("flwr.fedpeft").error("behind the end")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["run"] for line in lines} == {"abc"} and len(lines) > 10
    assert {line["logger"] for line in lines} == {"flwr.fedpeft"}
    assert lines[-1]["message"].startswith("the adapter is in ")


def test_without_settings_there_are_lines_for_a_person_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fedpeft.test")
    with watching({"log": "", "metrics-port": 0}, "fedpeft.test") as watcher:
        act(watcher)
    assert len(caplog.records) > 10


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"metrics-port": "many"}, "metrics-port='many' must be a port"),
        ({"metrics-port": 65536}, "metrics-port=65536 must be a port"),
        ({"log": "missing/log.jsonl"}, "log='.*missing/log.jsonl' cannot be written"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, config: dict[str, object], message: str) -> None:
    if "log" in config:
        config = {"log": str(tmp_path / str(config["log"]))}
    with pytest.raises(FedpeftError, match=message), watching(config, "fedpeft.test"):
        pass
