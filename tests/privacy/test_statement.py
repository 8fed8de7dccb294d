"""The statement: recomputed from the ledger alone, and plain about what it does not promise."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.config import Privacy, Rounds, Sampling, SecureAggregation
from fedpeft.privacy.accountants import epsilon
from fedpeft.privacy.events import compose, from_json
from fedpeft.privacy.guard import Guard
from fedpeft.privacy.statement import Statement
from fedpeft.privacy.terms import terms_of
from tests.privacy.federated import recipe_of

SIZES = {"a": 12, "b": 40, "c": 40}
UNIFORM = Sampling("uniform")


def played(
    path: Path, privacy: Privacy, sampling: Sampling = UNIFORM, rounds: int = 3, **changes: Any
) -> Statement:
    """The statement after so many rounds of clients of three sizes."""
    everything = Rounds(count=rounds, weighting="equal", sampling=sampling)
    recipe = recipe_of(privacy=privacy, rounds=everything, **changes)
    terms = terms_of(recipe, np.array(list(SIZES.values())), 1)
    assert terms is not None
    guard = Guard(terms, path / "privacy.jsonl", recipe)
    for number in range(1, rounds + 1):
        guard.admit(number, SIZES)
    guard.write()
    found = guard.statement()
    guard.close()
    return found


RECORD = Privacy("record", noise_multiplier=1.2, delta=1e-3)
CLIENT = Privacy("client", noise_multiplier=1.2, delta=1e-3)


def from_ledger(path: Path, accountant: str) -> list[float]:
    """Each client's epsilon from the lines of privacy.jsonl and nothing else, ascending."""
    own: dict[str, list[Any]] = {}
    for line in (path / "privacy.jsonl").read_text().splitlines()[1:]:
        for event, clients in json.loads(line)["charges"]:
            for client in clients:
                own.setdefault(client, []).append(from_json(event))
    return sorted(epsilon(compose(e), 1e-3, accountant) for e in own.values())  # type: ignore[arg-type]


@pytest.mark.parametrize("privacy", [RECORD, CLIENT], ids=["record", "client"])
def test_it_can_be_recomputed_from_the_ledger_by_another_accountant(
    privacy: Privacy, tmp_path: Path
) -> None:
    """DP9: RDP, which shares no code with PRV, is never below it."""
    found = played(tmp_path, privacy)
    prv, rdp = from_ledger(tmp_path, "prv"), from_ledger(tmp_path, "rdp")
    assert found.epsilon == (prv[-1], prv[len(prv) // 2], prv[0])
    assert found.second == rdp[-1] >= found.epsilon[0] > 0
    assert found.second < 1.6 * found.epsilon[0]
    assert found.charged == 3


def test_the_worst_client_is_what_is_promised_and_not_the_mean(tmp_path: Path) -> None:
    """Not the epsilon of one client: the smallest client's batches are most of its data."""
    found = played(tmp_path, RECORD)
    assert found.epsilon[0] > 1.2 * found.epsilon[2]
    text = "\n".join(found.lines())
    assert f"epsilon {found.epsilon[0]:.2f} at delta 0.001 for the worst of 3 clients" in text


def test_it_is_the_total_of_all_rounds(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    one, three = played(tmp_path / "one", CLIENT, rounds=1), played(tmp_path, CLIENT, rounds=3)
    assert three.epsilon[0] > 1.5 * one.epsilon[0]


def test_epsilon_never_falls(tmp_path: Path) -> None:
    """DP4."""
    found = []
    for rounds in (1, 2, 3):
        (tmp_path / str(rounds)).mkdir()
        found.append(played(tmp_path / str(rounds), RECORD, rounds=rounds).epsilon[0])
    assert found == sorted(found) and len(set(found)) == 3


def test_the_file_is_the_statement(tmp_path: Path) -> None:
    found = played(tmp_path, RECORD)
    written = json.loads((tmp_path / "privacy.json").read_text())
    assert written == json.loads(json.dumps(found.as_dict()))
    assert written["terms"]["privacy"]["noise_multiplier"] == 1.2
    assert written["delta"] == 1e-3 and written["accountant"] == "prv"


@pytest.mark.parametrize("privacy", [RECORD, CLIENT], ids=["record", "client"])
def test_seeded_randomness_is_void(privacy: Privacy, tmp_path: Path) -> None:
    seeded = dataclasses.replace(privacy, randomness="seeded")
    found = played(tmp_path, seeded)
    assert found.lines()[0].startswith("VOID: the noise follows from the recipe's seed")
    (tmp_path / "secure").mkdir()
    assert not played(tmp_path / "secure", privacy).void


@pytest.mark.parametrize(
    ("privacy", "sampling", "words"),
    [
        (RECORD, UNIFORM, ("one example of one client", "nobody but the client itself", "DP-SGD")),
        (
            CLIENT,
            UNIFORM,
            ("replaced by zero", "the server, which sees single updates", "expected"),
        ),
        (
            dataclasses.replace(CLIENT, noise="client"),
            UNIFORM,
            ("replaced by any other", "before its update leaves it", "clients that replied below"),
        ),
        (
            dataclasses.replace(CLIENT, noise="shares"),
            UNIFORM,
            ("replaced by zero", "secure aggregation", "in shares"),
        ),
        (CLIENT, Sampling("poisson", rate=0.5), ("independent secret draw",)),
        (
            dataclasses.replace(CLIENT, max_rounds=3),
            UNIFORM,
            ("nobody takes part in more than 3 rounds", "no amplification"),
        ),
        (CLIENT, Sampling("fixed", size=2), ("nothing is assumed of who takes part",)),
        (
            dataclasses.replace(CLIENT, bands=-1),
            Sampling("cyclic", groups=3),
            ("correlated over 3 rounds", "checkpoints: they hold the noise of past rounds"),
        ),
    ],
)
def test_it_says_who_is_protected_from_whom_and_how(
    privacy: Privacy, sampling: Sampling, words: tuple[str, ...], tmp_path: Path
) -> None:
    text = "\n".join(
        played(
            tmp_path, privacy, sampling, secure_aggregation=SecureAggregation(enabled=True)
        ).lines()
    )
    assert all(word in text for word in words), text


def test_it_lists_what_is_not_covered(tmp_path: Path) -> None:
    text = "\n".join(played(tmp_path, CLIENT).lines())
    for word in (
        "who takes part",
        "how many examples",
        "hold-out scores",
        "hyper-parameters",
        "pretrained model",
        "finite precision",
        "baselines",
    ):
        assert word in text, word
    assert "checkpoints" not in text


def test_of_everybody_alike_there_is_one_figure(tmp_path: Path) -> None:
    found = played(tmp_path, CLIENT, Sampling("poisson", rate=0.5))
    assert found.charged == 1 and len(set(found.epsilon)) == 1
    assert "worst" not in "\n".join(found.lines())


def test_a_ledger_without_charges_has_spent_nothing(tmp_path: Path) -> None:
    found = played(tmp_path, CLIENT, Sampling("uniform"), rounds=0)
    assert found.epsilon == (0.0, 0.0, 0.0) and found.second == 0.0
    assert not math.isnan(found.delta)
