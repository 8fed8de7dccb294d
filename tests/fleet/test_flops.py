"""Counted FLOPs against torch's own counter, to 2 %, on models with and without adapters."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedpeft.fleet.flops import flops_of, token_weights

pytestmark = pytest.mark.filterwarnings(  # peft 0.21
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",  # whose products torch counts
}
ROWS, TOKENS = 3, 24


def lora(model: nn.Module, task: str, targets: Any) -> nn.Module:
    kept = ["classifier"] if task == "SEQ_CLS" else None
    config = peft.LoraConfig(task_type=task, r=4, target_modules=targets, modules_to_save=kept)
    return peft.get_peft_model(model, config)  # type: ignore[arg-type]


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(num_labels=3, pad_token_id=0, **SIZES))


def roberta() -> nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(num_labels=3, **SIZES))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES))


def counted(model: nn.Module, causal: bool) -> int:
    """What torch counts in one step of training."""
    tokens = torch.randint(5, 40, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = tokens if causal else torch.zeros(ROWS, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels
        ).loss.backward()
    return int(counter.get_total_flops())


def ours(model: nn.Module) -> float:
    some = (np.array([ROWS]), np.array([ROWS * TOKENS]), np.array([ROWS * TOKENS**2]))
    return float(flops_of(model).of(*some)[0])


@pytest.mark.parametrize(
    ("make", "task", "targets"),
    [
        (bert, "SEQ_CLS", ["query", "value"]),
        (bert, "SEQ_CLS", ["value"]),
        (bert, "SEQ_CLS", ["query", "key", "value", "dense"]),
        (roberta, "SEQ_CLS", ["query", "value"]),
        (roberta, "SEQ_CLS", ["dense"]),
        (llama, "CAUSAL_LM", ["q_proj", "v_proj"]),
        (llama, "CAUSAL_LM", "all-linear"),
    ],
)
def test_flops_are_torch_s_to_two_percent(make: Any, task: str, targets: Any) -> None:
    model = lora(make(), task, targets).train()
    assert ours(model) == pytest.approx(counted(model, task == "CAUSAL_LM"), rel=0.02)


def test_what_pruning_counts_as_the_models_products_is_what_tokens_go_through() -> None:
    for make, task in ((bert, "SEQ_CLS"), (llama, "CAUSAL_LM")):
        model = lora(make(), task, "all-linear")
        found = flops_of(model)
        assert found.again[0] == 2 * token_weights(model)


def test_of_full_fine_tuning_too() -> None:
    model = bert().train()
    assert ours(model) == pytest.approx(counted(model, False), rel=0.02)


def test_of_checkpointing_and_of_forward_passes_alone() -> None:
    model = lora(bert(), "SEQ_CLS", ["query", "value"]).train()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tokens = torch.ones(ROWS, TOKENS, dtype=torch.int64)
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    forward = counter.get_total_flops()
    some = (np.array([ROWS]), np.array([ROWS * TOKENS]), np.array([ROWS * TOKENS**2]))
    found = flops_of(model)
    assert float(found.forward(2).of(*some)[0]) == pytest.approx(2 * forward, rel=0.02)
    extra = float(found.checkpointed().of(*some)[0] - found.of(*some)[0])
    assert extra == pytest.approx(forward, rel=0.06)  # the adapter and the head are not again


def test_pruning_and_smaller_adapters_take_their_share() -> None:
    found = flops_of(lora(llama(), "CAUSAL_LM", ["q_proj", "v_proj"]))
    one = (np.ones(1), np.full(1, 100.0), np.full(1, 1e4))
    whole, half = found.of(*one)[0], found.of(*one, 0.5)[0]
    adapter = 100.0 * found.adapter
    assert half == pytest.approx((whole - adapter) / 2 + adapter)
    assert found.of(*one, 0.0, 0.25)[0] == pytest.approx(whole - 0.75 * adapter)
