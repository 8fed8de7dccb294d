"""What single tuners need: refusals that say what to do, limits in the log, tasks, starts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.errors import FedpeftError
from fedpeft.model import adapter_config, attach, build_network, save_adapter, set_mode
from tests.tuners import CLASSES, ROWS, base, network


@pytest.mark.parametrize("init", ["eva", "lora_ga", "corda", "CorDA", "loftq"])
def test_a_start_that_needs_data_is_refused(init: str) -> None:
    settings = {"kind": "lora", "init_lora_weights": init, "target_modules": ["query"]}
    with pytest.raises(FedpeftError, match=r"adapter\.init_lora_weights=.* needs .*'olora'"):
        attach(base("classification"), settings, "classification", 0)
    with pytest.raises(FedpeftError, match="Unknown initialization"):
        attach(base("classification"), {**settings, "init_lora_weights": "x"}, "classification", 0)


def test_subspaces_that_clients_would_choose_are_refused() -> None:
    with pytest.raises(FedpeftError, match=r"adapter\.use_asa=true is not available"):
        adapter_config({"kind": "adamss", "use_asa": True}, "classification")


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("adalora", {}, "all ranks stay at init_r=6"),
        ("shadow", {}, "without its auxiliary loss"),
        ("shadow", {"auxiliary_loss_weight": 0.0}, ""),
        ("cpt", {"opt_weighted_loss_type": "decay"}, "trains on the plain loss"),
        ("cpt", {}, ""),
        ("lora", {}, ""),
    ],
)
def test_the_log_says_what_a_tuner_goes_without(
    name: str, changed: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="fedpeft"):
        network(ROWS[name], **changed)
    assert said in caplog.text and bool(caplog.text) == bool(said)


@pytest.mark.parametrize("name", ["poly", "multitask_prompt_tuning"])
def test_every_row_belongs_to_task_0(name: str) -> None:
    model = network(ROWS[name]).model.eval()
    tokens = torch.tensor([[3, 4], [5, 6]])
    with torch.no_grad():
        found = model(input_ids=tokens).logits
        wanted = model(input_ids=tokens, task_ids=torch.zeros(2, dtype=torch.long)).logits
    assert torch.equal(found, wanted)


def test_a_prompt_encoder_is_in_training_mode_when_its_adapter_trains() -> None:
    model = network(ROWS["p_tuning lstm"]).model
    encoder = model.get_submodule("prompt_encoder.default.lstm_head")
    set_mode(model, training=True, base_dropout=False)
    assert encoder.training and not model.get_submodule("base_model").training
    set_mode(model, training=False, base_dropout=False)
    assert not encoder.training


@pytest.mark.parametrize("name", ["p_tuning", "prefix_tuning projection"])
def test_a_start_that_pefts_file_cannot_give(name: str, tmp_path: Path) -> None:
    net = network(ROWS[name])
    save_adapter(net, net.initial, tmp_path, "base")
    raw = tmp_path / "trainable.safetensors"
    assert raw.is_file()

    def begin(**changed: Any) -> None:
        settings = {**ROWS[name].adapter, **changed}
        model = attach(base("classification"), settings, "classification", 0)
        build_network(model, "classification", CLASSES, torch.device("cpu"), start=str(tmp_path))

    with pytest.raises(
        FedpeftError, match=r"adapter\.start=.*does not fit.*Use the adapter settings"
    ):
        begin(encoder_hidden_size=8)
    raw.unlink()
    with pytest.raises(FedpeftError, match=r"adapter\.start=.*'trainable.safetensors' is missing"):
        begin()
    (tmp_path / "fedpeft-manifest.json").unlink()
    with pytest.raises(FedpeftError, match=r"adapter\.start=.*holds no trainable\.safetensors"):
        begin()


def test_a_tuner_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(FedpeftError, match="scikit-learn is required"):
        adapter_config({"kind": "adamss"}, "classification")
