"""The toy federation itself: its gradients are those of its losses."""

from __future__ import annotations

import pytest
import torch

from fedpeft import tree
from tests.strategies.toy import arrays, distance, make


@pytest.mark.parametrize("lora", [True, False])
def test_gradients_by_hand_equal_autograd_and_numpy(lora: bool) -> None:
    toy = make(3, lora=lora)
    draw = torch.Generator().manual_seed(0)
    at = {
        n: torch.randn(3, *t.shape, generator=draw, dtype=t.dtype) for n, t in toy.initial.items()
    }
    cohort = toy.cohort(toy.clients)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in at.items()}
    grads = torch.autograd.grad(cohort.losses(leaves).sum(), list(leaves.values()))
    by_hand = cohort.gradients(at)
    assert distance(by_hand, dict(zip(leaves, grads, strict=True))) <= 1e-14
    for k, client in enumerate(toy.clients):
        own = toy.gradient(client, arrays(tree.row(at, k)))
        for name, value in own.items():
            assert abs(value - by_hand[name][k].numpy()).max() <= 1e-13
