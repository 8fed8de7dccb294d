from __future__ import annotations

import torch

from benchmarks.model import build_model, trainable
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
