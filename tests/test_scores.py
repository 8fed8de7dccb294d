"""What a run's test score is of: one adapter, a sample of the examples, clients' smaller models."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.baselines import test_score as scored
from fedpeft.config import Engine, Evaluation, Output, Recipe, Rounds
from fedpeft.evaluate import score
from fedpeft.events import Watcher
from fedpeft.exports import export_clients
from fedpeft.prepare import Prepared, prepare
from fedpeft.pruned import load
from fedpeft.record.checkpoint import latest
from fedpeft.run import run
from fedpeft.strategies import fedspine
from fedpeft.streams import numpy_stream
from tests.tiny import tiny_recipe, write_tiny

LORA = {"kind": "lora", "r": 4, "target_modules": ["query", "key", "value", "dense"]}


def recipe(folder: Path, out: Path, **strategy: Any) -> Recipe:
    write_tiny(folder, sizes=(12, 22, 8, 28))
    return dataclasses.replace(
        tiny_recipe(folder, LORA, **strategy),
        rounds=Rounds(count=4),
        engine=Engine(device="cpu", threads=1),
        output=Output(folder=str(out)),
        baselines=(),
    )


def state_of(own: Recipe, kind: type[Any]) -> tuple[Prepared, Any]:
    checkpoint, _ = latest(Path(own.output.folder) / "checkpoints", kind)
    return prepare(own), checkpoint.state


def evaluations(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [one for one in lines if one["kind"] == "evaluation" and one["scope"] == "test"]


def test_a_strategy_that_prunes_is_scored_by_its_clients_own_exported_models(
    tmp_path: Path,
) -> None:
    """Example by example: the files that ``fedpeft export`` writes answer as often rightly."""
    own = recipe(tmp_path, tmp_path / "run", name="fedspine", step=0.9, target=0.5)
    summary = run(own, Watcher())
    prepared, state = state_of(own, fedspine.State)
    found = scored(prepared, prepared.federation(), state)
    test, names = prepared.population.test, prepared.population.clients.names
    assert found.items == len(test) > len(names) and math.isnan(found.macro_f1)
    assert max(state.roll.gone.values()) >= 0.4
    places = export_clients(Path(own.output.folder), tmp_path / "out", [])
    order = numpy_stream(own.seed, "dealt test").permutation(len(test))
    right, labels = 0, test.labels
    assert labels is not None
    for k, name in enumerate(names):
        [place] = [at for at, one in places.items() if one["client"] == name]
        model = load(tmp_path / "out" / place)
        for example in order[k :: len(names)].tolist():
            batch = test.batch(torch.tensor([[example]]))
            logits = model(input_ids=batch.tokens, attention_mask=batch.mask).logits
            right += int(logits.argmax()) == int(labels[example])
    assert found.accuracy == pytest.approx(right / len(test))
    [row] = [one for one in summary.rows if one.name == "fedspine"]
    assert row.score.accuracy == found.accuracy


def test_before_the_last_round_a_sample_is_enough(tmp_path: Path) -> None:
    own = recipe(tmp_path, tmp_path / "run", name="fedavg")
    own = dataclasses.replace(own, evaluation=Evaluation(sample=5))
    run(own, Watcher())
    prepared, state = state_of(own, type(prepare(own).strategy.init(prepare(own).problem)))
    whole = len(prepared.population.test)
    items = [one["score"]["items"] for one in evaluations(tmp_path / "run")]
    assert items == [5, 5, 5, whole] and whole > 5
    some = scored(prepared, prepared.federation(), state, 5)
    stream = numpy_stream(own.seed, "local test")
    index = np.sort(stream.choice(whole, size=5, replace=False))
    adapter = prepared.strategy.adapter(state)
    at = (prepared.population.test, None, index)
    assert some == score(prepared.network, prepared.lane, adapter, *at)
    assert evaluations(tmp_path / "run")[-1]["score"]["items"] == whole


def test_with_more_clients_than_examples_some_answer_none(tmp_path: Path) -> None:
    own = recipe(tmp_path, tmp_path / "run", name="fedspine", step=0.9, target=0.5)
    own = dataclasses.replace(own, evaluation=Evaluation(sample=3))
    run(own, Watcher())
    scores = [one["score"] for one in evaluations(tmp_path / "run")]
    assert [one["items"] for one in scores][:3] == [3, 3, 3]
    assert all(one["accuracy"] in (0.0, 1 / 3, 2 / 3, 1.0) for one in scores[:3])
