"""Mask and slice are one model: logits to 1e-5, gradients of what is left equal, others zero."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from fedpeft.cohort.lanes import FoldLane, Lane, LoopLane
from fedpeft.data.examples import Batch
from fedpeft.errors import FedpeftError
from fedpeft.model import Network
from fedpeft.pruning.slicing import slice_model, weight_shape
from fedpeft.pruning.structure import kept, sides
from fedpeft.tree import Tree, row
from tests.pruning.models import (
    FAMILIES,
    adapted,
    draw_adapters,
    draw_alive,
    structure,
    tokens,
)

CLIENTS, EACH = 3, 2


def batch() -> Batch:
    rows, mask = tokens(CLIENTS * EACH)
    return Batch(rows, mask, rows, CLIENTS)


def masked(network: Network, lane: Lane, own: Tree, alive: Tree) -> Tensor:
    with lane.pruned(structure(network).parts, alive):
        return lane.logits(own, batch())


def sliced(network: Network, own: Tree, alive: Tree, k: int) -> nn.Module:
    network.write(row(own, k))
    model = copy.deepcopy(network.model)
    slice_model(model, structure(network).parts, row(alive, k))
    return model


def alone(model: nn.Module, k: int) -> Tensor:
    rows, mask = (x[k * EACH : (k + 1) * EACH] for x in tokens(CLIENTS * EACH))
    found = model(input_ids=rows, attention_mask=mask).logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("lane", [FoldLane, LoopLane])
@pytest.mark.parametrize("family", FAMILIES)
def test_mask_and_slice_give_equal_logits(family: str, lane: type[Lane]) -> None:
    """Three clients with other adapters and other structures in one batch.

    Within 1e-5 of the largest logit in float32, and 1e-13 in float64.
    """
    network = adapted(family)
    own, alive = draw_adapters(network, CLIENTS), draw_alive(network, CLIENTS)
    for bound in (1e-5, 1e-13):
        if bound < 1e-6:
            network.model.double()
            own = {name: value.double() for name, value in own.items()}
        check_logits(network, lane, own, alive, bound)


def check_logits(network: Network, lane: type[Lane], own: Tree, alive: Tree, bound: float) -> None:
    with torch.no_grad():
        found = masked(network, lane(network.model), own, alive).unflatten(0, (CLIENTS, EACH))
        whole = lane(network.model).logits(own, batch()).unflatten(0, (CLIENTS, EACH))
        for k in range(CLIENTS):
            wanted = alone(sliced(network, own, alive, k), k)
            assert float((found[k] - wanted).abs().max()) <= bound * float(wanted.abs().max())
            assert float((found[k] - whole[k]).abs().max()) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_what_is_left_are_equal_and_of_what_is_gone_zero(family: str) -> None:
    network = adapted(family)
    parts = structure(network).parts
    network.model.double()
    drawn = {name: value.double() for name, value in draw_adapters(network, CLIENTS).items()}
    alive = draw_alive(network, CLIENTS)
    own = {name: value.clone().requires_grad_() for name, value in drawn.items()}
    found = masked(network, FoldLane(network.model), own, alive).square().mean() * CLIENTS
    gradients = dict(zip(own, torch.autograd.grad(found, list(own.values())), strict=True))
    met = 0
    for k in range(CLIENTS):
        model = sliced(network, drawn, alive, k)
        alone(model, k).square().mean().backward()
        wanted = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        rest = {name: gradients[name][k] for name in wanted}
        for (layer, side), members in sides(parts).items():
            name = f"{layer}.lora_{'B' if side == 'rows' else 'A'}.default.weight"
            dim = 0 if side == "rows" else 1
            own_rows = kept(members, alive, rest[name].shape[dim])[k]
            assert not bool(rest[name].index_select(dim, torch.nonzero(~own_rows).flatten()).any())
            rest[name] = rest[name].index_select(dim, torch.nonzero(own_rows).flatten())
            met += 1
        for name, gradient in wanted.items():
            assert gradient is not None and gradient.shape == rest[name].shape
            assert torch.allclose(gradient, rest[name], atol=1e-12)
    assert met == CLIENTS * len(sides(parts))


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_atomic(family: str) -> None:
    """q, k, v, o and gate, up, down keep shapes that fit each other, whatever is cut."""
    network = adapted(family)
    parts, alive = structure(network).parts, draw_alive(network, 1, seed=5)
    model = sliced(network, draw_adapters(network, 1), alive, 0)
    whole = dict(network.model.named_modules())
    for part in parts:
        left = int(alive[part.name].sum())
        for member in part.members:
            dim = 0 if member.side == "rows" else 1
            before, after = whole[member.layer], model.get_submodule(member.layer)
            assert weight_shape(after)[dim] == left * member.width
            assert weight_shape(before)[dim] == part.groups * member.width
            assert weight_shape(after)[1 - dim] == weight_shape(before)[1 - dim]


def test_grouped_queries_go_with_their_key_and_value() -> None:
    part = next(p for p in structure(adapted("llama-gqa")).parts if p.kind == "heads")
    assert part.groups == 3
    assert {m.layer.rpartition(".")[2]: m.width for m in part.members} == {
        "q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16,
    }  # fmt: skip
    assert part.weights == 24 * (16 + 8 + 8 + 16)


def test_gpt2_is_masked_and_not_sliced() -> None:
    network = adapted("gpt2")
    own, alive = draw_adapters(network, CLIENTS), draw_alive(network, CLIENTS)
    lanes = [lane(network.model) for lane in (FoldLane, LoopLane)]
    with torch.no_grad():
        one, two = (masked(network, lane, own, alive) for lane in lanes)
        whole = lanes[0].logits(own, batch())
    assert torch.allclose(one, two, atol=1e-5) and not torch.allclose(one, whole, atol=1e-2)
    with pytest.raises(FedpeftError, match="GPT-2 fuses q, k and v"):
        sliced(network, own, alive, 0)


def test_gpt2s_masked_heads_and_channels_add_nothing() -> None:
    """Whatever the gone groups' weights are, logits stay."""
    network = adapted("gpt2")
    own, alive = draw_adapters(network, 1), draw_alive(network, 1)
    lane = LoopLane(network.model)
    rows, mask = tokens(EACH)
    seen = []
    with torch.no_grad():
        for shift in (0.0, 5.0):
            for (layer, side), members in sides(structure(network).parts).items():
                weight = structure(network).weight(layer)  # a view of the model's
                gone = ~kept(members, alive, weight.shape[0 if side == "rows" else 1])[0]
                view = weight if side == "rows" else weight.mT
                view[gone] += shift
            with lane.pruned(structure(network).parts, alive):
                found = lane.logits(own, Batch(rows, mask, rows, 1))
            seen.append(found)
    assert torch.allclose(*seen, atol=1e-5)


@contextmanager
def watched(model: nn.Module) -> Iterator[list[int]]:
    found: list[int] = []
    found.append(sum(len(m._forward_hooks) for m in model.modules()))
    yield found
    found.append(sum(len(m._forward_hooks) for m in model.modules()))


def test_the_model_is_whole_again_after_the_block() -> None:
    network = adapted("bert")
    own, alive = draw_adapters(network, CLIENTS), draw_alive(network, CLIENTS)
    lane = FoldLane(network.model)
    with torch.no_grad(), watched(network.model) as hooks:
        before = lane.logits(own, batch())
        with pytest.raises(ZeroDivisionError), lane.pruned(structure(network).parts, alive):
            _ = 1 // 0
        assert torch.equal(lane.logits(own, batch()), before)
    assert hooks == [0, 0]
