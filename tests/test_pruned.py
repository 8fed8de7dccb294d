"""Pruned models on their own: saved, loaded by transformers or by ``load``, and equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedpeft.cohort.lanes import LoopLane
from fedpeft.data.examples import Batch
from fedpeft.errors import FedpeftError
from fedpeft.model import MeanPoolClassifier, Network, attach, build_network
from fedpeft.pruned import NOTE, load, save, smaller
from fedpeft.tree import Tree, row
from tests.pruning.models import (
    FAMILIES,
    adapted,
    bare,
    draw_adapters,
    draw_alive,
    structure,
    tokens,
)


def keep(network: Network, heads: int, channels: int) -> Tree:
    """The same numbers in all blocks, the last groups."""
    found = {}
    for part in structure(network).parts:
        left = heads if part.kind == "heads" else channels
        found[part.name] = torch.arange(part.groups) >= part.groups - left
    return found


def told(model: Any, own: tuple[Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=own[0], attention_mask=own[1]).logits
    assert isinstance(found, Tensor)
    return found


def masked(network: Network, adapter: Tree, alive: Tree) -> Tensor:
    lane, (rows, mask) = LoopLane(network.model), tokens(4)
    one = {n: v[None] for n, v in alive.items()}
    with torch.no_grad(), lane.pruned(structure(network).parts, one):
        return lane.logits({n: v[None] for n, v in adapter.items()}, Batch(rows, mask, rows, 1))


def close(one: Tensor, two: Tensor) -> bool:
    return bool((one - two).abs().max() <= 1e-5 * two.abs().max())


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_the_masked_one(family: str, equal: bool, tmp_path: Path) -> None:
    network = adapted(family)
    adapter = row(draw_adapters(network, 1), 0)
    alive = keep(network, 2, 13) if equal else row(draw_alive(network, 1), 0)
    wanted = masked(network, adapter, alive)
    model = smaller(network, adapter, alive)
    assert close(told(model, tokens(4)), wanted)
    save(model, tmp_path)
    again = load(tmp_path)
    assert close(told(again, tokens(4)), wanted)
    before = sum(p.numel() for p in bare(family).parameters())
    assert sum(p.numel() for p in again.parameters()) < before
    assert (tmp_path / NOTE).exists() == (not equal or family in ("bert", "roberta"))


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_llama_is_loaded_by_transformers_with_any_heads(heads: int, tmp_path: Path) -> None:
    """On a width of 24 Llama's configuration refuses 5 heads, so it is saved as Mistral's."""
    network = adapted("llama")
    adapter, alive = row(draw_adapters(network, 1), 0), keep(network, heads, 11)
    save(smaller(network, adapter, alive), tmp_path)
    found = AutoModelForCausalLM.from_pretrained(str(tmp_path)).eval()
    assert found.config.num_attention_heads == heads and found.config.intermediate_size == 11
    assert found.config.model_type == ("mistral" if heads == 5 else "llama")
    assert close(told(found, tokens(4)), masked(network, adapter, alive))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_encoders_with_all_heads_are_loaded_by_transformers(family: str, tmp_path: Path) -> None:
    network = adapted(family)
    adapter, alive = row(draw_adapters(network, 1), 0), keep(network, 4, 9)
    save(smaller(network, adapter, alive), tmp_path)
    found = AutoModelForSequenceClassification.from_pretrained(str(tmp_path)).eval()
    assert close(told(found, tokens(4)), masked(network, adapter, alive))


def test_transformers_refuses_what_only_load_can_read(tmp_path: Path) -> None:
    network = adapted("bert")
    save(smaller(network, network.initial, keep(network, 2, 9)), tmp_path)
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForSequenceClassification.from_pretrained(str(tmp_path))


def test_an_encoder_with_averaged_vectors_is_saved_without_its_head(tmp_path: Path) -> None:
    base: nn.Module = MeanPoolClassifier(bare("bert").get_submodule("bert"), 3)
    base.eval().requires_grad_(False)
    settings = {"kind": "lora", "r": 2, "target_modules": ["query", "value"]}
    network = build_network(
        attach(base, settings, "classification", 0), "classification", 3, torch.device("cpu")
    )
    model = smaller(network, network.initial, keep(network, 2, 9))
    wanted = told(model, tokens(4))
    save(model, tmp_path)
    encoder, (rows, mask) = load(tmp_path), tokens(4)
    assert isinstance(model, MeanPoolClassifier)
    again = MeanPoolClassifier(encoder, 3)
    again.classifier = model.classifier
    assert close(told(again, (rows, mask)), wanted)


@pytest.mark.parametrize("note", ['{"x": 1}', "[]", None])
def test_a_note_of_another_model_is_refused(note: str | None, tmp_path: Path) -> None:
    network = adapted("bert")
    save(smaller(network, network.initial, keep(network, 2, 9)), tmp_path)
    counts = json.loads((tmp_path / NOTE).read_text())
    counts[next(iter(counts))] = 99
    (tmp_path / NOTE).write_text(note or json.dumps(counts))
    with pytest.raises(FedpeftError, match="its number of groups"):
        load(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedpeftError, match="holds no model"):
        load(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["os"]}')
    with pytest.raises(FedpeftError, match="names the class 'os'"):
        load(tmp_path)
