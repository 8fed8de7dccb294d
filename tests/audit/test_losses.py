"""Losses of single examples against the plain model, one example at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from fedpeft.audit.losses import losses
from fedpeft.cohort.lanes import FoldLane
from fedpeft.evaluate import score
from fedpeft.model import attach, build_network
from fedpeft.tree import Tree
from tests.tiny import LORA, PAD, WORDS, tiny_network, tiny_population


def moved(initial: Tree, seed: int = 0) -> Tree:
    stream = torch.Generator().manual_seed(seed)
    return {n: v + 0.2 * torch.randn(v.shape, generator=stream) for n, v in initial.items()}


def test_classification() -> None:
    network = tiny_network(LORA)
    examples = tiny_population((70,)).examples  # more than a forward pass takes
    adapter, lane = moved(network.initial), FoldLane(network.model)
    index = np.array([5, 3, *range(10, 72)])
    found = losses(network, lane, adapter, examples, index)
    network.write(adapter)
    assert examples.labels is not None
    for i, own in zip(index.tolist(), found, strict=True):
        tokens = examples.tokens[int(examples.starts[i]) : int(examples.starts[i + 1])].long()
        with torch.no_grad():
            logits = network.model(input_ids=tokens[None]).logits
        assert own == pytest.approx(float(cross_entropy(logits, examples.labels[i : i + 1])), 1e-4)
    everything = losses(network, lane, adapter, examples, np.arange(len(examples)))
    assert everything.mean() == pytest.approx(score(network, lane, adapter, examples).loss)


def test_a_changed_base_counts_and_is_taken_back() -> None:
    network = tiny_network(LORA)
    examples, lane = tiny_population((9,)).examples, FoldLane(network.model)
    index = np.arange(9)
    plain = losses(network, lane, network.initial, examples, index)
    layer = next(name for name in network.scaling if name.endswith("value"))
    base = {layer: torch.randn(16, 16, generator=torch.Generator().manual_seed(0))}
    changed = losses(network, lane, network.initial, examples, index, base)
    assert np.abs(changed - plain).max() > 1e-3
    assert np.array_equal(losses(network, lane, network.initial, examples, index), plain)


def test_language_modelling_is_the_mean_over_an_examples_own_tokens() -> None:
    config = GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=1, n_head=2, pad_token_id=PAD
    )
    torch.manual_seed(0)
    base = GPT2LMHeadModel(config).eval().requires_grad_(False)
    adapter = {"kind": "lora", "r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    model = attach(base, adapter, "causal_lm", 0)
    network = build_network(model, "causal_lm", 0, torch.device("cpu"))
    examples = dataclasses.replace(tiny_population((20,)).examples, labels=None)
    values = moved(network.initial)
    found = losses(network, FoldLane(network.model), values, examples, np.arange(20))
    network.write(values)
    for i, own in enumerate(found):
        tokens = examples.tokens[int(examples.starts[i]) : int(examples.starts[i + 1])].long()
        with torch.no_grad():
            logits = network.model(input_ids=tokens[None]).logits[0]
        assert own == pytest.approx(float(cross_entropy(logits[:-1], tokens[1:])), 1e-4)
