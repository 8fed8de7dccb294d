from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks.model import build_base, build_model, trainable
from benchmarks.texts import Texts
from benchmarks.workload import WORKLOADS, clients_of


def test_workload_a_is_the_one_specified() -> None:
    workload = WORKLOADS["A"]
    assert workload.tokens_per_round == 65_536
    model = build_model(workload)
    assert sum(p.numel() for p in trainable(model).values()) == 33_796
    assert {name.split(".")[-3] for name in trainable(model) if "lora" in name} == {
        "lora_A",
        "lora_B",
    }
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert all(m.p == 0.0 for m in dropouts)


def test_workload_b_is_the_one_specified() -> None:
    workload = WORKLOADS["B"]
    assert workload.tokens_per_round == 2_048
    assert len(Texts.draw(workload).order(5, round=1)) == 8
    assert Texts.draw(workload).order(5, round=1).shape[1] == 1


def test_workload_c_has_the_shape_of_minilm() -> None:
    workload = WORKLOADS["C"]
    encoder = build_model(dataclasses.replace(workload, population=8)).base_model.model.encoder
    assert len(encoder.encoder.layer) == 6
    config = encoder.config
    shape = (config.hidden_size, config.num_attention_heads, config.intermediate_size)
    assert shape == (384, 12, 1536)
    assert (workload.batch, workload.tokens) == (16, 64)


def test_the_gpu_workloads_are_the_ones_specified() -> None:
    mini, llama = WORKLOADS["bert-mini"], WORKLOADS["llama-1b"]
    assert (mini.layers, mini.hidden, mini.cohort, mini.batch, mini.tokens) == (4, 256, 256, 8, 64)
    assert (llama.cohort, llama.batch, llama.tokens, llama.rank) == (64, 4, 512, 16)
    with torch.device("meta"):
        base = build_base(llama)
    assert sum(p.numel() for p in base.parameters()) == 1_235_814_400  # Llama-3.2-1B's own count
    assert base.config.rope_parameters["rope_theta"] == 500_000.0
    linear = {name.rsplit(".", 1)[-1] for name, m in base.named_modules() if type(m) is nn.Linear}
    assert linear == {*llama.targets, "lm_head"}


@pytest.mark.parametrize("name", ["bert-mini", "llama-1b"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21
def test_a_shrunk_gpu_workload_runs_on_the_cpu_in_the_same_precision(name: str) -> None:
    workload = WORKLOADS[f"{name}-small"]
    assert workload.device == "cpu" and workload.precision == WORKLOADS[name].precision == "bf16"
    model = build_model(workload)
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}


def test_rounds_go_through_the_population_and_begin_again() -> None:
    workload = WORKLOADS["A"]
    assert clients_of(workload, 1) == list(range(32))
    assert clients_of(workload, 3) == list(range(64, 96))
    assert clients_of(workload, 4) == list(range(32))


def test_two_draws_give_the_same_data_and_initial_values() -> None:
    workload = WORKLOADS["tiny"]
    one, two = Texts.draw(workload), Texts.draw(workload)
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.labels, two.labels)
    left, right = trainable(build_model(workload)), trainable(build_model(workload))
    assert all(torch.equal(left[name], right[name]) for name in left | right)


def test_a_client_uses_each_of_its_rows_once_a_round_in_a_new_order() -> None:
    texts = Texts.draw(WORKLOADS["tiny"])
    first, second = texts.order(3, round=1), texts.order(3, round=2)
    assert sorted(first.flatten().tolist()) == texts.rows(3).tolist()
    assert sorted(second.flatten().tolist()) == texts.rows(3).tolist()
    assert not torch.equal(first, second)
