"""Local training of a cohort equals a hand-written loop with torch's own optimizers."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedpeft import tree
from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import FoldLane, LoopLane
from fedpeft.cohort.loader import cuts
from fedpeft.config import Local
from fedpeft.local import Progress, Trainer, batch_plan, clip_rows, rate
from fedpeft.steps import steps_of
from fedpeft.strategy import Fit
from fedpeft.tree import Tree
from tests.tiny import IA3, LORA, tiny_network, tiny_population

SIZES = (13, 9, 4, 1)  # most steps first
LOCALS = {
    "sgd": Local(optimizer="sgd", lr=0.1, batch_size=4),
    "sgd momentum decay": Local(
        optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.01, epochs=2, batch_size=4
    ),
    "adamw": Local(optimizer="adamw", lr=0.01, weight_decay=0.1, epochs=2, batch_size=4),
    "clip": Local(optimizer="sgd", lr=0.5, epochs=2, batch_size=4, clip_norm=0.05),
    "accumulate": Local(optimizer="sgd", lr=0.1, epochs=2, batch_size=2, accumulate=3),
    "steps": Local(optimizer="adamw", lr=0.01, steps=5, batch_size=4),
    "cosine": Local(optimizer="adamw", lr=0.01, epochs=2, batch_size=4, schedule="cosine"),
    "warmup linear": Local(
        optimizer="sgd", lr=0.1, momentum=0.9, epochs=2, batch_size=4, schedule="linear", warmup=0.5
    ),
}
PROGRESS = Progress(round=2, rounds=4)


def trainer(
    local: Local,
    adapter: dict[str, object],
    lane: type[FoldLane] | type[LoopLane] = FoldLane,
    width: int = 8,
) -> Trainer:
    net = tiny_network(adapter)
    examples = tiny_population(SIZES).examples
    own = lane(net.model)
    own.set_precision(local.precision)
    return Trainer(Gradients(own, "classification", examples, local, net.device), width)


def start(adapter: dict[str, object], clients: int) -> Tree:
    """Different starting points, so that a mix-up of rows shows."""
    stream = torch.Generator().manual_seed(3)
    initial = tiny_network(adapter).initial
    return {
        n: v + 0.1 * torch.randn((clients, *v.shape), generator=stream) for n, v in initial.items()
    }


def plans(local: Local) -> list[np.ndarray]:
    clients = tiny_population(SIZES).clients
    return [batch_plan(c.train, local, 0, c.name, PROGRESS.round) for c in clients]


def fit(local: Local, adapter: dict[str, object], width: int = 8) -> Fit:
    at = trainer(local, adapter, width=width)
    return at.fit(start(adapter, len(SIZES)), plans(local), PROGRESS)


def by_hand(local: Local, adapter: dict[str, object], k: int) -> Tree:
    """Client k alone: peft model, torch.optim, LambdaLR, clip_grad_norm_, one batch at a time."""
    net = tiny_network(adapter)
    examples = tiny_population(SIZES).examples
    assert examples.labels is not None
    model = copy.deepcopy(net.model)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, value in start(adapter, len(SIZES)).items():
            own[name].copy_(value[k])
    if local.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            own.values(), lr=local.lr, momentum=local.momentum, weight_decay=local.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(own.values(), lr=local.lr, weight_decay=local.weight_decay)
    plan = plans(local)[k]
    for step, row in enumerate(plan):
        done = (PROGRESS.round - 1 + step / len(plan)) / PROGRESS.rounds
        for group in optimizer.param_groups:
            group["lr"] = local.lr * factor(local, done)
        optimizer.zero_grad()
        index = row[row >= 0]
        for i in index:  # one example at a time: no padding, no mask
            tokens = examples.tokens[examples.starts[i] : examples.starts[i + 1]].long()[None]
            loss = cross_entropy(model(input_ids=tokens).logits, examples.labels[i : i + 1])
            (loss / len(index)).backward()
        if local.clip_norm:
            torch.nn.utils.clip_grad_norm_(own.values(), local.clip_norm)
        optimizer.step()
    return {name: p.detach() for name, p in own.items()}


def factor(local: Local, done: float) -> float:
    warm = min(1.0, done / local.warmup) if local.warmup else 1.0
    left = min(1.0, max(0.0, (done - local.warmup) / (1 - local.warmup)))
    if local.schedule == "linear":
        return warm * (1 - left)
    if local.schedule == "cosine":
        return warm * (1 + math.cos(math.pi * left)) / 2
    return warm


@pytest.mark.parametrize("width", [1, 2, 8])
@pytest.mark.parametrize("adapter", [LORA, IA3], ids=["lora", "ia3"])
@pytest.mark.parametrize("name", LOCALS)
def test_cohort_equals_hand_loop(name: str, adapter: dict[str, object], width: int) -> None:
    """Also where fewer clients are in flight than in the cohort, so that rows are refilled."""
    local = LOCALS[name]
    found = fit(local, adapter, width)
    for k in range(len(SIZES)):
        wanted, begun = by_hand(local, adapter, k), tree.row(start(adapter, len(SIZES)), k)
        moved = tree.norm(tree.sub(wanted, begun))
        off = tree.norm(tree.sub(tree.row(found.adapter, k), wanted))
        assert off <= 1e-5 * tree.norm(wanted), f"client {k}: {off:.1e}"
        assert moved > 100 * off, f"client {k} hardly moved: {moved:.1e} against {off:.1e}"


def test_a_client_trains_the_same_alone_and_in_company() -> None:
    local = LOCALS["adamw"]
    whole = fit(local, LORA)
    for k in range(len(SIZES)):
        alone = trainer(local, LORA, LoopLane).fit(
            {n: v[k : k + 1] for n, v in start(LORA, len(SIZES)).items()},
            [plans(local)[k]],
            PROGRESS,
            None,
        )
        off = tree.sub(tree.row(alone.adapter, 0), tree.row(whole.adapter, k))
        assert tree.norm(off) <= 1e-5 * tree.norm(tree.row(alone.adapter, 0))
        assert float(alone.loss[0]) == pytest.approx(float(whole.loss[k]), rel=1e-5)
    assert whole.steps.tolist() == [8, 6, 2, 2]


def test_a_diverging_client_harms_nobody() -> None:
    local, begin = LOCALS["adamw"], start(LORA, len(SIZES))
    sound = fit(local, LORA)
    for value in begin.values():
        value[2] = torch.inf
    spoilt = trainer(local, LORA).fit(begin, plans(local), PROGRESS, None)
    for k in (0, 1, 3):
        off = tree.sub(tree.row(spoilt.adapter, k), tree.row(sound.adapter, k))
        assert tree.norm(off) <= 1e-6


def test_adjust_sees_the_clipped_gradient_and_the_current_adapter() -> None:
    local = dataclasses.replace(LOCALS["clip"], weight_decay=0.0)
    seen: list[float] = []

    def adjust(gradient: Tree, at: Tree, own: Mapping[str, Tree]) -> Tree:
        norms = torch.cat([g.flatten(1) for g in gradient.values()], 1).norm(dim=1)
        seen.extend(norms.tolist())
        assert gradient.keys() == at.keys() == start(LORA, 1).keys()
        return {name: torch.zeros_like(g) for name, g in gradient.items()}

    begin = start(LORA, len(SIZES))
    found = trainer(local, LORA).fit(begin, plans(local), PROGRESS, adjust)
    assert all(torch.equal(found.adapter[n], begin[n]) for n in begin)
    assert seen and max(seen) <= local.clip_norm * (1 + 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_comes_close_and_keeps_float32_adapters(precision: str) -> None:
    full = fit(LOCALS["sgd"], LORA)
    local = dataclasses.replace(LOCALS["sgd"], precision=precision)  # type: ignore[arg-type]
    less = fit(local, LORA)
    begin = start(LORA, len(SIZES))
    moved = tree.norm(tree.sub(full.adapter, begin))
    off = tree.norm(tree.sub(less.adapter, full.adapter))
    assert 0 < off < 0.05 * moved
    assert {v.dtype for v in less.adapter.values()} == {torch.float32}


def test_an_fp16_overflow_costs_the_client_its_step_and_nobody_else() -> None:
    local = dataclasses.replace(LOCALS["sgd momentum decay"], precision="fp16")
    at = trainer(local, LORA)
    real = at.gradients.step

    def overflow(matrix, layout, index, scale):  # type: ignore[no-untyped-def]
        gradient, losses = real(matrix, layout, index, scale)
        gradient[1:2] = torch.inf  # client 1, until it is done
        return gradient, losses

    at.gradients.step = overflow  # type: ignore[method-assign]
    begin = start(LORA, len(SIZES))
    found = at.fit(begin, plans(local), PROGRESS, None)
    sound = fit(local, LORA)
    assert all(torch.equal(found.adapter[n][1], begin[n][1]) for n in begin)
    for k in (0, 2, 3):
        assert all(torch.equal(found.adapter[n][k], sound.adapter[n][k]) for n in begin)


def test_batch_plan_passes_over_all_data_without_mixing_passes() -> None:
    train = np.arange(100, 110)
    local = Local(epochs=3, batch_size=2, accumulate=2)
    plan = batch_plan(train, local, 0, "a", 1)
    assert plan.shape == (9, 4) and steps_of(10, local) == 9
    for i in range(3):
        one = plan[3 * i : 3 * i + 3]
        assert sorted(one[one >= 0].tolist()) == train.tolist()
    assert not np.array_equal(plan[:3], plan[3:6])


def test_batch_plan_depends_on_seed_client_and_round_only() -> None:
    train, local = np.arange(50), Local(batch_size=8)
    first = batch_plan(train, local, 0, "a", 1)
    assert np.array_equal(first, batch_plan(train, local, 0, "a", 1))
    for other in ((1, "a", 1), (0, "b", 1), (0, "a", 2)):
        assert not np.array_equal(first, batch_plan(train, local, *other))


def test_steps_overrule_epochs_and_wrap_around() -> None:
    plan = batch_plan(np.arange(5), Local(steps=7, batch_size=4), 0, "a", 1)
    assert plan.shape == (7, 4)
    assert [int((row >= 0).sum()) for row in plan] == [4, 1, 4, 1, 4, 1, 4]


def test_clip_rows_bounds_each_row_by_itself() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    clipped = clip_rows(rows, 1.0)
    assert torch.allclose(clipped, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_schedules_begin_and_end_where_they_should() -> None:
    done = torch.tensor([0.0, 0.1, 0.2, 0.6, 1.0])
    local = Local(schedule="cosine", warmup=0.2)
    assert torch.allclose(rate(local, done), torch.tensor([0.0, 0.5, 1.0, 0.5, 0.0]), atol=1e-6)
    linear = Local(schedule="linear")
    assert torch.allclose(rate(linear, done), 1 - done)
    assert torch.equal(rate(Local(), done), torch.ones(5))


def test_cuts_are_the_cheapest() -> None:
    def cost(at: list[int], costs: list[int], overhead: int) -> int:
        return sum((j - i) * costs[j - 1] + overhead for i, j in itertools.pairwise(at))

    stream = np.random.default_rng(0)
    for _ in range(50):
        costs = sorted(stream.integers(1, 60, 7).tolist())
        most, overhead = int(stream.integers(1, 8)), int(stream.integers(0, 80))
        inner = range(1, len(costs))
        every = [
            [0, *some, len(costs)]
            for n in range(len(costs))
            for some in itertools.combinations(inner, n)
        ]
        allowed = [at for at in every if all(j - i <= most for i, j in itertools.pairwise(at))]
        found = cuts(costs, most, overhead)
        assert found in allowed
        assert cost(found, costs, overhead) == min(cost(at, costs, overhead) for at in allowed)
    assert cuts([32] * 8, 8, 1) == [0, 8]  # equal lengths: one pass


def test_short_rows_are_not_padded_to_the_longest() -> None:
    at = trainer(Local(batch_size=4), LORA)
    lengths = at.gradients.examples.lengths.numpy()
    index = np.array([[0, 1, 2, 3], [5, 6, 7, -1]])
    passes = at.gradients.loader._parts(index)
    rows = np.concatenate(passes, axis=1)
    assert [sorted(r[r >= 0].tolist()) for r in rows] == [[0, 1, 2, 3], [5, 6, 7]]
    in_order = [lengths[r[r >= 0]].tolist() for r in rows]
    assert all(own == sorted(own) for own in in_order)


@pytest.mark.parametrize("name", ["sgd momentum decay", "adamw"])
def test_a_smaller_rank_padded_with_zeros_trains_as_if_alone(name: str) -> None:
    """Rank 2 in a network of rank 4; alpha chosen so that both have the same factor s."""
    small = {**LORA, "r": 2, "lora_alpha": 4}
    large = {**LORA, "r": 4, "lora_alpha": 8}
    net, local = tiny_network(large), LOCALS[name]
    own = tree.row(start(small, len(SIZES)), 1)
    begin = start(large, len(SIZES))
    for key, value in tree.pad(own, net.initial).items():
        begin[key][1] = value
    found = tree.row(trainer(local, large).fit(begin, plans(local), PROGRESS).adapter, 1)
    alone = {key: value[None] for key, value in own.items()}
    wanted = trainer(local, small).fit(alone, plans(local)[1:2], PROGRESS).adapter
    cropped = tree.crop(found, own)
    assert all(torch.equal(found[n], tree.pad(cropped, net.initial)[n]) for n in found)
    off = tree.norm(tree.sub(cropped, tree.row(wanted, 0)))
    assert off <= 1e-5 * tree.norm(own)
