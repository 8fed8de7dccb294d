"""Whole runs under a budget: how they end, what a resume charges, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeft.config import (
    Engine,
    Evaluation,
    Output,
    Privacy,
    Recipe,
    Rounds,
)
from fedpeft.errors import FedpeftError
from fedpeft.events import Summary, Watcher
from fedpeft.privacy.accountants import epsilon
from fedpeft.privacy.client_level import ClientLevel
from fedpeft.privacy.events import (
    compose,
    from_json,
)
from fedpeft.privacy.ledger import Budget, Ledger
from fedpeft.record.folder import RunFolder
from fedpeft.run import resume, run
from tests.privacy.federated import charged, rounds_of
from tests.tiny import tiny_recipe, write_tiny


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, sizes=(7, 13, 5, 16))
    return folder


def recipe(files: Path, out: Path, privacy: Privacy, rounds: Rounds) -> Recipe:
    return dataclasses.replace(
        tiny_recipe(files),
        rounds=rounds,
        privacy=privacy,
        engine=Engine(chunk=2, threads=1, device="cpu", workers=1),
        evaluation=Evaluation(clients=False),
        output=Output(folder=str(out)),
        baselines=(),
    )


def notes(folder: Path) -> list[str]:
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["text"] for line in every if line["kind"] == "note"]


class Stopper(Watcher):
    """Interrupts the run when the first clients of round ``at`` are trained."""

    def __init__(self, at: int) -> None:
        self.at, self.now = at, 0

    def round_began(self, number: int, clients: int, tokens: int) -> None:
        self.now = number

    def chunk_done(self, clients: int, tokens: int) -> None:
        if self.now == self.at:
            raise KeyboardInterrupt


def promise(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "privacy.json").read_text())
    assert isinstance(found, dict)
    return found


def test_a_private_run_leaves_its_statement_and_its_ledger(files: Path, tmp_path: Path) -> None:
    privacy = Privacy("record", noise_multiplier=1.0, delta=1e-3)
    summary = run(recipe(files, tmp_path / "run", privacy, rounds_of(count=2)), Watcher())
    assert any(line.startswith("promise: epsilon") for line in summary.privacy)
    assert promise(tmp_path / "run")["unit"] == "record"
    assert [number for number, _ in charged(tmp_path / "run")] == [1, 2]
    every = (tmp_path / "run" / "metrics.jsonl").read_text()
    rounds = [json.loads(x) for x in every.splitlines() if json.loads(x)["kind"] == "round"]
    assert len(rounds) == 2 and not any(
        isinstance(r["loss"], float) and math.isfinite(r["loss"]) for r in rounds
    )


def test_a_spent_budget_ends_the_run_with_its_model(files: Path, tmp_path: Path) -> None:
    """Test 53 of the list; the note is in the log and the summary is written."""
    out = tmp_path / "run"
    privacy = Privacy("client", noise_multiplier=1.0, delta=1e-3, max_rounds=2)
    summary = run(recipe(files, out, privacy, rounds_of(count=5)), Watcher())
    assert summary.rounds == 2 and (out / "adapter" / "adapter_model.safetensors").exists()
    assert [n for n in notes(out) if n.startswith("stopped before round 3")]
    assert len(charged(out)) == 2


def test_a_killed_round_is_charged_again_and_said(files: Path, tmp_path: Path) -> None:
    """Test 54 of the list: epsilon goes on and never begins anew."""
    out = tmp_path / "run"
    privacy = Privacy("record", noise_multiplier=1.0, delta=1e-3)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(files, out, privacy, rounds_of(count=3)), Stopper(2))
    assert [number for number, _ in charged(out)] == [1, 2]
    before = promise(out)
    resume(str(out), Watcher())
    assert [number for number, _ in charged(out)] == [1, 2, 2, 3]
    assert any("from 2 on are charged once more" in text for text in notes(out))
    after = promise(out)
    assert after["terms"] == before["terms"]
    first = json.loads((out / "privacy.jsonl").read_text().splitlines()[1])
    with Ledger.open(out / "privacy.jsonl", Budget(math.inf, 1e-3)) as ledger:
        once = {c: from_json(event) for event, own in first["charges"] for c in own}
        assert len(set(once.values())) > 1  # clients of several sizes
        for client, event in once.items():
            assert ledger.spent(client) == compose([event] * 4)
        worst = max(epsilon(ledger.spent(c), 1e-3, "prv") for c in once)
    assert after["epsilon"][0] == pytest.approx(worst, rel=1e-6)


def test_a_budget_that_a_replay_used_up_ends_the_run_a_round_early(
    files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    privacy = Privacy("client", epsilon=4.0, delta=1e-3, accountant="rdp")
    with pytest.raises(KeyboardInterrupt):
        run(recipe(files, out, privacy, rounds_of(count=3)), Stopper(2))
    summary: Summary = resume(str(out), Watcher())
    assert summary.rounds == 2
    assert promise(out)["epsilon"][0] <= 4.0


def test_a_resume_with_an_edited_recipe_is_refused(files: Path, tmp_path: Path) -> None:
    """Test 49 of the list, for what concerns privacy."""
    out = tmp_path / "run"
    privacy = Privacy("client", epsilon=4.0, delta=1e-3, accountant="rdp")
    with pytest.raises(KeyboardInterrupt):
        run(recipe(files, out, privacy, rounds_of(count=3)), Stopper(2))
    path = out / "recipe.yaml"
    written = yaml.safe_load(path.read_text())
    written["privacy"]["epsilon"] = 40.0
    path.write_text(yaml.safe_dump(written))
    with pytest.raises(FedpeftError, match=r"privacy\.epsilon: 4\.0 -> 40\.0.*Restore"):
        resume(str(out), Watcher())
    RunFolder.open(out).allow(["privacy.epsilon"])
    with pytest.raises(FedpeftError, match=r"other terms of privacy.*Restore them"):
        resume(str(out), Watcher())


def test_a_resume_without_its_ledger_is_refused(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    privacy = Privacy("client", noise_multiplier=1.0, delta=1e-3)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(files, out, privacy, rounds_of(count=3)), Stopper(2))
    (out / "privacy.jsonl").unlink()
    with pytest.raises(FedpeftError, match="does not hold the line"):
        resume(str(out), Watcher())


@pytest.mark.parametrize("kind", ["adaptive", "bands"])
def test_what_a_mechanism_remembers_survives_a_resume(
    kind: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound, or the noise of the rounds before, is in the checkpoint and is put back."""
    given: dict[str, Any] = {"adaptive": {"adaptive": True}, "bands": {"bands": 2}}[kind]
    rounds = rounds_of("cyclic", 4, groups=2) if kind == "bands" else rounds_of(count=4)
    privacy = Privacy("client", noise_multiplier=0.15, delta=1e-3, **given)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(recipe(files, out, privacy, rounds), Stopper(3))
    restored: list[dict[str, Any]] = []
    plain = ClientLevel.restore

    def seen(self: ClientLevel, memory: Mapping[str, Any]) -> None:
        restored.append(dict(memory))
        plain(self, memory)

    monkeypatch.setattr(ClientLevel, "restore", seen)
    summary = resume(str(out), Watcher())
    assert summary.rounds == 4 and len(restored) == 1
    assert restored[0].keys() == ({"noise"} if kind == "bands" else {"bound"})
