"""``fedpeft audit`` on a run: table, JSON, exit codes, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedpeft.audit import run as audits
from fedpeft.audit.report import Finding
from fedpeft.audit.run import Settings
from fedpeft.cli.app import app
from fedpeft.config import Engine, Evaluation, Local, Output
from fedpeft.events import Watcher
from fedpeft.run import run
from tests.tiny import LORA, tiny_recipe, write_tiny


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audited")
    write_tiny(folder)
    recipe = dataclasses.replace(
        tiny_recipe(folder, {**LORA, "r": 8}),
        local=Local(optimizer="adamw", lr=0.02, epochs=2, batch_size=8),
        engine=Engine(threads=1, device="cpu"),
        output=Output(folder=str(folder / "run")),
        evaluation=Evaluation(clients=False),
        baselines=(),
    )
    run(recipe, Watcher())
    return folder / "run"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["audit", *arguments])


def test_the_table_has_each_score_beside_the_claim(done: Path) -> None:
    result = call(str(done), "--canaries", "60")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["attack", "score", "95", "%", "claimed", "epsilon", "verdict"]
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "loss of canaries",
        "epsilon by canaries",
        "loss of training data",
        "text of c2",
    ]
    assert max(map(len, lines)) <= 80
    assert all(line.split()[-3:] == ["none", "no", "claim"] for line in lines[2:])


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """An audit that is acted: what it was asked; it notes something and refutes the claim."""
    asked: list[Settings] = []

    def act(folder: str, settings: Settings, watcher: Watcher) -> list[Finding]:
        asked.append(settings)
        watcher.stage("audit", 1)
        watcher.note("the text is out of reach")
        return [
            Finding("loss of canaries", "auc", 0.9, (0.8, 0.95), 1.0, None),
            Finding("epsilon by canaries", "epsilon", 2.0, (2.0, math.inf), 1.0, False),
        ]

    monkeypatch.setattr(audits, "audit_run", act)
    return asked


def test_a_claim_that_an_attack_refutes_is_exit_code_1(acted: list[Settings]) -> None:
    result = call("run", "--canaries", "70", "--seed", "3")
    assert result.exit_code == 1
    assert acted == [Settings(canaries=70, seed=3)]
    lines = result.stdout.splitlines()
    assert lines[3].split() == ["epsilon", "by", "canaries", ">=", "2.000", "1.000", "REFUTED"]
    assert lines[4] == "note: the text is out of reach"


def test_json_is_one_object_for_each_attack(acted: list[Settings]) -> None:
    result = call("run", "--json")
    assert result.exit_code == 1 and acted == [Settings(canaries=200, seed=0)]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert found[0] == {"event": "note", "text": "the text is out of reach"}
    assert [line["event"] for line in found[1:]] == ["finding", "finding"]
    assert found[2] == {
        "event": "finding",
        "attack": "epsilon by canaries",
        "measure": "epsilon",
        "score": 2.0,
        "interval": [2.0, None],
        "claimed": 1.0,
        "sound": False,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "nosuch is not a folder, and there is no run beside it."),
        (["{run}", "--canaries", "1"], "canaries=1: at least 10 are needed"),
    ],
)
def test_what_is_refused(done: Path, arguments: list[str], message: str) -> None:
    result = call(*(argument.replace("{run}", str(done)) for argument in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in " ".join(result.stderr.split())
