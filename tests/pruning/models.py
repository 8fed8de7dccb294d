"""Tiny random BERT, RoBERTa, Llama (with and without grouped queries) and GPT-2, with LoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedpeft.data.clients import Task
from fedpeft.model import Network, attach, build_network
from fedpeft.pruning.anatomy import structure_of
from fedpeft.pruning.structure import Structure
from fedpeft.tree import Tree

WORDS, CLASSES, LAYERS = 40, 3, 2
FAMILIES = ("bert", "roberta", "llama", "llama-gqa")
ENCODER = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]
TARGETS = {
    "bert": [*ENCODER, "output.dense"],
    "roberta": [*ENCODER, "output.dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def bare(family: str) -> nn.Module:
    """Width 24, 2 layers, 4 heads of 6 (Llama: 6 of 8; grouped: 6 for 3), 20 channels."""
    common: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 20,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    encoder = {"max_position_embeddings": 32, "num_labels": CLASSES}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "bert":
            return BertForSequenceClassification(BertConfig(**common, **encoder))
        if family == "roberta":
            return RobertaForSequenceClassification(RobertaConfig(**common, **encoder))
        if family == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=WORDS, n_embd=24, n_layer=LAYERS, n_head=4, n_positions=32,
                    initializer_range=0.3, bos_token_id=1, eos_token_id=1,
                )
            )  # fmt: skip
        sizes = {"num_attention_heads": 6, "head_dim": 8}
        if family == "llama-gqa":
            sizes["num_key_value_heads"] = 3
        return LlamaForCausalLM(LlamaConfig(**common | sizes))


def task_of(family: str) -> Task:
    return "classification" if family in ("bert", "roberta") else "causal_lm"


def adapted(family: str, r: int = 3) -> Network:
    """The model with LoRA on every prunable layer."""
    kind = family.split("-")[0]
    settings: dict[str, Any] = {"kind": "lora", "r": r, "lora_alpha": 6}
    settings["target_modules"] = TARGETS[kind]
    if kind == "gpt2":
        settings["fan_in_fan_out"] = True
    base = bare(family).eval().requires_grad_(False)
    model = attach(base, settings, task_of(family), 0)
    return build_network(model, task_of(family), CLASSES, torch.device("cpu"))


def structure(network: Network) -> Structure:
    return structure_of(network.model, network.scaling)


def draw_alive(network: Network, clients: int, seed: int = 0) -> Tree:
    """Of every part, for each client, another random half or so; never nothing."""
    stream = torch.Generator().manual_seed(seed)
    found = {}
    for part in structure(network).parts:
        alive = torch.rand(clients, part.groups, generator=stream) < 0.6
        alive[:, int(torch.randint(part.groups, (1,), generator=stream))] = True
        alive[:, 0] &= alive.sum(1) < 2  # something is gone in every part
        found[part.name] = alive
    return found


def draw_adapters(network: Network, clients: int, seed: int = 1) -> Tree:
    stream = torch.Generator().manual_seed(seed)
    return {
        n: v + 0.3 * torch.randn((clients, *v.shape), generator=stream)
        for n, v in network.initial.items()
    }


def tokens(rows: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Tokens ``[rows, 7]`` with padding of unequal length at the end, and their mask."""
    stream = torch.Generator().manual_seed(seed)
    found = torch.randint(2, WORDS, (rows, 7), generator=stream)
    mask = torch.ones_like(found)
    for k in range(rows):
        mask[k, 7 - k % 3 :] = 0
    return torch.where(mask == 1, found, 0), mask
