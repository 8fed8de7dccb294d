"""A run that clips per example does not start with a lane whose per-example gradients are wrong."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpeft.cohort.lanes import FoldLane, Lane, LoopLane, VmapLane
from fedpeft.cohort.per_example import PerExample
from fedpeft.cohort.self_check import check_per_example
from fedpeft.config import Engine, Local
from fedpeft.data.clients import Task
from fedpeft.data.examples import Batch
from fedpeft.errors import FedpeftError
from fedpeft.model import Network
from fedpeft.prepare import prepare
from fedpeft.tree import Tree
from tests.cohort import small
from tests.tiny import tiny_recipe, write_tiny

LOCAL = Local(clip_norm=1.0, clip_per="example")
LILY = {"kind": "lily", "r": 2, "target_modules": ["query"]}


def check(net: Network, lane: Lane, local: Local = LOCAL) -> None:
    check_per_example(net, lane, small.examples(net.task), local, "lora")


def plant(monkeypatch: pytest.MonkeyPatch, bug: Any) -> None:
    """``bug(stacked, logits)`` changes what the fold lane gives."""
    real = FoldLane.logits

    def logits(self: FoldLane, stacked: Tree, batch: Batch) -> Tensor:
        found: Tensor = bug(stacked, lambda values: real(self, values, batch))
        return found

    monkeypatch.setattr(FoldLane, "logits", logits)


def one_tensor(stacked: Tree, logits: Any) -> Tensor:
    """The gradient of one tensor is a tenth too large; its value is right."""
    name = next(n for n in stacked if "layer.1" in n and "lora_B" in n)
    value = stacked[name]
    found: Tensor = logits(stacked | {name: 1.1 * value - 0.1 * value.detach()})
    return found


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
@pytest.mark.parametrize("lane", [FoldLane, VmapLane, LoopLane])
def test_sound_lanes_pass_and_the_model_is_as_before(
    task: Task, lane: type[Lane], caplog: pytest.LogCaptureFixture
) -> None:
    net = small.network(task)
    with caplog.at_level(logging.INFO, logger="fedpeft"):
        check(net, lane(net.model))
    assert f"per-example gradients of lane {lane.name} within" in caplog.text
    own = dict(net.model.named_parameters())
    assert all(torch.equal(own[n], value) for n, value in net.initial.items())


def test_one_wrong_tensor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, one_tensor)
    net = small.network("classification")
    with pytest.raises(FedpeftError, match="layer.1.*lora_B") as error:
        check(net, FoldLane(net.model))
    said = str(error.value)
    for part in ("adapter.kind='lora'", "lane 'fold'", "1.0e-01", "engine.kind=sequential"):
        assert part in said
    check(net, LoopLane(net.model))
    check(net, FoldLane(net.model), Local())  # asks for nothing
    check(net, FoldLane(net.model), dataclasses.replace(LOCAL, clip_per="client"))


def test_mixed_examples_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(stacked: Tree, logits: Any) -> Tensor:
        found: Tensor = logits(stacked)
        return found + 0.1 * found.mean(0)

    plant(monkeypatch, mean)
    net = small.network("classification")
    with pytest.raises(FedpeftError, match="in a batch is not what it is alone"):
        check(net, FoldLane(net.model))


def test_a_gradient_that_is_not_a_number_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda stacked, logits: logits(stacked) * torch.nan)
    net = small.network("classification")
    with pytest.raises(FedpeftError, match="nan of its norm"):
        check(net, FoldLane(net.model))


@pytest.mark.parametrize("way", ["_one", "_two"])
def test_both_ways_are_checked(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(PerExample, way)

    def wrong(self: PerExample, call: Any, rows: Any) -> None:
        real(self, call, rows)
        call.total[:, :3] *= 1.1

    monkeypatch.setattr(PerExample, way, wrong)
    net = small.network("classification")
    passes = {"_one": 1, "_two": 2}[way]
    with pytest.raises(FedpeftError, match=f"by {passes} backward passes"):
        check(net, FoldLane(net.model))


def test_lily_which_routes_by_the_mean_is_refused_in_a_batch_and_runs_one_by_one() -> None:
    net = small.network("classification", LILY)
    check(net, LoopLane(net.model))
    for lane in (FoldLane, VmapLane):
        net = small.network("classification", LILY)
        with pytest.raises(FedpeftError, match="in a batch is not what it is alone"):
            check(net, lane(net.model))


def test_batch_statistics_are_refused() -> None:
    net = small.network("classification")
    net.model.add_module("statistics", nn.BatchNorm1d(3, affine=False))
    check(net, FoldLane(net.model))
    with pytest.raises(FedpeftError, match="statistics normalises.*local.base_dropout=false"):
        check(net, FoldLane(net.model), dataclasses.replace(LOCAL, base_dropout=True))


def test_no_run_is_prepared_without_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path)
    local = Local(optimizer="sgd", lr=0.1, batch_size=4, clip_norm=1.0, clip_per="example")
    recipe = dataclasses.replace(
        tiny_recipe(tmp_path), local=local, engine=Engine(kind="cohort", device="cpu")
    )
    assert prepare(recipe).lane.name == "fold"

    def mixes_rows(stacked: Tree, logits: Any) -> Tensor:
        """Two rows of a client get each other's outputs; a client of one row, another client's."""
        found: Tensor = logits(stacked)
        clients = len(next(iter(stacked.values())))
        return found if clients < len(found) else found + 0.1 * found.flip(0)

    plant(monkeypatch, mixes_rows)
    with pytest.raises(FedpeftError, match="adapter.kind='lora' in lane 'fold'"):
        prepare(recipe)
    one_by_one = dataclasses.replace(recipe, engine=Engine(kind="sequential", device="cpu"))
    assert isinstance(prepare(one_by_one).lane, LoopLane)
