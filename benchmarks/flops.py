"""How much arithmetic a token takes, and how much of it a device can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.model import build_base
from benchmarks.workload import Workload

PEAK_TFLOPS = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0}
"""Dense bf16 tensor-core peak by a part of the device's name (vendor's data sheets)."""


def flops_per_token(workload: Workload) -> float:
    """Floating-point operations to train on one token: ``4 N + 6 P + attention``.

    N: weights of the base's products, the language-model head included, the embedding not; forward
    2 N, gradient with respect to activations 2 N, none with respect to frozen weights. P: LoRA's
    weights, which have both gradients. Attention scores and values: ``12 L T h``, half of it under
    a causal mask. Norms, activations, softmax, optimizer and recomputation do not count.
    """
    with torch.device("meta"):
        base = build_base(workload)
    linear = {name: m for name, m in base.named_modules() if isinstance(m, nn.Linear)}
    frozen = sum(m.weight.numel() for name, m in linear.items() if name != "classifier")
    adapted = [m for name, m in linear.items() if name.rsplit(".", 1)[-1] in workload.targets]
    adapter = sum(workload.rank * (m.in_features + m.out_features) for m in adapted)
    attention = 12 * workload.layers * workload.tokens * workload.hidden
    return 4 * frozen + 6 * adapter + attention * (0.5 if workload.task == "causal_lm" else 1.0)


def peak_tflops(environment: Mapping[str, Any], given: float) -> float | None:
    """The device's peak in TFLOP/s: ``given``, else by the GPU's name; None where not known."""
    if given:
        return given
    cuda = environment.get("cuda")
    name = cuda["devices"][0]["name"] if cuda else ""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
