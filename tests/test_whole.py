"""``adapter.kind=full``: no adapter, the loop, and an export that transformers loads."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from fedpeft.cli import loading
from fedpeft.cohort.choose import choose_lane
from fedpeft.config import Data, Engine, Evaluation, Local, Model, Output, Partition, Recipe, Rounds
from fedpeft.errors import FedpeftError
from fedpeft.events import Watcher
from fedpeft.job import tree_digest
from fedpeft.model import MeanPoolClassifier, attach, build_network, load_base, save_adapter
from fedpeft.record.checkpoint import latest
from fedpeft.run import resume, run
from fedpeft.strategies.fedkseed import State
from tests.tiny import CLASSES, PAD, tiny_model, tiny_network, tiny_population, write_tiny

FULL = {"kind": "full"}


def test_every_tensor_is_trainable_and_the_loop_carries_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    net, examples = tiny_network(FULL), tiny_population((4,)).examples
    assert net.initial.keys() == dict(net.model.named_parameters()).keys()
    assert all(value.dtype == torch.float32 for value in net.initial.values())
    assert choose_lane(net, examples).name == "loop"
    assert "lane loop for full: every tensor is trained" in caplog.text


def test_the_digest_is_that_of_the_weights() -> None:
    one, same, other = (tiny_network(FULL, seed) for seed in (0, 0, 1))
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize("key", ["r", "start", "head"])
def test_settings_of_adapters_are_refused_by_name(key: str) -> None:
    with pytest.raises(FedpeftError, match=rf"adapter\.{key}='x' with adapter\.kind=full"):
        attach(tiny_model(), {**FULL, key: "x"}, "classification", 0)


def test_a_quantised_base_is_refused() -> None:
    model = tiny_model()
    model.classifier.weight = nn.Parameter(torch.zeros(3, 16, dtype=torch.int8), False)
    with pytest.raises(FedpeftError, match=r"held as torch\.int8: set model\.quantize=none"):
        attach(model, FULL, "classification", 0)


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(FedpeftError, match="full"):
        attach(tiny_model(), {"kind": "ful"}, "classification", 0)


# -- whole runs


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    plain = Recipe(
        model=Model(name=str(folder / "model")),
        adapter=FULL,
        data=Data(source=str(folder / "data.jsonl"), client="client", max_length=8),
        partition=Partition(kind="natural", clients=0, min_examples=1),
        strategy={"name": "fedkseed", "candidates": 32},
        rounds=Rounds(count=3),
        local=Local(optimizer="sgd", lr=1e-4, steps=3, batch_size=4),
        evaluation=Evaluation(every=3),
        baselines=(),
        engine=Engine(device="cpu", workers=1, threads=1),
        output=Output(folder=str(folder / "run")),
    )
    return dataclasses.replace(plain, **changes)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_tiny(tmp_path)
    return tmp_path


class Stop(Watcher):
    """Interrupts the run as the second round begins."""

    def round_began(self, number: int, clients: int, tokens: int) -> None:
        if number == 2:
            raise KeyboardInterrupt


def test_a_run_of_the_whole_model_resumes_and_leaves_a_checkpoint_of_transformers(
    files: Path,
) -> None:
    whole = run(recipe_of(files), Watcher())
    again = recipe_of(files, output=Output(folder=str(files / "again")))
    with pytest.raises(KeyboardInterrupt):
        run(again, Stop())
    resume(str(files / "again"), Watcher())
    checkpoint, _ = latest(files / "run" / "checkpoints", State)
    found = _final(files / "run")
    assert _final(files / "again") == found
    assert (whole.rows[0].down["adapter"], whole.rows[0].up["adapter"]) == (
        3 * 4 * (32 * 4 + 128 + 1),
        3 * 4 * (3 * 6 + 2 * 128 + 2),
    )
    loaded = AutoModelForSequenceClassification.from_pretrained(str(files / "run" / "adapter"))
    named = dict(loaded.named_parameters())
    state = checkpoint.state
    moved = 0.0
    for name, value in state.initial.items():
        moved = max(moved, float((named[name] - value).detach().abs().max()))
    assert bool(state.sums.any()) and moved > 1e-5
    lines = loading.lines(recipe_of(files), CLASSES, "out/adapter")
    assert lines == [
        "model = transformers.AutoModelForSequenceClassification"
        ".from_pretrained('out/adapter', dtype='float32')"
    ]


def _final(folder: Path) -> str:
    model = AutoModelForSequenceClassification.from_pretrained(str(folder / "adapter"))
    return tree_digest(dict(model.named_parameters()))


def test_averaged_token_vectors_are_exported_with_their_head_apart(
    files: Path, tmp_path: Path
) -> None:
    settings = Model(name=str(files / "model"), pooling="mean")
    base = load_base(settings, "classification", CLASSES, PAD, 0)
    net = build_network(
        attach(base, FULL, "classification", 0), "classification", CLASSES, torch.device("cpu")
    )
    values = {n: x + 0.5 for n, x in net.initial.items()}
    save_adapter(net, values, tmp_path / "out", "base")
    own: dict[str, Any] = {}
    lines = loading.lines(Recipe(model=settings, adapter=FULL), CLASSES, str(tmp_path / "out"))
    exec("import transformers, safetensors.torch, fedpeft.model\n" + "\n".join(lines), own)
    model = own["model"]
    assert isinstance(model, MeanPoolClassifier) and isinstance(own["base"], nn.Module)
    for name, value in model.named_parameters():
        assert torch.equal(value, values[name])
    assert AutoModel.from_pretrained(str(tmp_path / "out")) is not None


def test_federated_averaging_of_the_whole_model_goes_too(files: Path) -> None:
    local = Local(optimizer="sgd", lr=0.05, batch_size=4)
    done = run(recipe_of(files, strategy={"name": "fedavg"}, local=local), Watcher())
    assert done.rounds == 3 and (files / "run" / "adapter" / "model.safetensors").is_file()


def test_adamw_is_refused_before_anything_is_loaded(files: Path) -> None:
    with pytest.raises(FedpeftError, match=r"local\.optimizer='adamw' with a strategy that walks"):
        run(recipe_of(files, local=Local(steps=3)), Watcher())
    assert not (files / "run").exists()
