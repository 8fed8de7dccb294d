"""Penalties and projections of tuners: peft's own values, the same in every lane."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.cohort import objective
from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import FoldLane, Lane, LoopLane
from fedpeft.cohort.objective import Objective
from fedpeft.config import Local
from fedpeft.model import Network, set_mode
from fedpeft.tree import Tree
from tests.tuners import ROWS, examples, network

INDEX = np.array([[0, 1, 2], [5, 6, -1]])


def moved(net: Network) -> Tree:
    stream = torch.Generator().manual_seed(1)
    return {
        n: v + 0.05 * torch.randn((2, *v.shape), generator=stream) for n, v in net.initial.items()
    }


def step(net: Network, lane: Lane, values: Tree) -> tuple[Tensor, Tensor]:
    gradients = Gradients(lane, net.task, examples(net.task), Local(), net.device)
    set_mode(net.model, True, False)
    matrix = net.layout.pack(values).requires_grad_()
    return gradients.step(matrix, net.layout, INDEX, torch.ones(2))


def plain_step(net: Network, values: Tree, k: int) -> tuple[Tree, Tensor]:
    """One client's gradient and loss by peft and ``backward`` alone."""
    net.write({n: v[k] for n, v in values.items()})
    set_mode(net.model, True, False)
    index = torch.from_numpy(INDEX[k][INDEX[k] >= 0])[None]
    batch = examples(net.task).batch(index)
    net.model.zero_grad()
    loss = net.model(input_ids=batch.tokens, attention_mask=batch.mask, labels=batch.labels).loss
    loss.backward()
    own = dict(net.model.named_parameters())
    grads = {n: own[n].grad for n in net.initial}
    return {n: torch.zeros_like(own[n]) if g is None else g for n, g in grads.items()}, loss


@pytest.mark.parametrize("name", ["adalora", "osf", "lora"])
def test_a_step_is_pefts_own_with_penalty_and_projection(name: str) -> None:
    net = network(ROWS[name])
    values = moved(net)
    gradient, losses = step(net, FoldLane(net.model), values)
    looped, _ = step(net, LoopLane(net.model), values)
    assert torch.allclose(gradient, looped, atol=1e-6)
    for k in range(2):
        wanted, loss = plain_step(net, values, k)
        found = {n: g[k] for n, g in net.layout.unpack(gradient).items()}
        assert torch.allclose(losses[k], loss, atol=1e-5)
        for n in wanted:
            assert torch.allclose(found[n], wanted[n], atol=1e-5), n


def test_osf_keeps_out_of_the_high_directions() -> None:
    net = network(ROWS["osf"])
    own, stream = Objective(net.model), torch.Generator().manual_seed(2)
    gradient = torch.randn((2, net.layout.size), generator=stream)
    found = own.project(gradient, net.layout)
    assert not torch.allclose(found, gradient)
    assert torch.allclose(own.project(found, net.layout), found, atol=1e-5)
    head = [n for n in net.layout.names if "classifier" in n]
    named, before = net.layout.unpack(found), net.layout.unpack(gradient)
    assert head and all(torch.equal(named[n], before[n]) for n in head)


def test_kasa_pays_for_singular_values_and_skewed_factors() -> None:
    net = network(ROWS["lora kasa"])
    values = moved(net)
    found = Objective(net.model).penalty(values)
    assert found is not None
    for k in range(2):
        net.write({n: v[k] for n, v in values.items()})
        tuner: Any = net.model.base_model
        assert torch.allclose(found[k], tuner._get_kasa_loss())
    assert float(found[0]) != float(found[1])


def test_monteclora_pays_its_variational_term(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(ROWS["lora monteclora"], monteclora_config={"kl_loss_weight": 1e-2})
    values = {n: v.expand(2, *v.shape) for n, v in net.initial.items()}
    own, tuner = Objective(net.model), net.model.base_model
    drawn = own.penalty(values)
    assert drawn is not None and float(drawn[0]) != float(drawn[1])  # every client has its own
    set_mode(net.model, True, False)
    with torch.no_grad():
        net.model(input_ids=examples(net.task).batch(torch.tensor([[0]])).tokens)

    def last(sampler: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        return sampler.gaussian_var_prior.diag(), sampler.expert_weights

    monkeypatch.setattr(objective, "monteclora_draw", last)
    found = own.penalty(values)
    assert found is not None
    wanted = tuner._get_monteclora_loss()  # type: ignore[operator,union-attr]
    assert torch.allclose(found, wanted.expand(2))


def test_most_tuners_add_nothing() -> None:
    net = network(ROWS["lora"])
    own, gradient = Objective(net.model), torch.ones(2, net.layout.size)
    assert own.penalty(moved(net)) is None
    assert own.project(gradient, net.layout) is gradient
