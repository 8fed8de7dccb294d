"""Whole runs with codecs: resumed, in several processes, private, and under secure aggregation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.codecs.settings import Codec
from fedpeft.comms.uplink import Uplink
from fedpeft.config import (
    Comms,
    Engine,
    Output,
    Privacy,
    Recipe,
    Rounds,
    Sampling,
    SecureAggregation,
)
from fedpeft.config_load import load_recipe
from fedpeft.engine import RoundReport
from fedpeft.errors import FedpeftError
from fedpeft.events import Watcher
from fedpeft.metrics import Score
from fedpeft.prepare import prepare
from fedpeft.record.checkpoint import latest
from fedpeft.run import resume, run
from fedpeft.tree import Tree
from tests.tiny import tiny_recipe, write_tiny

BOTH = Comms(up=Codec("topk", "int8", density=0.1, block=16), down=Codec("compeft", density=0.2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    yield folder


class Stops(Watcher):
    """Interrupts after a round."""

    def __init__(self, after: int = 99) -> None:
        self.after = after
        self.reports: list[RoundReport] = []

    def round_done(self, report: RoundReport, score: Score | None) -> None:
        self.reports.append(report)
        if report.round == self.after:
            raise KeyboardInterrupt


def recipe_of(folder: Path, out: Path, **changes: Any) -> Recipe:
    rounds = Rounds(count=4, sampling=Sampling("uniform", fraction=0.75), weighting="equal")
    own = {"comms": BOTH, "rounds": rounds, "engine": Engine(device="cpu", threads=1), **changes}
    return dataclasses.replace(
        tiny_recipe(folder), output=Output(folder=str(out)), baselines=(), **own
    )


def adapter_of(out: Path, recipe: Recipe) -> Tree:
    prepared = prepare(recipe)
    kind = type(prepared.strategy.init(prepared.problem))
    checkpoint, _ = latest(out / "checkpoints", kind)
    adapter: Tree = prepared.strategy.adapter(checkpoint.state)
    return adapter


def equal(left: Tree, right: Tree) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_a_run_that_was_stopped_goes_on_with_residuals_and_versions(
    folder: Path, tmp_path: Path
) -> None:
    whole, parts = Stops(), Stops(2)
    one, two = (recipe_of(folder, tmp_path / name) for name in ("one", "two"))
    run(one, whole)
    with pytest.raises(KeyboardInterrupt):
        run(two, parts)
    again = Stops()
    resume(str(tmp_path / "two"), again)
    assert equal(adapter_of(tmp_path / "one", one), adapter_of(tmp_path / "two", two))
    books = [[(r.down, r.up) for r in own] for own in (whole.reports, parts.reports[:2])]
    assert books[0] == books[1] + [(r.down, r.up) for r in again.reports]


def test_chunks_and_lanes_change_nothing(folder: Path, tmp_path: Path) -> None:
    """Sequential and batched training differ in the last bits, so only unbiased casts compare."""
    comms = Comms(up=Codec("dense", "bf16"), down=Codec("dense", "bf16"))
    found = []
    for name, engine in (
        ("a", Engine(device="cpu", threads=1, chunk=1)),
        ("b", Engine(device="cpu", threads=1, chunk=3)),
    ):
        recipe = recipe_of(folder, tmp_path / name, comms=comms, engine=engine)
        run(recipe, Watcher())
        found.append(adapter_of(tmp_path / name, recipe))
    assert all((found[0][n] - found[1][n]).abs().max() < 1e-2 for n in found[0])


def test_requests_are_coded_under_secure_aggregation(folder: Path, tmp_path: Path) -> None:
    comms = Comms(down=Codec("dense", "int8", block=16))
    secure = SecureAggregation(enabled=True)
    recipe = recipe_of(folder, tmp_path / "run", comms=comms, secure_aggregation=secure)
    watcher = Stops()
    run(recipe, watcher)
    assert all(r.replied >= 3 and set(r.up) == {"masked"} for r in watcher.reports)
    assert all("scale" in r.down for r in watcher.reports[1:])


def test_what_a_codec_makes_of_a_bounded_update_is_bounded_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every client sends a thousand times as much; the mean moves by the bound at most."""
    leave = Uplink.leave

    def inflated(self: Uplink, sent: Any, reply: Any, kept: Any) -> Any:
        left = leave(self, sent, reply, kept)
        trees = {t: {n: 1000 * v for n, v in own.items()} for t, own in left.trees.items()}
        return dataclasses.replace(left, trees=trees)

    monkeypatch.setattr(Uplink, "leave", inflated)
    privacy = Privacy(unit="client", noise_multiplier=1e-6, delta=1e-3, clip_norm=0.5)
    comms = Comms(up=Codec("topk", density=0.5))
    rounds = Rounds(count=1, weighting="equal")
    recipe = recipe_of(folder, tmp_path / "run", comms=comms, privacy=privacy, rounds=rounds)
    run(recipe, Watcher())
    start = prepare(recipe).network.initial
    moved = adapter_of(tmp_path / "run", recipe)
    size = float(torch.cat([(moved[n] - start[n]).flatten() for n in start]).norm())
    assert 0 < size < 0.501  # 5.6 without


def test_a_codec_with_secure_aggregation_is_refused(folder: Path, tmp_path: Path) -> None:
    secure = SecureAggregation(enabled=True)
    recipe = recipe_of(folder, tmp_path / "run", secure_aggregation=secure)
    with pytest.raises(FedpeftError, match=r"comms\.up\.codec=topk with secure_aggregation"):
        run(recipe, Watcher())


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("comms.up.codec=gzip", "comms.up.codec"),
        ("comms.up.density=0", "comms.up.density"),
        ("comms.up={codec: topk, form: weights}", r"comms\.up\.form=weights"),
        ("comms.down={codec: topk, feedback: always}", r"comms\.down\.feedback=always"),
        ("comms.budget=50", r"comms\.budget='50' must be a number and"),
        ("comms.budget=0 MB", r"comms\.budget='0 MB'.*above 0"),
        ("comms.budget=5 parsecs", r"comms\.budget='5 parsecs'"),
    ],
)
def test_what_a_recipe_may_not_say(override: str, why: str) -> None:
    with pytest.raises(FedpeftError, match=why):
        load_recipe("quickstart", [override])


@pytest.mark.parametrize(
    ("text", "size"), [("50 MB", 50_000_000), ("1.5GiB", 3 * 2**29), ("7 B", 7), ("2kB", 2000)]
)
def test_budgets_are_read_with_their_units(text: str, size: int) -> None:
    from fedpeft.config_comms import budget_of

    assert budget_of(load_recipe("quickstart", [f"comms.budget={text}"]).comms) == size
