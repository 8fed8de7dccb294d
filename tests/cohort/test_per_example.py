"""Clipped per-example gradients equal a loop over the examples, and bound what one example does."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft import tree
from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import FoldLane, Lane, LoopLane, VmapLane
from fedpeft.cohort.per_example import Budget, Clipped, PerExample
from fedpeft.config import Local, Rounds
from fedpeft.data.clients import Task
from fedpeft.data.examples import Examples, flatten
from fedpeft.local import Progress, Trainer
from fedpeft.model import Network, set_mode
from fedpeft.strategies.ffa_lora import FfaLora
from fedpeft.strategy import Messages
from fedpeft.tree import Layout, Tree
from tests.cohort import small
from tests.tiny import LORA as TINY_LORA
from tests.tiny import Tiny

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": small.LORA,
    "dora": {"kind": "lora", "r": 2, "use_dora": True},
    "ia3": {"kind": "ia3"},
    "vera": {"kind": "vera", "r": 4},
    "boft": {"kind": "boft", "boft_block_size": 4, "target_modules": ["query", "q_proj"]},
    "prompt": {"kind": "prompt_tuning", "num_virtual_tokens": 3},
    "prefix": {"kind": "prefix_tuning", "num_virtual_tokens": 3},
    "shira": {"kind": "shira", "r": 2, "target_modules": ["query", "q_proj"]},
}
LANES: dict[str, type[Lane]] = {"prompt": VmapLane, "prefix": VmapLane, "shira": LoopLane}
INDEX = np.array([[5, 1, 2, 3], [4, 0, -1, -1], [-1, 6, -1, 7]])
LOCAL = Local(batch_size=4, clip_norm=1.0, clip_per="example")
Passes = Literal[1, 2]


def make(
    net: Network,
    data: Examples,
    passes: Passes | None = None,
    lane: type[Lane] = FoldLane,
    local: Local = LOCAL,
    rows: int = 1000,
) -> PerExample:
    budget = Budget(rows * net.layout.size, passes)
    own = lane(net.model)
    own.set_precision(local.precision)
    return PerExample(Gradients(own, net.task, data, local, net.device), budget)


def run(ours: PerExample, values: Tree, index: np.ndarray = INDEX, scale: float = 1.0) -> Clipped:
    layout = Layout.of(tree.row(values, 0))
    matrix = layout.pack(values).requires_grad_()
    return ours.clipped(matrix, layout, index, torch.full((len(matrix),), scale))


def norms(net: Network, values: Tree, data: Examples, index: np.ndarray = INDEX) -> Tensor:
    found = torch.zeros(index.shape)
    for (k, i), number in np.ndenumerate(index):
        if number >= 0:
            found[k, i] = small.alone(net, tree.row(values, k), data, int(number)).norm()
    return found


@pytest.mark.filterwarnings("ignore::UserWarning:peft.tuners.boft.layer")  # no CUDA kernel
@pytest.mark.filterwarnings("ignore:.*Sparse invariant checks:UserWarning")  # shira
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_sums_norms_and_losses_equal_the_loop(task: Task, adapter: str) -> None:
    net, data = small.network(task, ADAPTERS[adapter]), small.examples(task)
    values, lane = small.stacked(net), LANES.get(adapter, FoldLane)
    lengths = norms(net, values, data)
    bound = float(lengths[lengths > 0].median())  # clips about half of them
    local = dataclasses.replace(LOCAL, clip_norm=bound)
    wanted = small.sums(net, values, data, INDEX, bound)
    for passes in (1,) if lane is LoopLane else (1, 2):
        found = run(make(net, data, passes, lane, local), values)
        assert small.gap(found.total, wanted) < 1e-5
        assert torch.allclose(found.norms, lengths, rtol=1e-5, atol=1e-6)
        assert found.skipped.tolist() == [0, 0, 0]
    with torch.no_grad():
        net.write(tree.row(values, 2))
        own = torch.tensor([0.0, small.loss(net, data, 6), 0.0, small.loss(net, data, 7)])
    assert torch.allclose(found.losses[2], own, rtol=1e-5)


@pytest.mark.parametrize("lane", [FoldLane, VmapLane, LoopLane])
def test_every_lane_gives_the_same(lane: type[Lane]) -> None:
    net, data = small.network("classification"), small.examples("classification")
    values = small.stacked(net)
    wanted = small.sums(net, values, data, INDEX, LOCAL.clip_norm)
    assert small.gap(run(make(net, data, lane=lane), values).total, wanted) < 1e-5


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_one_pass_equals_two(task: Task) -> None:
    net, data = small.network(task), small.examples(task)
    values = small.stacked(net)
    one, two = (run(make(net, data, passes), values) for passes in (1, 2))  # type: ignore[arg-type]
    assert small.gap(two.total, one.total) < 1e-6
    assert torch.allclose(two.norms, one.norms, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_no_more_gradients_are_held_than_the_budget_allows(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, data = small.network("classification"), small.examples("classification")
    values, seen = small.stacked(net), []
    real = FoldLane.logits

    def spy(self: FoldLane, stacked: Tree, batch: Any) -> Tensor:
        seen.append(batch.clients)
        return real(self, stacked, batch)

    monkeypatch.setattr(FoldLane, "logits", spy)
    found = run(make(net, data, 1, rows=rows), values)
    assert max(seen) <= rows and sum(seen) == (INDEX >= 0).sum()
    assert small.gap(found.total, run(make(net, data, 1), values).total) < 1e-6


def test_two_passes_hold_one_tensors_gradients_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = small.network("classification"), small.examples("classification")
    shapes = []
    real = torch.autograd.grad

    def spy(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        found = real(*args, **kwargs)
        shapes.append([None if g is None else tuple(g.shape) for g in found])
        return found

    monkeypatch.setattr(torch.autograd, "grad", spy)
    run(make(net, data, 2), small.stacked(net))
    assert len(shapes) == 2 * len(INDEX)
    for first, second in zip(shapes[::2], shapes[1::2], strict=True):
        assert first == [None] * len(net.initial)
        assert second == [tuple(net.initial[n].shape) for n in sorted(net.initial)]


def test_two_passes_are_taken_where_the_budget_leaves_only_small_parts() -> None:
    net, data = small.network("classification"), small.examples("classification")
    index = np.arange(8 * 8).reshape(8, 8) % 10  # 64 examples
    lanes = {"fold": FoldLane, "loop": LoopLane}

    def ways(rows: int, lane: str = "fold", passes: Passes | None = None) -> set[str]:
        at = make(net, data, passes, lanes[lane], dataclasses.replace(LOCAL, batch_size=8), rows)
        call: list[str] = []
        at._one = lambda c, r: call.append("one")  # type: ignore[method-assign]
        at._two = lambda c, r: call.append("two")  # type: ignore[method-assign]
        run(at, small.stacked(net, 8), index)
        return set(call)

    assert ways(64) == ways(8) == {"one"}
    assert ways(1) == ways(3) == {"two"}
    assert ways(1, "loop") == {"one"}
    assert ways(1, passes=1) == {"one"} and ways(64, passes=2) == {"two"}


def test_a_step_is_the_mean_over_the_clients_own_examples() -> None:
    net, data = small.network("classification"), small.examples("classification")
    values = small.stacked(net)
    at, layout = make(net, data), net.layout
    gradient, losses = at.step(layout.pack(values), layout, INDEX, torch.ones(3))
    found = run(at, values)
    counts = torch.tensor([4.0, 2.0, 2.0])
    assert torch.equal(gradient, found.total / counts[:, None])
    assert torch.allclose(losses, found.losses.sum(1) / counts)


def test_clients_without_examples_get_zeros_and_the_model_is_left_alone() -> None:
    net, data = small.network("classification"), small.examples("classification")
    values, layout = small.stacked(net), net.layout
    at = make(net, data)
    idle = INDEX.copy()
    idle[1] = -1
    gradient, losses = at.step(layout.pack(values), layout, idle, torch.ones(3))
    assert not gradient[1].any() and losses[1] == 0 and gradient[0].any()
    shorter, _ = at.step(layout.pack(values), layout, idle[:1], torch.ones(3))
    assert not shorter[1:].any() and torch.allclose(shorter[0], gradient[0], atol=1e-7)
    at.lane = None  # type: ignore[assignment]
    for empty in (np.full((3, 4), -1), np.zeros((0, 4), np.int64), np.zeros((3, 0), np.int64)):
        found = run(at, values, empty)
        assert not found.total.any() and found.norms.shape == empty.shape


def spoil(net: Network, data: Examples, number: int) -> None:
    """An embedding row that only this example uses becomes infinite: its loss is NaN."""
    table = next(m for m in net.model.modules() if isinstance(m, torch.nn.Embedding))
    assert len(table.weight) == small.WORDS
    token = int(data.tokens[data.starts[number + 1] - 1])
    assert (data.tokens == token).sum() == 1
    with torch.no_grad():
        table.weight[token] = torch.inf


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_an_example_without_a_finite_gradient_adds_zero_and_spoils_nothing(
    task: Task, passes: Passes
) -> None:
    net, data = small.network(task), small.examples(task)
    values, index = small.stacked(net), INDEX.copy()
    index[1] = [-1, 8, -1, -1]
    spoil(net, data, 3)
    spoil(net, data, 8)
    at = make(net, data, passes)
    found = run(at, values, index)
    sound = np.where((index == 3) | (index == 8), -1, index)
    wanted = small.sums(net, values, data, sound, LOCAL.clip_norm)
    assert small.gap(found.total, wanted) < 1e-5
    assert found.skipped.tolist() == [1, 1, 0] and not found.total[1].any()
    assert torch.isnan(found.losses[0, 3])
    _, losses = at.step(net.layout.pack(values), net.layout, index, torch.ones(3))
    assert torch.isfinite(losses).all()


@pytest.mark.parametrize("passes", [1, 2])
def test_a_client_that_diverged_adds_zero_and_spoils_nobody(passes: Passes) -> None:
    net, data = small.network("classification"), small.examples("classification")
    values = small.stacked(net)
    at = make(net, data, passes)
    sound = run(at, values)
    for value in values.values():
        value[0] = 1e30
    found = run(at, values)
    assert found.skipped.tolist() == [4, 0, 0] and not found.total[0].any()
    assert torch.allclose(found.total[1:], sound.total[1:], atol=1e-6)


@pytest.mark.parametrize("passes", [1, 2])
def test_one_example_changes_a_sum_by_at_most_the_bound(passes: Passes) -> None:
    """Language modelling, unequal lengths: C when it comes or goes, 2C when it is replaced."""
    net, data = small.network("causal_lm"), small.examples("causal_lm")
    spoil(net, data, 8)
    at, values = make(net, data, passes), small.stacked(net, 1)
    bound, slack = LOCAL.clip_norm, 1e-5

    def total(*numbers: int) -> Tensor:
        return run(at, values, np.array([[*numbers, -1]])).total[0]

    moved = []
    rest = (1, 5, 2)
    for number in (0, 3, 4, 8):
        moved.append(float((total(*rest, number) - total(*rest)).norm()))
        for other in (6, 9, 8):
            change = total(*rest, number) - total(*rest, other)
            assert float(change.norm()) <= 2 * bound + slack
    assert max(moved) <= bound + slack and moved[3] < slack
    assert moved[0] == pytest.approx(bound, abs=slack), "the bound is met: these are clipped"


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_an_examples_norm_does_not_depend_on_its_company(task: Task) -> None:
    net, data = small.network(task), small.examples(task)
    at, values = make(net, data), small.stacked(net, 1)
    alone = float(run(at, values, np.array([[2]])).norms)
    for company in ([0], [5], [0, 5, 4]):
        found = run(at, values, np.array([[2, *company]])).norms[0, 0]
        assert float(found) == pytest.approx(alone, rel=1e-5)


def test_a_text_of_one_token_has_nothing_to_predict() -> None:
    net = small.network("causal_lm")
    data, values = flatten([[7], [3, 4, 5]], None, 0), small.stacked(net, 1)
    for lane in (FoldLane, LoopLane):
        found = run(make(net, data, lane=lane), values, np.array([[0, 1]]))
        assert found.norms[0, 0] == 0 == found.losses[0, 0] and found.norms[0, 1] > 0
        assert torch.isfinite(found.total).all()


@pytest.mark.parametrize("passes", [1, 2])
def test_only_the_trained_tensors_count_in_the_norm(passes: Passes) -> None:
    net, data = small.network("classification"), small.examples("classification")
    values = small.stacked(net)
    own = {n: v for n, v in values.items() if ".lora_A." not in n}
    net.write({n: v[0] for n, v in values.items() if ".lora_A." in n})
    found = run(make(net, data, passes), own)
    assert small.gap(found.total, small.sums(net, own, data, INDEX, LOCAL.clip_norm)) < 1e-5


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("lane", [FoldLane, VmapLane])
def test_dropout_draws_a_mask_for_each_example_and_repeats(
    lane: type[Lane], passes: Passes
) -> None:
    net = small.network("classification", small.LORA | {"lora_dropout": 0.5})
    data = flatten([[5, 6, 7]] * 4, [1] * 4, 0)  # four times the same example
    at = make(net, data, passes, lane)
    values, index = small.stacked(net, 1), np.array([[0, 1, 2, 3]])
    set_mode(net.model, training=True, base_dropout=False)

    def draw(seed: int) -> Clipped:
        torch.manual_seed(seed)
        return run(at, values, index)

    with torch.random.fork_rng():
        first, again, other = draw(0), draw(0), draw(1)
    assert len(set(first.norms[0].tolist())) == 4
    assert torch.equal(first.total, again.total) and torch.equal(first.norms, again.norms)
    assert not torch.equal(first.norms, other.norms)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("passes", [1, 2])
def test_norms_are_those_of_the_unscaled_gradients(precision: Any, passes: Passes) -> None:
    net, data = small.network("classification"), small.examples("classification")
    values = small.stacked(net)
    full = run(make(net, data, passes), values)
    less = make(net, data, passes, local=dataclasses.replace(LOCAL, precision=precision))
    for scale in (1.0, 2.0**10):
        found = run(less, values, scale=scale)
        assert found.total.dtype == found.norms.dtype == torch.float32
        assert 1e-6 < small.gap(found.norms, full.norms) < 0.03
        assert small.gap(found.total, full.total) < 0.03


@pytest.mark.parametrize("passes", [1, 2])
def test_an_fp16_overflow_is_tried_again_with_a_smaller_scale(passes: Passes) -> None:
    net, data = small.network("classification"), small.examples("classification")
    values = small.stacked(net)
    at = make(net, data, passes, local=dataclasses.replace(LOCAL, precision="fp16"))
    plain = run(at, values)
    for scale in (2.0**20, 2.0**30):
        found = run(at, values, scale=scale)
        assert found.skipped.sum() == 0
        assert small.gap(found.total, plain.total) < 0.01
    spoil(net, data, 3)
    assert run(at, values, scale=2.0**20).skipped.tolist() == [1, 0, 0]


@pytest.mark.parametrize("lane", [FoldLane, LoopLane])
def test_training_equals_a_loop_over_the_examples(lane: type[Lane]) -> None:
    """Several steps, ``accumulate`` > 1, clients of different sizes."""
    net, data = small.network("classification"), small.examples("classification")
    local = Local(
        optimizer="sgd", lr=0.3, batch_size=2, accumulate=2, clip_norm=0.7, clip_per="example"
    )
    plans = [np.array([[0, 1, 2, 3], [4, 5, 6, -1]]), np.array([[7, 8, -1, -1]])]
    begin = small.stacked(net, 2)
    trainer = Trainer(Gradients(lane(net.model), "classification", data, local, net.device), 2)
    fit = trainer.fit(begin, plans, Progress(1, 1), None)
    for k, plan in enumerate(plans):
        at = tree.row(begin, k)
        for numbers in plan:
            own = [int(i) for i in numbers if i >= 0]
            total = small.clipped(net, at, data, own, local.clip_norm)
            gradient = net.layout.unpack(total[None] / len(own))
            at = {n: v - local.lr * gradient[n][0] for n, v in at.items()}
        off = tree.sub(tree.row(fit.adapter, k), at)
        assert tree.norm(off) < 1e-5 * tree.norm(at)
        assert tree.norm(tree.sub(at, tree.row(begin, k))) > 0.1


def test_ffa_lora_with_per_example_clipping_from_end_to_end() -> None:
    local = Local(optimizer="sgd", lr=0.5, batch_size=4, clip_norm=0.2, clip_per="example")
    found = {}
    for lane, chunk in ((FoldLane, 8), (LoopLane, 1)):
        tiny = Tiny(sizes=(5, 9, 3), adapter=TINY_LORA, local=local, rounds=Rounds(count=1))
        strategy = FfaLora()
        state = strategy.init(tiny.problem)
        federation = tiny.federation(strategy, chunk, lane)
        sent = strategy.send(state, 1, tuple(federation.clients()))
        replies = list(federation.run(1, sent))
        assert all(isinstance(reply, Messages) for reply in replies)
        rows = [
            (r.clients[k], tree.row(r.trees["adapter"], k)) for r in replies for k in range(len(r))
        ]
        found[lane.name] = dict(rows)
        for client, adapter in rows:
            moved = tree.norm(tree.sub(adapter, state.trained))
            steps = -(-len(tiny.population.clients[int(client[1:])].train) // 4)
            assert 0 < moved <= steps * local.lr * local.clip_norm * (1 + 1e-5)
    for client, adapter in found["fold"].items():
        other = found["loop"][client]
        assert tree.norm(tree.sub(adapter, other)) < 1e-6 < 1e-2 < tree.norm(adapter)
