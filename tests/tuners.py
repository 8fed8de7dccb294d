"""A small configuration of every adapter kind of peft, and of LoRA's variants, on tiny models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedpeft.data.clients import Task
from fedpeft.data.examples import Examples, flatten
from fedpeft.model import Network, attach, build_network

CLASSES = 5


@dataclass(frozen=True)
class Row:
    """A recipe's ``adapter`` block, the lane that is expected to carry it, and its dropout."""

    adapter: dict[str, Any]
    lane: str
    task: Task = "classification"
    dropout: str = ""


def _row(kind: str, lane: str = "fold", dropout: str = "", **settings: Any) -> Row:
    """On BERT's queries and values."""
    return Row(
        {"kind": kind, "target_modules": ["query", "value"], **settings}, lane, dropout=dropout
    )


def _bare(kind: str, lane: str, task: Task = "classification", **settings: Any) -> Row:
    """Without target modules."""
    return Row({"kind": kind, **settings}, lane, task)


def _decoder(kind: str, lane: str = "fold", **settings: Any) -> Row:
    """On Llama's queries and values."""
    return Row(
        {"kind": kind, "target_modules": ["q_proj", "v_proj"], **settings}, lane, "causal_lm"
    )


PROMPT: dict[str, Any] = {"num_virtual_tokens": 3}
FFN = ["key", "value", "output.dense"]

ROWS: dict[str, Row] = {
    "lora": _row("lora", dropout="lora_dropout", r=4),
    "lora rslora": _row("lora", r=4, use_rslora=True),
    "lora dora": _row("lora", dropout="lora_dropout", r=4, use_dora=True),
    "lora lora_bias": _row("lora", r=4, lora_bias=True),
    "lora bias": _row("lora", r=4, bias="lora_only"),
    "lora gaussian": _row("lora", r=4, init_lora_weights="gaussian"),
    "lora pissa": _row("lora", r=4, init_lora_weights="pissa"),
    "lora pissa_niter": _row("lora", r=4, init_lora_weights="pissa_niter_4"),
    "lora olora": _row("lora", r=4, init_lora_weights="olora"),
    "lora orthogonal": _row("lora", r=4, init_lora_weights="orthogonal"),
    "lora mica": _row("lora", r=4, init_lora_weights="mica"),
    "lora kasa": _row("lora", r=4, kasa_config={}, dropout="lora_dropout"),
    "lora velora": _row("lora", "loop", r=4, velora_config={"num_groups": 8}),
    "lora monteclora": _row("lora", r=4, monteclora_config={}, dropout="lora_dropout"),
    "lora bdlora": _row(
        "lora",
        r=4,
        use_bdlora={
            "target_modules_bd_a": ["query"],
            "target_modules_bd_b": ["value"],
            "nblocks": 2,
        },
    ),
    "lora alora": _decoder("lora", "loop", r=4, alora_invocation_tokens=[1]),
    "lora embedding": _row("lora", r=4, target_modules=["word_embeddings"]),
    "lora layer_replication": _decoder("lora", r=4, layer_replication=[(0, 2), (1, 2)]),
    "lora modules_to_save": _row("lora", r=4, modules_to_save=["pooler"]),
    "lora trainable tokens": _row("lora", r=4, trainable_token_indices=[8, 9, 19]),
    "lora qalora": _row("lora", r=4, use_qalora=True, qalora_group_size=8),
    "lora target_parameters": _decoder(
        "lora", "loop", r=4, target_modules=[], target_parameters=["q_proj.weight"]
    ),
    "adalora": _row("adalora", init_r=6, target_r=4, total_step=10, dropout="lora_dropout"),
    "adamss": _row("adamss", r=8, num_subspaces=2, subspace_rank=1),
    "adaption_prompt": _bare(
        "adaption_prompt", "vmap", "causal_lm", adapter_len=3, adapter_layers=2
    ),
    "beft": _row("beft", target_modules=["value"]),
    "boft": _row("boft", boft_block_size=4, dropout="boft_dropout"),
    "c3a": _row("c3a", block_size=8, init_weights="gaussian"),
    "cartridge": _bare("cartridge", "vmap", "causal_lm", **PROMPT, num_frozen_tokens=1),
    "cpt": _bare(
        "cpt",
        "loop",
        "causal_lm",
        cpt_token_ids=[3, 4, 5],
        cpt_mask=[1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3],
    ),
    "deft": _row("deft", r=4, dropout="deft_dropout"),
    "deft qr": _row("deft", r=4, decomposition_method="qr"),
    "delora": _row("delora", r=4, dropout="module_dropout"),
    "fourierft": _row("fourierft", n_frequency=20),
    "frod": _row("frod", "loop", progressbar=False),
    "glora": _row("glora", r=4),
    "gralora": _row("gralora", r=4, gralora_k=2, dropout="gralora_dropout"),
    "gralora hybrid": _row("gralora", r=4, gralora_k=2, hybrid_r=2),
    "hira": _row("hira", r=4, dropout="hira_dropout"),
    "hra": _row("hra", r=4),
    "ia3": _row("ia3", target_modules=FFN, feedforward_modules=["output.dense"]),
    "lily": _row("lily", r=4, num_B=2, stride_A=1),
    "ln_tuning": _row("ln_tuning", target_modules=["LayerNorm"]),
    "loha": _row("loha", r=4, dropout="module_dropout"),
    "loha rank dropout": _row("loha", r=4, dropout="rank_dropout"),
    "lokr": _row("lokr", r=4, dropout="module_dropout"),
    "lokr rank dropout": _row("lokr", r=4, dropout="rank_dropout"),
    "miss": _row("miss", r=8, dropout="miss_dropout"),
    "miss bat": _row("miss", r=8, init_weights="bat"),
    "miss mini": _row("miss", r=8, mini_r=4, init_weights="mini"),
    "multitask_prompt_tuning": _bare("multitask_prompt_tuning", "vmap", **PROMPT),
    "oft": _row("oft", oft_block_size=8),
    "oft cayley": _row("oft", oft_block_size=8, use_cayley_neumann=False),
    "oft coft": _row("oft", oft_block_size=8, coft=True, block_share=True),
    "osf": _row("osf", effective_rank=4),
    "peanut": _row("peanut", r=4),
    "peanut depth2": _row("peanut", r=4, depth=2),
    "poly": _row("poly", "vmap", r=4, n_skills=2),
    "prompt_tuning": _bare("prompt_tuning", "vmap", **PROMPT),
    "p_tuning": _bare("p_tuning", "vmap", **PROMPT, encoder_hidden_size=16),
    "p_tuning lstm": _bare(
        "p_tuning", "vmap", **PROMPT, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
    ),
    "prefix_tuning": _bare("prefix_tuning", "vmap", **PROMPT),
    "prefix_tuning projection": _bare(
        "prefix_tuning", "vmap", **PROMPT, prefix_projection=True, encoder_hidden_size=16
    ),
    "psoft": _row("psoft", r=4, dropout="psoft_dropout"),
    "psoft neumann": _row("psoft", r=4, use_cayley_neumann=True, cayley_neumann_eps=0.9),
    "pvera": _row("pvera", r=8, dropout="pvera_dropout"),
    "randlora": _row("randlora", r=4, dropout="randlora_dropout"),
    "road 1": _row("road", variant="road_1", group_size=8),
    "road 2": _row("road", variant="road_2", group_size=8),
    "road 4": _row("road", variant="road_4", group_size=8),
    "shadow": _bare(
        "shadow", "vmap", "causal_lm", r=4, shadow_num_hidden_layers=1, shadow_dropout=0.0
    ),
    "shira": _row("shira", "loop", r=4, random_seed=0),
    "supertuning": _row("supertuning", sparsity=0.05),
    "tinylora": _row("tinylora", u=8, dropout="tinylora_dropout"),
    "trainable_tokens": _row(
        "trainable_tokens", token_indices=[8, 9, 19], target_modules=["word_embeddings"]
    ),
    "unilora": _row("unilora", r=4, theta_d_length=64, dropout="unilora_dropout"),
    "vblora": _row("vblora", r=4, num_vectors=16, vector_length=8, dropout="vblora_dropout"),
    "vera": _row("vera", r=8, dropout="vera_dropout"),
    "waveft": _row("waveft", n_frequency=20),
    "waveft direct": _row("waveft", n_frequency=20, use_idwt=False),
}


SAMPLING = {"lora monteclora", "poly", "pvera"}
"""Rows that draw random numbers in training mode even without dropout."""


def save_experts(folder: Path) -> Row:
    """Writes two LoRAs, and gives the row of X-LoRA that mixes them."""
    adapters = {}
    for i in range(2):
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        with torch.random.fork_rng():
            torch.manual_seed(i)
            model = peft.get_peft_model(base("causal_lm"), config)
        model.save_pretrained(str(folder / str(i)))
        adapters[str(i)] = str(folder / str(i))
    settings = {"kind": "xlora", "hidden_size": 32, "xlora_depth": 1, "adapters": adapters}
    return Row(settings, "loop", "causal_lm")


def base(task: Task) -> nn.Module:
    """A random BERT or Llama: two layers, width 32, dropout off."""
    common = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 41,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if task == "classification":
            model: nn.Module = BertForSequenceClassification(
                BertConfig(
                    num_labels=CLASSES,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                    **common,
                )
            )
        else:
            model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **common))
    return model.eval().requires_grad_(False)


def network(row: Row, seed: int = 0, **changed: Any) -> Network:
    """The row's network; keywords change its adapter settings."""
    model = attach(base(row.task), {**row.adapter, **changed}, row.task, seed)
    return build_network(model, row.task, CLASSES, torch.device("cpu"))


def examples(task: Task) -> Examples:
    """Twelve rows of 2 to 8 tokens."""
    rows = [[1 + (7 * j + i) % 40 for j in range(2 + i % 7)] for i in range(12)]
    return flatten(rows, [i % CLASSES for i in range(12)] if task == "classification" else None, 0)
