"""The audit of whole runs: what is attacked, with which result, and that the run stays as it is."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from fedpeft.audit import run as audits
from fedpeft.audit.canaries import Planted, coins, plant, stream_of
from fedpeft.audit.report import refuted
from fedpeft.audit.run import Settings, audit_prepared, audit_run
from fedpeft.config import Engine, Evaluation, Local, Model, Output, Recipe, Rounds, Sampling
from fedpeft.engine import RoundReport, play_round
from fedpeft.errors import FedpeftError
from fedpeft.events import Watcher
from fedpeft.metrics import Score
from fedpeft.prepare import prepare
from fedpeft.run import run
from fedpeft.strategy import Messages, addressed
from tests.tiny import tiny_recipe, write_tiny

MEMORISES = Local(optimizer="adamw", lr=0.01, epochs=60, batch_size=32)
"""So much training that a tiny model knows much of its one client's examples by heart."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, sizes=(7, 13, 5, 16))
    return folder


def recipe(files: Path, out: Path | None = None, r: int = 8, **strategy: str) -> Recipe:
    adapter = {"kind": "lora", "r": r, "target_modules": ["query", "value", "dense"]}
    return dataclasses.replace(
        tiny_recipe(files, adapter, **strategy),
        engine=Engine(chunk=2, threads=1, device="cpu"),
        output=Output(folder=str(out or files / "out")),
        evaluation=Evaluation(clients=False),
        baselines=(),
    )


class Heard(Watcher):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rounds: list[int] = []
        self.clients = 0

    def chunk_done(self, clients: int, tokens: int) -> None:
        self.clients += clients

    def round_done(self, report: RoundReport, score: Score | None) -> None:
        self.rounds.append(report.round)

    def note(self, text: str) -> None:
        self.notes.append(text)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_a_run_is_audited_and_left_alone(files: Path, tmp_path: Path) -> None:
    made = recipe(files, tmp_path / "run")
    run(made, Watcher())
    before = digests(tmp_path / "run")
    heard = Heard()
    found = audit_run(str(tmp_path / "run"), Settings(canaries=40), heard)
    assert digests(tmp_path / "run") == before
    assert [finding.attack for finding in found] == [
        "loss of canaries",
        "epsilon by canaries",
        "loss of training data",
        "text of c2",
    ]
    assert [finding.measure for finding in found] == ["auc", "epsilon", "auc", "share"]
    assert all(finding.claimed == math.inf for finding in found) and not refuted(found)
    assert heard.rounds == [1, 2] and heard.notes == []
    assert found == audit_run(str(tmp_path / "run"), Settings(canaries=40), Watcher())
    assert found != audit_run(str(tmp_path / "run"), Settings(canaries=40, seed=1), Watcher())


@pytest.fixture(scope="module")
def memorised(files: Path) -> tuple[audits._Trained, Planted]:
    made = recipe(files, name="centralised")
    prepared = prepare(dataclasses.replace(made, local=MEMORISES, rounds=Rounds(count=1)))
    planted = plant(prepared.population, 100, stream_of(0))
    return audits._Trained(prepared, planted.population, Watcher()), planted


def test_a_model_that_memorises_is_found_out(
    memorised: tuple[audits._Trained, Planted],
) -> None:
    trained, planted = memorised
    area, epsilon = audits._canaries(trained, planted, 0.5, 1e-5)
    assert area.score > 0.8 and area.interval[0] > 0.75
    assert epsilon.score > 1 and epsilon.interval == (epsilon.score, math.inf)
    assert epsilon.sound is False and refuted([area, epsilon])
    _, high = audits._canaries(trained, planted, 8.0, 1e-5)
    assert high.sound is True and not refuted([high])


def test_coins_that_the_training_did_not_see_prove_nothing(
    memorised: tuple[audits._Trained, Planted],
) -> None:
    trained, planted = memorised
    other = dataclasses.replace(planted, included=coins(100, stream_of(9)))
    area, epsilon = audits._canaries(trained, other, 0.5, 1e-5)
    assert area.interval[0] < 0.5 < area.interval[1]
    assert epsilon.score < 0.5 and epsilon.sound is True


def test_a_client_of_one_short_text_and_one_step_is_read_out(files: Path, tmp_path: Path) -> None:
    lines = (files / "data.jsonl").read_text()
    row = '{"text": "read the lines of a file", "label": 1, "client": "alone"}\n'
    (tmp_path / "data.jsonl").write_text(lines + row)
    made = dataclasses.replace(
        recipe(tmp_path),
        model=Model("fedpeft-tiny"),
        adapter={"kind": "lora", "r": 8, "target_modules": ["query", "value"]},
        local=Local(optimizer="sgd", lr=0.5, batch_size=8),
    )
    for rounds, share in ((2, 1.0), (1, 0.0)):  # in the first round B is 0
        again = dataclasses.replace(made, rounds=Rounds(count=rounds))
        found = audit_prepared(prepare(again), Settings(canaries=20), Watcher())[-1]
        assert (found.attack, found.score) == ("text of alone", share)


def test_ffa_lora_is_no_target_of_the_inversion_and_says_so(files: Path) -> None:
    heard = Heard()
    made = recipe(files, name="ffa_lora")
    found = audit_prepared(prepare(made), Settings(canaries=20), heard)
    assert [finding.measure for finding in found] == ["auc", "epsilon", "auc"]
    (note,) = heard.notes
    assert note.startswith("gradient inversion does not apply: the update has no")


def test_a_victim_that_fails_is_noted(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    monkeypatch.setattr(audits, "_update", lambda *args: None)
    audit_prepared(prepare(recipe(files)), Settings(canaries=20), heard)
    assert heard.notes == ["gradient inversion does not apply: c2 sends no update"]


@pytest.mark.parametrize("name", ["scaffold", "flora", "fedask", "hetlora", "fedsa_lora"])
def test_other_strategies_are_audited_too(files: Path, name: str) -> None:
    made = recipe(files, r=4, name=name)
    sampled = dataclasses.replace(
        made, rounds=Rounds(count=2, sampling=Sampling("uniform", fraction=0.75))
    )
    prepared = prepare(sampled)
    if not prepared.strategy.shares:
        with pytest.raises(FedpeftError, match="has no global adapter"):
            audit_prepared(prepared, Settings(canaries=20), Watcher())
        return
    found = audit_prepared(prepared, Settings(canaries=20), Watcher())
    assert all(np.isfinite(finding.score) for finding in found) and len(found) >= 3


@pytest.mark.parametrize("name", ["scaffold", "fedavg"])
def test_the_victims_update_is_that_of_its_turn_in_the_run(files: Path, name: str) -> None:
    """Also where clients have private memory, and without a trace in the run that is attacked."""
    made = recipe(files, name=name)
    prepared = prepare(made)
    attacked = audits._Trained(prepared, prepared.population, Watcher())
    federation, state = prepared.federation(), prepared.strategy.init(prepared.problem)
    state, _ = play_round(prepared.strategy, state, federation, made.rounds, made.seed, 1)
    (sent,) = addressed(prepared.strategy, state, 2, ["c2"])
    kept = federation.memory()
    (reply,) = federation.run(2, sent)
    assert isinstance(reply, Messages) and attacked.update is not None
    for key, value in reply.trees["adapter"].items():
        assert attacked.update[key].equal((value - sent.trees["adapter"][key])[0])
    federation.restore(kept)
    state, _ = play_round(prepared.strategy, state, federation, made.rounds, made.seed, 2)
    plain, own = prepared.strategy.adapter(state), prepared.strategy.adapter(attacked.state)
    assert all(plain[key].equal(own[key]) for key in plain)


def test_what_is_refused(files: Path, tmp_path: Path) -> None:
    with pytest.raises(FedpeftError, match="is not a folder"):
        audit_run(str(tmp_path / "nothing"), Settings(), Watcher())
    with pytest.raises(FedpeftError, match="canaries=9: at least 10"):
        audit_prepared(prepare(recipe(files)), Settings(canaries=9), Watcher())
    with pytest.raises(FedpeftError, match="strategy.name='local' has no global adapter"):
        audit_prepared(prepare(recipe(files, name="local")), Settings(), Watcher())
