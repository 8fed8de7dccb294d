"""Means over what clients have: the golden values, bounds, garbage outside masks, wire and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.partial_means import covered, masked_mean, weigh
from fedpeft.pruning.wire import parts_of, plain, put, take
from fedpeft.strategies.fedspine import FedSpine
from tests.pruning.models import FAMILIES, adapted, draw_adapters, structure


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


OLD = torch.full((4,), 9.0, dtype=torch.float64)
NAN = float("nan")
MASKS = rows([1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]).bool()
VALUES = rows([1, 2, NAN, 7], [3, NAN, 5, NAN], [5, 4, 1, 0])


def test_the_mean_is_the_golden_one_whatever_lies_outside() -> None:
    found = masked_mean(OLD, VALUES, MASKS, torch.ones(3))
    assert found.tolist() == [3, 3, 3, 9]


def test_who_lacks_it_may_vote_for_what_it_was() -> None:
    found = masked_mean(OLD, VALUES, MASKS, torch.tensor([1.0, 2.0, 1.0]), fill=True)
    wanted = [(1 + 2 * 3 + 5) / 4, (2 + 2 * 9 + 4) / 4, (9 + 2 * 5 + 1) / 4, 9]
    assert found.tolist() == pytest.approx(wanted)


def test_the_mean_lies_within_the_clients_and_no_common_factor_matters() -> None:
    draw = torch.Generator().manual_seed(0)
    values, masks = torch.randn(5, 6, 3, generator=draw), torch.rand(5, 6, 3, generator=draw) < 0.4
    old, weights = torch.randn(6, 3, generator=draw), torch.rand(5, generator=draw) + 0.1
    found = masked_mean(old, values, masks, weights)
    assert torch.allclose(found, masked_mean(old, values, masks, 37 * weights), atol=1e-7)
    order = torch.tensor([3, 0, 4, 1, 2])
    again = masked_mean(old, values[order], masks[order], weights[order])
    assert torch.allclose(found, again, atol=1e-7)
    low = values.masked_fill(~masks, torch.inf).amin(0)
    high = values.masked_fill(~masks, -torch.inf).amax(0)
    somebody = masks.any(0)
    assert torch.equal(found[~somebody], old[~somebody])
    assert bool(((found >= low - 1e-6) & (found <= high + 1e-6))[somebody].all())
    everybody = torch.ones_like(masks)
    plain_mean = torch.tensordot(weights / weights.sum(), values, dims=1)
    for fill in (False, True):
        found = masked_mean(old, values, everybody, weights, fill)
        assert torch.allclose(found, plain_mean, atol=1e-6)


def test_weights_are_the_formulas() -> None:
    network = adapted("bert")
    own = structure(network)
    alive = own.whole(2)
    for part in own.parts:
        alive[part.name][1, : part.groups // 2] = False
    n, sizes = torch.tensor([2.0, 6.0]).double(), torch.tensor([4.0, 9.0])
    assert weigh("samples", n, sizes, own.parts, alive).tolist() == [2, 6]
    assert weigh("norm", n, sizes, own.parts, alive).tolist() == [2, 3]
    found = weigh("norm_samples", n, sizes, own.parts, alive).tolist()
    assert found == pytest.approx([4, 18 / np.sqrt(0.5)])
    assert weigh("norm", n, 0 * sizes, own.parts, alive).tolist() == [2, 6]
    with pytest.raises(FedpeftError, match=r"strategy\.weights='norms' does not exist"):
        FedSpine(weights="norms")


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_what_clients_lack_does_not_travel_and_comes_back_as_zeros(family: str) -> None:
    network = adapted(family)
    parts = structure(network).parts
    alive = {}
    for k, part in enumerate(parts):
        own = torch.zeros(3, part.groups, dtype=torch.bool)
        for row in range(3):  # equally many, others
            own[row, (torch.arange(part.groups // 2 + 1) + row + k) % part.groups] = True
        alive[part.name] = own
    whole = draw_adapters(network, 3)
    sent = take(parts, whole, alive)
    back = put(parts, sent, alive, network.initial)
    masks = covered(parts, network.initial, alive, torch.tensor([3, 3, 3]))
    for name, value in whole.items():
        mask = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(back[name], torch.where(mask, value, 0.0))
        assert sent[name].numel() == int(mask.sum())
    assert sum(v.numel() for v in sent.values()) < 0.9 * sum(v.numel() for v in whole.values())


def test_parts_come_back_from_plain_data() -> None:
    parts = structure(adapted("llama-gqa")).parts
    for one, two in zip(parts, parts_of(plain(parts)), strict=True):
        assert (one.name, one.kind, one.groups, one.members, one.weights) == (
            two.name, two.kind, two.groups, two.members, two.weights,
        )  # fmt: skip


def test_ranks_are_covered_from_the_first() -> None:
    network = adapted("bert")
    own = structure(network)
    masks = covered(own.parts, network.initial, own.whole(2), torch.tensor([1, 3]))
    for name, mask in masks.items():
        ranks = mask.flatten(2).any(2) if ".lora_A." in name else mask.any(1)
        assert ranks.tolist() == [[True, False, False], [True, True, True]]
