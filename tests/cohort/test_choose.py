"""The self-check of lanes finds what a comparison of whole gradients, in eval mode, would miss."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from fedpeft.cohort import lanes, patches
from fedpeft.cohort.choose import choose_lane, gap
from fedpeft.cohort.lanes import FoldLane
from fedpeft.errors import FedpeftError
from tests.tuners import ROWS, examples, network


def test_a_large_gradient_does_not_hide_a_wrong_small_one() -> None:
    wanted = {"head": torch.full((9,), 10.0), "bank": torch.full((4,), 1e-2)}
    found = {**wanted, "bank": wanted["bank"] * 0.5}
    assert gap(found, wanted) == pytest.approx(0.5)
    assert gap(wanted, wanted) == 0.0
    assert gap({**wanted, "bank": torch.full((4,), torch.nan)}, wanted) == float("inf")
    noise = {**wanted, "bank": torch.zeros(4)}  # a gradient that is zero but for rounding
    assert gap({**wanted, "bank": torch.full((4,), 1e-8)}, noise) < 1e-4


def test_a_tensor_that_layers_share_is_not_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def alone(model: nn.Module, module: nn.Module) -> dict[str, str]:
        prefix = next(name for name, found in model.named_modules() if found is module)
        return {local: f"{prefix}.{local}" for local, _ in module.named_parameters()}

    monkeypatch.setattr(lanes, "travelling", alone)
    with caplog.at_level(logging.INFO, logger="fedpeft"):
        assert choose_lane(network(ROWS["unilora"]), examples("classification")).name == "vmap"
    assert "fold passed over: gradients differ" in caplog.text


def test_a_lane_that_only_evaluates_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patches, "PATCHES", ())
    with caplog.at_level(logging.INFO, logger="fedpeft"):
        assert choose_lane(network(ROWS["lokr"]), examples("classification")).name == "loop"
    assert "lane loop for lokr" in caplog.text and "data-dependent control flow" in caplog.text


def test_the_log_says_what_was_compared(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fedpeft"):
        choose_lane(network(ROWS["lora"]), examples("classification"))
        choose_lane(network(ROWS["lora"], lora_dropout=0.5), examples("classification"))
        choose_lane(network(ROWS["prompt_tuning"]), examples("classification"))
        choose_lane(network(ROWS["lora target_parameters"]), examples("causal_lm"))
    plain, dropped, prompt, barred = (record.getMessage() for record in caplog.records)
    assert plain.startswith("lane fold for lora: gradients within") and "off" not in plain
    assert dropped.endswith("compared with dropout and sampling off")
    assert "lane vmap for prompt_tuning" in prompt and "[fold: ValueError: prompt" in prompt
    assert "one after another: target_parameters registers" in barred


def test_an_attempt_that_leaves_the_model_changed_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = network(ROWS["lora"])

    def spoils(self: FoldLane, stacked: object, batch: object) -> None:
        with torch.no_grad():
            net.model.get_submodule("base_model.model.bert.pooler.dense").weight.mul_(2)  # type: ignore[union-attr,operator]
        raise RuntimeError("no")

    monkeypatch.setattr(FoldLane, "logits", spoils)
    monkeypatch.setattr(lanes.VmapLane, "logits", spoils)
    with pytest.raises(RuntimeError, match="changed the model"):
        choose_lane(net, examples("classification"))


def test_an_adapter_that_does_not_run_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: lanes.LoopLane, stacked: object, batch: object) -> None:
        raise KeyError("task_ids")

    monkeypatch.setattr(lanes.LoopLane, "run", fails)
    with pytest.raises(
        FedpeftError, match=r"adapter\.kind='lora' does not run .* KeyError: 'task_"
    ):
        choose_lane(network(ROWS["lora"]), examples("classification"))
