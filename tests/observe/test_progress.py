"""What a run folder says of the run, while somebody writes it."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config import Comms, Privacy, Recipe, Rounds
from fedpeft.config_load import load_recipe
from fedpeft.errors import FedpeftError
from fedpeft.observe.progress import Progress, progress, spent
from fedpeft.privacy.events import Gaussian
from fedpeft.privacy.ledger import Budget, Ledger
from fedpeft.record.metrics_log import MetricsLog

DELTA = 1e-4


def recipe(epsilon: float = 8.0, budget: str = "1 MB") -> Recipe:
    return dataclasses.replace(
        load_recipe("quickstart"),
        rounds=Rounds(count=5),
        privacy=Privacy(unit="client", epsilon=epsilon, delta=DELTA),
        comms=Comms(budget=budget),
    )


def add_round(log: MetricsLog, number: int, **changed: Any) -> None:
    fields = {
        "clients": 3,
        "replies": 2,
        "failures": [],
        "loss": 1.5,
        "bytes_down": {"adapter": 10, "head": 1},
        "bytes_up": {"adapter": 20},
        "seconds": 2.0,
    }
    log.append("round", number, fields | changed)


def test_before_anything_was_done(tmp_path: Path) -> None:
    found = progress(tmp_path / "run", recipe())
    assert dataclasses.replace(found, loss=0.0, checkpoint=0.0) == Progress(
        0, 5, budget=1_000_000, loss=0.0, checkpoint=0.0
    )
    assert math.isnan(found.loss) and math.isnan(found.checkpoint)


def test_rounds_add_up_and_the_last_one_is_told(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    add_round(log, 1, loss=9.0)
    score = {"items": 4, "loss": 2.0, "accuracy": 0.5, "macro_f1": 0.5, "perplexity": 7.0}
    log.append("evaluation", 1, {"scope": "test", "score": score})
    log.append("evaluation", None, {"scope": "clients", "score": {}})
    failures = [
        {"client": "a", "reason": "dropped out"},
        {"client": "b", "reason": "NaN or Inf in tensor 'x'"},
    ]
    add_round(log, 2, replies=1, failures=failures)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"schema": 1, "kind": "rou')  # being written
    found = progress(tmp_path, recipe())
    assert (found.rounds, found.clients, found.replies, found.loss) == (2, 3, 1, 1.5)
    assert found.excluded == {"b": "NaN or Inf in tensor 'x'"} and found.dropped == ("a",)
    assert found.down == {"adapter": 20, "head": 2} and found.up == {"adapter": 40}
    assert (found.seconds, found.ended, found.test) == (4.0, False, score)


def test_a_loss_that_is_not_finite_is_not_a_number(tmp_path: Path) -> None:
    add_round(MetricsLog(tmp_path / "metrics.jsonl"), 1, loss=math.inf)
    assert math.isnan(progress(tmp_path, recipe()).loss)


def test_the_summary_is_the_end(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").append("summary", None, {"rows": []})
    assert progress(tmp_path, recipe()).ended


def test_the_newest_checkpoint_counts(tmp_path: Path) -> None:
    for name, when in (("round-000001", 50), ("round-000002", 70), (".writing-round-000003", 90)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        os.utime(tmp_path / "checkpoints" / name, (when, when))
    assert progress(tmp_path, recipe()).checkpoint == 70


@pytest.mark.parametrize("epsilon", [0.0, 8.0])
def test_what_is_spent_is_read_while_the_ledger_is_open(tmp_path: Path, epsilon: float) -> None:
    path = tmp_path / "privacy.jsonl"
    with Ledger.open(path, Budget(math.inf, DELTA)) as ledger:
        ledger.charge(1, {"a": Gaussian(1.0), "b": Gaussian(2.0)})
        wanted = ledger.epsilon("a")
        with path.open("a") as file:
            file.write('{"sha256": "')  # being written
        before = path.read_bytes()
        found = spent(path, recipe(epsilon))
        assert found is not None and path.read_bytes() == before
    assert (found.epsilon, found.delta, found.clients) == (wanted, DELTA, 2)
    assert found.budget == (epsilon or math.inf)
    assert progress(tmp_path, recipe(epsilon)).privacy == found


def test_a_deployments_ledger_lies_beside_its_run(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "privacy.jsonl", Budget(math.inf, DELTA)) as ledger:
        ledger.charge(1, {"a": Gaussian(1.0)})
    found = progress(tmp_path / "run", recipe())
    assert found.privacy is not None and found.privacy.epsilon > 0


def test_a_round_without_a_result_and_the_last_note(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    add_round(log, 1, loss=math.nan, aborted="too few")
    log.append("note", 1, {"text": "first"})
    log.append("note", 1, {"text": "aborted: too few"})
    found = progress(tmp_path, recipe())
    assert (found.rounds, found.aborted, found.note) == (1, "too few", "aborted: too few")


def test_a_ledger_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    with Ledger.open(path, Budget(math.inf, DELTA)) as ledger:
        ledger.charge(1, {"a": Gaussian(1.0)})
    path.write_bytes(path.read_bytes().replace(b'"round": 1', b'"round": 2'))
    with pytest.raises(FedpeftError, match="line 2 was changed"):
        progress(tmp_path, recipe())
