"""Gradients by tensors that are expanded into the model's: exact in every lane, for every use."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft import tree
from fedpeft.cohort.clients import RoundInfo, TorchCohort
from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import FoldLane, Lane, LoopLane, VmapLane
from fedpeft.cohort.per_example import Budget, PerExample
from fedpeft.cohort.shelf import Shelf
from fedpeft.config import Local
from fedpeft.data.clients import ClientData
from fedpeft.local import Progress, Trainer
from fedpeft.model import Network
from fedpeft.strategy import Expand
from fedpeft.tree import Layout, Tree
from tests.cohort import small

INDEX = np.array([[5, 1, 2, 3], [4, 0, 6, -1]])
CLIENTS = 2


def core(name: str) -> str:
    return name.replace(".lora_B.", ".lora_R.")


def problem(net: Network, seed: int = 0) -> tuple[Tree, Tree, Expand]:
    """Cores R of two clients (and their heads), the shared A, and ``lora_B = B R``."""
    draw = torch.Generator().manual_seed(seed)
    fixed = {n: v for n, v in net.initial.items() if ".lora_A." in n}
    up = {n: torch.randn(v.shape, generator=draw) for n, v in net.initial.items() if "lora_B" in n}
    start = {core(n): torch.randn(CLIENTS, 2, 2, generator=draw) for n in up}
    for name, value in net.initial.items():
        if name not in fixed and name not in up:
            start[name] = value + 0.1 * torch.randn(CLIENTS, *value.shape, generator=draw)

    def expand(trained: Tree) -> Tree:
        made = {name: value for name, value in trained.items() if "lora_R" not in name}
        return made | {name: b @ trained[core(name)] for name, b in up.items()}

    return tree.sort(start), fixed, expand


def one_by_one(net: Network, start: Tree, fixed: Tree, expand: Expand, index: np.ndarray) -> Tensor:
    """Each example's gradient through the plain model and the chain rule, ``[K, B, P]``."""
    found = torch.zeros(*index.shape, sum(v[0].numel() for v in start.values()))
    data = small.examples("classification")
    for (k, i), number in np.ndenumerate(index):
        if number < 0:
            continue
        own = {n: v[k : k + 1].clone().requires_grad_() for n, v in start.items()}
        made = expand(own)
        values = {**fixed, **{n: v[0].detach() for n, v in made.items()}}
        flat = small.alone(net, values, data, int(number))
        outer = Layout.of(values).unpack(flat[None])
        grads = torch.autograd.grad(
            list(made.values()), list(own.values()), [outer[n] for n in made]
        )
        found[k, i] = torch.cat([g.flatten() for g in grads])
    return found


def gradients(net: Network, lane: Lane, local: Local, expand: Expand) -> Gradients:
    data = small.examples("classification")
    return Gradients(lane, net.task, data, local, net.device).through(expand)


@pytest.mark.parametrize("kind", [FoldLane, LoopLane, VmapLane])
def test_gradients_are_those_of_what_is_trained_in_every_lane(kind: type[Lane]) -> None:
    net = small.network("classification")
    start, fixed, expand = problem(net)
    wanted = one_by_one(net, start, fixed, expand, INDEX).sum(1)
    wanted /= torch.tensor([[4.0], [3.0]])
    layout = Layout.of(tree.row(start, 0))
    net.write(fixed)
    at = gradients(net, kind(net.model), Local(batch_size=2, accumulate=2), expand)
    matrix = layout.pack(start).requires_grad_()
    found, _ = at.step(matrix, layout, INDEX, torch.ones(CLIENTS))
    assert found.shape == (CLIENTS, layout.size) and layout.size < net.layout.size
    assert small.gap(found, wanted) <= 1e-5


@pytest.mark.parametrize("passes", [1, 2])
def test_examples_are_clipped_by_the_norm_of_what_is_trained(passes: Literal[1, 2]) -> None:
    net = small.network("classification")
    start, fixed, expand = problem(net)
    each = one_by_one(net, start, fixed, expand, INDEX)
    norms = each.norm(dim=2)
    bound = float(norms[norms > 0].median())
    wanted = (each * (bound / norms.clamp(min=bound))[..., None]).sum(1)
    layout = Layout.of(tree.row(start, 0))
    net.write(fixed)
    local = Local(batch_size=4, clip_norm=bound, clip_per="example")
    at = gradients(net, FoldLane(net.model), local, expand)
    found = PerExample(at, Budget(1000 * net.layout.size, passes)).clipped(
        layout.pack(start), layout, INDEX, torch.ones(CLIENTS)
    )
    assert small.gap(found.norms, norms) <= 1e-5
    assert small.gap(found.total, wanted) <= 1e-5


def test_the_budget_counts_what_is_expanded() -> None:
    net = small.network("classification")
    start, _, expand = problem(net)
    layout, at = Layout.of(tree.row(start, 0)), gradients(net, FoldLane(net.model), Local(), expand)
    shared = sum(v.numel() for n, v in net.initial.items() if "lora_A" in n)
    assert at.numbers(layout.pack(start), layout) == net.layout.size - shared > layout.size


def cohort(net: Network, local: Local) -> TorchCohort:
    data = small.examples("classification")
    none = np.empty(0, dtype=np.int64)
    clients = [ClientData(f"c{k}", own[own >= 0], none) for k, own in enumerate(INDEX)]
    at = Gradients(FoldLane(net.model), net.task, data, local, net.device)
    info = RoundInfo(Progress(1, 1), 0)
    return TorchCohort(net, Trainer(at, 2), clients, info, torch.ones(2).double(), ({}, Shelf()))


def test_adam_steps_on_what_is_trained() -> None:
    """Two full-batch AdamW steps of torch's own on R, against the cohort's."""
    net, local = small.network("classification"), Local(optimizer="adamw", lr=0.01, batch_size=4)
    local = dataclasses.replace(local, epochs=0, steps=2, weight_decay=0.1, clip_norm=0.0)
    start, fixed, expand = problem(net)
    fit = cohort(net, local).fit(start, fixed=fixed, expand=expand)
    for k in range(CLIENTS):
        own = {n: torch.nn.Parameter(v[k : k + 1].clone()) for n, v in start.items()}
        adam = torch.optim.AdamW(list(own.values()), lr=0.01, weight_decay=0.1)
        for _ in range(2):
            at = {n: p.detach().expand(CLIENTS, *p.shape[1:]) for n, p in own.items()}
            each = one_by_one(net, at, fixed, expand, INDEX)[k]
            mean = each.sum(0) / int((INDEX[k] >= 0).sum())
            parts = torch.split(mean, [p.numel() for p in own.values()])
            for p, part in zip(own.values(), parts, strict=True):
                p.grad = part.view(p.shape)
            adam.step()
        for name, p in own.items():
            assert float((fit.adapter[name][k] - p.detach()[0]).abs().max()) <= 2e-5, name


def test_a_cohorts_gradients_and_losses_go_through_expand() -> None:
    net = small.network("classification")
    start, fixed, expand = problem(net)
    made = {**expand(start), **tree.broadcast(fixed, CLIENTS)}
    at = cohort(net, Local())
    assert torch.equal(at.losses(start, fixed=fixed, expand=expand), at.losses(made))
    found = at.gradients(start, fixed=fixed, expand=expand)
    wanted = one_by_one(net, start, fixed, expand, INDEX).sum(1) / torch.tensor([[4.0], [3.0]])
    assert found.keys() == start.keys()
    assert small.gap(Layout.of(tree.row(start, 0)).pack(found), wanted) <= 1e-5


@pytest.mark.parametrize("fault", ["unknown", "shape", "clients"])
def test_what_expand_makes_is_checked(fault: str) -> None:
    net = small.network("classification")
    start, fixed, expand = problem(net)

    def wrong(trained: Tree) -> Tree:
        made = expand(trained)
        name = next(n for n in made if "lora_B" in n)
        return {**made, "canary" if fault == "unknown" else name: made[name][..., :1]}

    if fault == "clients":
        start[next(iter(start))] = start[next(iter(start))][:1]
    match = {"unknown": "expand makes.*canary", "shape": "lora_B.*has shape", "clients": "2 client"}
    with pytest.raises(ValueError, match=match[fault]):
        cohort(net, Local()).fit(start, fixed=fixed, expand=expand if fault == "clients" else wrong)
