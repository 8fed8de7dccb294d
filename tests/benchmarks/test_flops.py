from __future__ import annotations

import dataclasses

import pytest

from benchmarks.flops import flops_per_token, peak_tflops
from benchmarks.workload import WORKLOADS


def test_the_operations_of_a_token_by_hand() -> None:
    bert = WORKLOADS["A"]
    frozen = 4 * (4 * 256 * 256 + 2 * 256 * 1024)
    adapter = 4 * 2 * 8 * (256 + 256)
    assert flops_per_token(bert) == 4 * frozen + 6 * adapter + 12 * 4 * 32 * 256


def test_a_causal_mask_halves_attention_and_the_head_counts() -> None:
    llama = WORKLOADS["llama-1b-small"]
    attention = 2 * 32 * 32 + 2 * 32 * 16
    head = 64 * 32
    frozen = 2 * (attention + 3 * 32 * 48) + head
    sides = (64, 64, 48, 48, 80, 80, 80)  # in + out of q, o, k, v, gate, up, down
    adapter = 2 * 2 * sum(sides)
    assert flops_per_token(llama) == 4 * frozen + 6 * adapter + 6 * 2 * 6 * 32
    longer = dataclasses.replace(llama, tokens=12)
    assert flops_per_token(longer) - flops_per_token(llama) == 6 * 2 * 6 * 32


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("NVIDIA H100 80GB HBM3", 0.0, 989.0),
        ("NVIDIA H100 PCIe", 0.0, 756.0),
        ("NVIDIA H200", 0.0, 989.0),
        ("Some GPU", 0.0, None),
        ("Some GPU", 3.5, 3.5),
    ],
)
def test_the_peak_is_given_or_known_by_name(name: str, given: float, wanted: float | None) -> None:
    assert peak_tflops({"cuda": {"devices": [{"name": name}]}}, given) == wanted


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_tflops({"cuda": None}, 0.0) is None
