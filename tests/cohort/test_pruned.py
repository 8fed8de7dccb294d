"""Clients with other structures train in one batch as each does alone with its smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fedpeft.cohort.clients import RoundInfo, TorchCohort
from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import FoldLane, Lane, LoopLane, VmapLane, speed_up
from fedpeft.cohort.shelf import Shelf
from fedpeft.config import Engine, Local
from fedpeft.errors import FedpeftError
from fedpeft.local import Progress, Trainer
from fedpeft.pruning.importance import Recorder
from fedpeft.tree import Tree, broadcast
from tests.tiny import LORA, tiny_network, tiny_population

SIZES = (5, 9, 3, 12)
FEW = {**LORA, "target_modules": ["query", "value", "dense"]}
NETWORK = tiny_network(FEW, layers=2)
with torch.no_grad():
    for frozen in NETWORK.model.parameters():  # at their usual 0.02 heads and channels do nothing
        if frozen.dim() == 2 and not frozen.requires_grad:
            frozen.mul_(12)
POPULATION = tiny_population(SIZES)


def cohort(lane: type[Lane], clients: Sequence[int], width: int, **local: Any) -> TorchCohort:
    settings = Local(optimizer="sgd", lr=0.1, batch_size=4, **local)
    made = lane(NETWORK.model)
    gradients = Gradients(made, "classification", POPULATION.examples, settings, NETWORK.device)
    data = [POPULATION.clients.find(f"c{k}") for k in clients]
    info = RoundInfo(Progress(1, 1), 0)
    weights = torch.ones(len(data), dtype=torch.float64)
    return TorchCohort(NETWORK, Trainer(gradients, width), data, info, weights, ({}, Shelf()))


def structures() -> Tree:
    """Client k lacks other heads and channels than client j."""
    stream, found = torch.Generator().manual_seed(0), {}
    for part in cohort(LoopLane, [0], 1).structure().parts:
        alive = torch.rand(len(SIZES), part.groups, generator=stream) < 0.5
        alive[:, -1] = True
        found[part.name] = alive
    return found


def trained(lane: type[Lane], clients: Sequence[int], width: int) -> tuple[Tree, Tree, list[float]]:
    """Adapters, importances and losses; of two epochs."""
    own = cohort(lane, clients, width, epochs=2)
    alive = {n: v[list(clients)] for n, v in structures().items()}
    start = broadcast(NETWORK.initial, len(clients))
    zero = {n: torch.zeros(v.shape) for n, v in alive.items()}
    recorder = Recorder(own.structure(), zero)
    with own.pruned(alive):
        fit = own.fit(start, adjust=recorder.adjust, own=recorder.own)
        losses = own.losses(fit.adapter)
    return fit.adapter, recorder.average, losses.tolist()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_pruned_clients_in_one_batch_are_what_each_is_alone(width: int) -> None:
    """Unequal steps and fewer rows than clients, so that rows change hands."""
    adapters, importances, losses = trained(FoldLane, range(4), width)
    for k in range(4):
        alone, own, [loss] = trained(LoopLane, [k], 1)
        for name, value in alone.items():
            assert torch.allclose(adapters[name][k], value[0], atol=1e-5)
        for name, value in own.items():
            assert torch.allclose(importances[name][k], value[0], atol=1e-5)
        assert losses[k] == pytest.approx(loss, rel=1e-5)


def test_what_is_gone_is_not_trained_and_what_is_left_is() -> None:
    alive = structures()
    adapters, _, _ = trained(FoldLane, range(4), 4)
    part = next(p for p in cohort(LoopLane, [0], 1).structure().parts if p.kind == "heads")
    name = f"{part.members[2].layer}.lora_B.default.weight"  # of the values
    moved = (adapters[name] - NETWORK.initial[name]).abs().sum(2) > 0
    wanted = alive[part.name].repeat_interleave(part.members[2].width, dim=1)
    assert torch.equal(moved, wanted)


def test_structures_matter() -> None:
    own = cohort(FoldLane, range(4), 4)
    start = broadcast(NETWORK.initial, 4)
    whole = own.losses(start)
    with own.pruned(structures()):
        smaller = own.losses(start)
    assert float((whole - smaller).abs().min()) > 1e-4
    assert torch.equal(own.losses(start), whole)
    with own.pruned(own.structure().whole(4)):
        assert torch.allclose(own.losses(start), whole, atol=1e-6)


def test_losses_may_be_over_the_first_examples_alone() -> None:
    own = cohort(FoldLane, range(4), 4)
    start = broadcast(NETWORK.initial, 4)
    most, everything = own.losses(start, most=4), own.losses(start)
    assert float((most - everything)[2].abs()) == 0.0  # it has three
    assert float((most - everything)[3].abs()) > 1e-5
    assert torch.equal(own.losses(start, most=99), everything)


def test_lanes_that_cannot_mask_refuse() -> None:
    start = structures()
    with pytest.raises(FedpeftError, match="cannot mask"), cohort(VmapLane, [0], 1).pruned(start):
        pass
    own = cohort(FoldLane, [0], 1)
    gradients = own._trainer.gradients
    gradients.lane = speed_up(gradients.lane, Engine(compile="default"))
    with pytest.raises(FedpeftError, match=r"engine\.compile=default"), own.pruned(start):
        pass


def test_blocks_that_are_computed_again_are_masked_alike() -> None:
    alive = structures()
    found = []
    for checkpointing in (False, True):
        own = cohort(FoldLane, range(4), 4)
        lane = own._trainer.gradients.lane
        own._trainer.gradients.lane = speed_up(lane, Engine(checkpointing=checkpointing))
        NETWORK.model.train()
        with own.pruned(alive):
            found.append(own.fit(broadcast(NETWORK.initial, 4)).adapter)
        NETWORK.model.eval()
        for module in NETWORK.model.modules():
            if "gradient_checkpointing" in vars(module):
                module.gradient_checkpointing = False
    for name, value in found[0].items():
        assert torch.allclose(found[1][name], value, atol=1e-6)
