"""Texts read out of LoRA's updates of the built-in encoder, and what is in the way of it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from fedpeft.audit.inversion import entry_layers, recover, recovered_share, update_rows
from fedpeft.cohort.lanes import DTYPES, FoldLane, lower
from fedpeft.config import Model
from fedpeft.data.examples import flatten
from fedpeft.errors import FedpeftError
from fedpeft.metrics import client_sums
from fedpeft.model import Network, attach, build_network, load_base
from fedpeft.tree import Tree, norm, select, sub
from tests.tiny import IA3, PAD, WORDS, tiny_network

CLASSES = 4


@cache
def network(
    r: int = 8, targets: tuple[str, ...] = ("query", "value"), pooling: Any = "auto"
) -> Network:
    base = load_base(Model(pooling=pooling), "classification", CLASSES, PAD, 0)
    adapter = {"kind": "lora", "r": r, "lora_alpha": 2 * r, "target_modules": list(targets)}
    model = attach(base, adapter, "classification", 0)
    return build_network(model, "classification", CLASSES, torch.device("cpu"))


def after_a_round(net: Network) -> Tree:
    """An adapter whose B is no longer zero."""
    stream = torch.Generator().manual_seed(1)
    return {
        name: v + 0.02 * torch.randn(v.shape, generator=stream) if "lora_B" in name else v
        for name, v in net.initial.items()
    }


def some_texts(count: int, length: int) -> list[list[int]]:
    stream = torch.Generator().manual_seed(2)
    found: list[list[int]] = torch.randint(5, 4096, (count, length), generator=stream).tolist()
    return found


def trained(
    net: Network, at: Tree, texts: list[list[int]], steps: int = 1, kind: str = "sgd"
) -> Tree:
    """What local training on the texts, all in one batch, changes."""
    batch = flatten(texts, [k % CLASSES for k in range(len(texts))], PAD).batch(
        torch.arange(len(texts))[None]
    )
    own = {name: value.clone().requires_grad_() for name, value in at.items()}
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(own.values(), 0.1) if kind == "sgd" else torch.optim.AdamW(own.values())
    )
    lane = FoldLane(net.model)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = lane.logits({name: value[None] for name, value in own.items()}, batch)
        (client_sums("classification", logits, batch)[0].sum() / len(texts)).backward()
        optimizer.step()
    return sub({name: value.detach() for name, value in own.items()}, at)


def share(net: Network, update: Tree, texts: list[list[int]], rank: int = 0) -> float:
    found = recover(net, update, max(map(len, texts)), len(texts), rank)
    return recovered_share(found, texts)


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("pooling", ["auto", "mean"])
def test_a_short_text_is_recovered_whole_from_sgd_steps(steps: int, pooling: str) -> None:
    net, texts = network(pooling=pooling), some_texts(1, 8)
    update = trained(net, after_a_round(net), texts, steps)
    assert recover(net, update, 8) == [{token} for token in texts[0]]
    assert share(net, update, texts) == 1


def test_the_first_round_gives_nothing_away_with_one_step() -> None:
    net, texts = network(), some_texts(1, 8)
    update = trained(net, net.initial, texts)  # B = 0, so A has no gradient
    assert recover(net, update, 8) == [set() for _ in range(8)]
    assert share(net, update, texts) == 0


def test_a_span_that_holds_everything_tells_nothing() -> None:
    net = tiny_network({"kind": "lora", "r": 8, "target_modules": ["query", "value"]})
    stream = torch.Generator().manual_seed(0)  # 16 rows in 16 dimensions
    update = {n: torch.randn(v.shape, generator=stream) for n, v in net.initial.items()}
    for texts in (1, 4, 100):
        assert recover(net, update, 3, texts) == [set(), set(), set()]
    zero = {name: torch.zeros_like(value) for name, value in update.items()}
    assert recover(net, zero, 3, 100) == [set(), set(), set()]
    (layer,) = (name for name in entry_layers(net) if name.endswith("query"))
    few = zero | {f"{layer}.lora_A.default.weight": torch.zeros(8, 16)}
    embeddings = net.model.get_submodule("base_model.model.bert.embeddings")
    few[f"{layer}.lora_A.default.weight"][0] = embeddings(torch.tensor([[7]]))[0, 0]
    assert recover(net, few, 3) == [{7}, set(), set()]


def test_more_tokens_than_rows_and_adam_are_in_the_way() -> None:
    net = network()
    long = some_texts(1, 24)
    assert share(net, trained(net, after_a_round(net), long), long) < 0.3
    texts = some_texts(1, 8)
    assert share(net, trained(net, after_a_round(net), texts, 5, "adamw"), texts) < 0.5


def test_a_batch_of_texts_with_enough_rows() -> None:
    net, texts = network(r=32), some_texts(4, 8)
    assert share(net, trained(net, after_a_round(net), texts), texts) == 1


@pytest.mark.parametrize("rank", [0, 8])
def test_noise_on_the_update_hides_the_text(rank: int) -> None:
    net, texts = network(), some_texts(1, 8)
    update = trained(net, after_a_round(net), texts)
    length = norm(select(update, lambda name: "lora_A" in name))

    def noisy(factor: float) -> Tree:
        stream = torch.Generator().manual_seed(3)
        scale = factor * length
        return {n: v + scale * torch.randn(v.shape, generator=stream) for n, v in update.items()}

    shares = [share(net, noisy(factor), texts, rank) for factor in (1e-7, 1e-4, 1e-2)]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and shares[2] == 0


def test_the_entry_layers_are_found_by_what_they_read() -> None:
    net = network(targets=("query", "value", "intermediate.dense"))
    names = [name.split("encoder.")[1] for name in entry_layers(net)]
    attention = "layer.0.attention.self"
    assert names == [f"{attention}.query", f"{attention}.value"]
    assert update_rows(net, net.initial).shape == (16, 192)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_base_held_in_16_bits_has_the_same_entry_layers(precision: str) -> None:
    net = network.__wrapped__()
    expected = entry_layers(net)
    lower(net.model, DTYPES[precision])
    assert entry_layers(net) == expected


def test_an_update_without_a_is_no_target() -> None:
    net = network()
    update = select(net.initial, lambda name: "lora_A" not in name)
    with pytest.raises(FedpeftError, match="never send lora_A \\(ffa_lora\\)"):
        recover(net, update, 4)


def gpt2() -> Network:
    config = GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    base: nn.Module = GPT2LMHeadModel(config).eval().requires_grad_(False)
    adapter = {"kind": "lora", "r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    model = attach(base, adapter, "causal_lm", 0)
    return build_network(model, "causal_lm", 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gpt2, "written for encoders with BERT's embeddings"),
        (lambda: tiny_network(IA3), "no LoRA layer reads the output of the embeddings"),
        (lambda: network(targets=("output.dense",)), "no LoRA layer reads the output"),
    ],
)
def test_models_that_are_no_target(make: Any, message: str) -> None:
    with pytest.raises(FedpeftError, match=message):
        entry_layers(make())


def test_recovered_share_counts_pairs_of_token_and_position() -> None:
    found = [{3, 4}, set(), {7}]
    assert recovered_share(found, [[3, 5, 7], [4, 5, 8, 9]]) == 3 / 6
    assert recovered_share(found, [[4, 3]]) == 1 / 2
