"""Runs under a budget: who may take part, when a run ends, what a resume may not change."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedpeft.config import (
    Engine,
    Evaluation,
    Output,
    Privacy,
    Recipe,
    Rounds,
    Sampling,
    SecureAggregation,
)
from fedpeft.errors import FedpeftError
from fedpeft.events import Summary, Watcher
from fedpeft.privacy.accountants import epsilon
from fedpeft.privacy.client_level import ClientLevel
from fedpeft.privacy.events import (
    Gaussian,
    Nothing,
    Repeated,
    SampledGaussian,
    compose,
    from_json,
)
from fedpeft.privacy.guard import BudgetSpentError, Guard
from fedpeft.privacy.ledger import Budget, Ledger
from fedpeft.privacy.terms import EVERYONE, terms_of
from fedpeft.run import resume, run
from tests.privacy.federated import recipe_of
from tests.tiny import tiny_recipe, write_tiny

FREE = Budget(math.inf, 1e-5)
CLIENTS = {f"c{k}": 40 for k in range(6)}


def rounds_of(kind: str = "uniform", count: int = 6, **sampling: Any) -> Rounds:
    return Rounds(count=count, weighting="equal", sampling=Sampling(kind, **sampling))  # type: ignore[arg-type]


def guard_of(
    path: Path,
    rounds: Rounds,
    privacy: Privacy,
    sizes: Mapping[str, int] = CLIENTS,
    head: str | None = None,
    **changes: Any,
) -> Guard:
    recipe = recipe_of(privacy=privacy, rounds=rounds, **changes)
    terms = terms_of(recipe, np.array(list(sizes.values())), 1)
    assert terms is not None
    return Guard(terms, path / "privacy.jsonl", recipe, head)


def charged(folder: Path) -> list[tuple[int, list[str]]]:
    """(round, clients) of each charge, in order."""
    every = [json.loads(line) for line in (folder / "privacy.jsonl").read_text().splitlines()[1:]]
    return [(one["round"], sorted(c for _, own in one["charges"] for c in own)) for one in every]


# -- who may take part


def test_clients_are_charged_before_the_round_each_for_its_own_size(tmp_path: Path) -> None:
    """DP10: what one client spends does not depend on the others' sizes."""
    sizes = {"a": 4, "b": 40}
    guard = guard_of(
        tmp_path, rounds_of(), Privacy("record", noise_multiplier=1.0, delta=1e-3), sizes
    )
    assert guard.admit(1, sizes) == ("a", "b")
    assert charged(tmp_path) == [(1, ["a", "b"])]  # on disk already
    assert guard.ledger.spent("a") == Gaussian(1.0)
    assert guard.ledger.spent("b") == Repeated(SampledGaussian(0.1, 1.0), 10)
    guard.close()


def test_a_client_whose_budget_is_spent_stays_out_and_others_go_on(tmp_path: Path) -> None:
    privacy = Privacy("client", noise_multiplier=1.0, max_rounds=2, delta=1e-3)
    guard = guard_of(tmp_path, rounds_of("fixed", 12, size=3), privacy)
    taken = dict.fromkeys(CLIENTS, 0)
    for number in range(1, 13):
        try:
            names = guard.admit(number, CLIENTS)
        except BudgetSpentError as error:
            assert "of 3 clients that were drawn 0 have privacy budget left" in str(error)
            break
        for name in names:
            taken[name] += 1
    guard.close()
    assert max(taken.values()) == 2
    assert any(len(names) < 3 for _, names in charged(tmp_path)), "somebody was left out alone"


def test_a_budget_of_epsilon_stops_a_client_by_what_it_spent(tmp_path: Path) -> None:
    """The second client's noise is weaker: it may go on only half as long."""
    privacy = Privacy("record", epsilon=3.0, delta=1e-3, accountant="rdp")
    guard = guard_of(tmp_path, rounds_of(count=4), privacy)
    guard.ledger.charge(0, {"c1": Repeated(guard.terms.event(40), 2)})
    admitted = [guard.admit(number, CLIENTS) for number in range(1, 5)]
    assert [("c1" in names) for names in admitted] == [True, True, False, False]
    assert all("c0" in names for names in admitted)
    worst = guard.ledger.worst()
    guard.close()
    assert 2.9 <= worst <= 3.0


def test_without_a_cap_rounds_are_only_recorded(tmp_path: Path) -> None:
    """A round that is played again costs more; nobody asked for a limit."""
    privacy = Privacy("client", noise_multiplier=1.0, delta=1e-3)
    guard = guard_of(tmp_path, rounds_of(count=2), privacy)
    for number in (1, 2, 2, 2):
        assert guard.admit(number, CLIENTS) == tuple(sorted(CLIENTS))
    assert guard.ledger.spent("c0") == Repeated(Gaussian(1.0), 4)
    guard.close()


def test_poisson_charges_everybody_whoever_is_drawn(tmp_path: Path) -> None:
    privacy = Privacy("client", noise_multiplier=1.0, delta=1e-3)
    guard = guard_of(tmp_path, rounds_of("poisson", rate=0.05), privacy)
    drawn = [guard.admit(number, CLIENTS) for number in range(1, 21)]
    assert () in drawn and guard.ledger.clients() == [EVERYONE]
    assert guard.ledger.spent(EVERYONE) == Repeated(SampledGaussian(0.05, 1.0), 20)
    assert not any(f'"{name}"' in (tmp_path / "privacy.jsonl").read_text() for name in CLIENTS)
    guard.close()


def test_a_secret_draw_does_not_follow_from_the_seed(tmp_path: Path) -> None:
    drawn = []
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        privacy = Privacy("client", noise_multiplier=1.0, delta=1e-3)
        guard = guard_of(tmp_path / str(k), rounds_of("poisson", rate=0.5), privacy)
        drawn.append([guard.admit(number, CLIENTS) for number in range(1, 21)])
        guard.close()
    assert drawn[0] != drawn[1]


def test_a_spent_poisson_run_ends(tmp_path: Path) -> None:
    privacy = Privacy("client", epsilon=2.0, delta=1e-3, accountant="rdp")
    guard = guard_of(tmp_path, rounds_of("poisson", rate=0.5, count=3), privacy)
    for number in range(1, 4):
        guard.admit(number, CLIENTS)
    with pytest.raises(BudgetSpentError, match="the run has spent its privacy budget"):
        guard.admit(4, CLIENTS)
    guard.close()


def test_a_run_of_correlated_noise_is_charged_once(tmp_path: Path) -> None:
    privacy = Privacy("client", noise_multiplier=2.0, delta=1e-3, bands=-1)
    guard = guard_of(tmp_path, rounds_of("cyclic", groups=3), privacy)
    groups = [guard.admit(number, CLIENTS) for number in range(1, 7)]
    assert guard.ledger.spent(EVERYONE) == Gaussian(2.0)
    assert groups[:3] == groups[3:] and sorted(sum(groups[:3], ())) == sorted(CLIENTS)
    guard.close()


def test_fewer_than_must_share_the_noise_end_the_run(tmp_path: Path) -> None:
    """Else the round's own quorum, a share of those that are left, would be met by too few."""
    privacy = Privacy("client", noise_multiplier=1.0, delta=1e-3, noise="shares", max_rounds=1)
    guard = guard_of(
        tmp_path,
        rounds_of("fixed", 9, size=4),
        privacy,
        secure_aggregation=SecureAggregation(on=True),
    )
    assert isinstance(guard.terms.mechanism, ClientLevel) and guard.terms.mechanism.least == 2
    sizes = []
    with pytest.raises(BudgetSpentError, match="and 2 are needed"):
        for number in range(1, 10):
            sizes.append(len(guard.admit(number, CLIENTS)))
    guard.close()
    assert sizes[0] == 4 and min(sizes) >= 2


# -- what must agree on resume


def test_a_changed_recipe_is_refused(tmp_path: Path) -> None:
    privacy = Privacy("client", epsilon=2.0, delta=1e-3, accountant="rdp")
    guard_of(tmp_path, rounds_of(), privacy).close()
    guard_of(tmp_path, rounds_of(), privacy).close()
    for changed in (
        dataclasses.replace(privacy, epsilon=8.0),
        dataclasses.replace(privacy, clip_norm=2.0),
        dataclasses.replace(privacy, delta=1e-4),
        dataclasses.replace(privacy, max_rounds=1),
    ):
        with pytest.raises(FedpeftError, match="began with other terms of privacy.*'epsilon': 2.0"):
            guard_of(tmp_path, rounds_of(), changed)
    for rounds in (rounds_of(count=7), rounds_of("poisson", rate=0.1)):
        with pytest.raises(FedpeftError, match="began with other terms of privacy"):
            guard_of(tmp_path, rounds, privacy)
    with pytest.raises(FedpeftError, match="seed=1, was 0"):
        guard_of(tmp_path, rounds_of(), privacy, seed=1)


def test_terms_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    privacy = Privacy("client", noise_multiplier=2.0, delta=1e-3)
    guard_of(tmp_path, rounds_of(), privacy).close()
    for damage in ("{", "[]", "{}"):
        (tmp_path / "privacy.json").write_text(damage)
        with pytest.raises(FedpeftError, match=r"privacy\.json is damaged .* Restore it"):
            guard_of(tmp_path, rounds_of(), privacy)


def test_a_ledger_that_lost_its_end_is_refused(tmp_path: Path) -> None:
    """Test 55 of the list: also where it is gone altogether, so that no spending is forgotten."""
    privacy = Privacy("client", noise_multiplier=2.0, delta=1e-3)
    guard = guard_of(tmp_path, rounds_of(), privacy)
    for number in (1, 2):
        guard.admit(number, CLIENTS)
    head = guard.ledger.head
    guard.close()
    path = tmp_path / "privacy.jsonl"
    guard_of(tmp_path, rounds_of(), privacy, head=head).close()
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(FedpeftError, match="does not hold the line"):
        guard_of(tmp_path, rounds_of(), privacy, head=head)
    path.unlink()
    with pytest.raises(FedpeftError, match="does not hold the line"):
        guard_of(tmp_path, rounds_of(), privacy, head=head)


def test_rounds_that_are_played_again_are_named(tmp_path: Path) -> None:
    privacy = Privacy("client", noise_multiplier=2.0, delta=1e-3)
    guard = guard_of(tmp_path, rounds_of(), privacy)
    assert guard.again(0) == []
    for number in (1, 2, 3):
        guard.admit(number, CLIENTS)
    assert guard.again(3) == []
    [text] = guard.again(1)
    assert "rounds up to 3" in text and "from 2 on are charged once more" in text
    guard.close()


# -- whole runs


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
    with Ledger.open(out / "privacy.jsonl", FREE) as ledger:
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


def test_nothing_is_charged_to_nobody(tmp_path: Path) -> None:
    guard = guard_of(tmp_path, rounds_of(), Privacy("client", noise_multiplier=2.0, delta=1e-3))
    assert guard.ledger.clients() == [] and guard.ledger.spent("c0") == Nothing()
    assert guard.statement().epsilon == (0.0, 0.0, 0.0)
    guard.close()
