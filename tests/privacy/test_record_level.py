"""DP-SGD in each client: what one example may add, the noise on it, and what leaves a client."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import FoldLane
from fedpeft.cohort.per_example import PerExample
from fedpeft.config import Local, Privacy
from fedpeft.data.clients import ClientData, Clients, Population
from fedpeft.privacy.events import flatten
from fedpeft.privacy.randomness import Randomness
from fedpeft.privacy.record_level import NoisySteps
from fedpeft.tree import Layout, Tree
from tests.cohort import small
from tests.privacy.federated import (
    RECORD,
    STEP,
    flat,
    mechanism,
    mechanism_of,
    play,
    prepared_of,
    recipe_of,
    replies_of,
    seeded,
)
from tests.tiny import LORA, tiny_network, tiny_population

C = 0.5


def gradient_sum(
    numbers: list[int], sigma: float = 1e-9, clip: float = C, seed: int = 0, poison: int = -1
) -> torch.Tensor:
    """What a client with these examples adds up in one step, noise included: q = 1, lr = 1."""
    privacy = Privacy("record", noise_multiplier=sigma, clip_norm=clip)
    plain = tiny_population((8,))
    people = dataclasses.replace(
        plain, clients=Clients.of([ClientData("c0", np.array(numbers), np.arange(8, 9))])
    )
    prepared = seeded(prepared_of(recipe_of(privacy=privacy, local=STEP), population=people), seed)
    if poison >= 0:
        _poison(prepared.network, people, poison)
    [reply] = replies_of(prepared, ["c0"])
    start = prepared.network.initial
    moved = {n: v[0].double() - start[n].double() for n, v in reply.trees["adapter"].items()}
    return -flat(moved) * len(numbers)


def _poison(network: Any, people: Population, number: int) -> None:
    """One example's own last token gets an embedding that is not finite."""
    examples = people.examples
    table = network.model.get_input_embeddings().weight
    token = int(examples.tokens[examples.starts[number + 1] - 1])
    for other in range(8):
        own = examples.tokens[examples.starts[other] : examples.starts[other + 1]]
        if other != number:
            own[own == token] = 1 + token % 48
    with torch.no_grad():
        table[token] = math.nan


# -- what one example adds


@pytest.mark.parametrize("clip", [0.5, 50.0])
def test_adding_one_example_changes_the_sum_by_at_most_the_clip_norm(clip: float) -> None:
    """DP2 and DP5, through a whole client."""
    everything = gradient_sum(list(range(8)), clip=clip)
    changes = []
    for left in range(8):
        less = gradient_sum([n for n in range(8) if n != left], clip=clip)
        changes.append(float((everything - less).norm()))
    assert max(changes) <= clip * (1 + 1e-4)
    if clip < 1:  # all gradients here are longer than that
        assert min(changes) == pytest.approx(clip, rel=1e-3)
    else:
        assert min(changes) < 0.9 * clip


def test_the_sum_is_that_of_clipped_gradients_one_by_one() -> None:
    network, people = tiny_network(LORA), tiny_population((8,))
    wanted = small.clipped(network, network.initial, people.examples, list(range(8)), C).double()
    assert float((gradient_sum(list(range(8))) - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_a_companion_does_not_change_an_examples_gradient(task: Any) -> None:
    """Trap O5: of causal language models, whose library loss is a mean over a batch's tokens."""
    net, data = small.network(task), small.examples(task)
    local = Local(clip_norm=C, clip_per="example", batch_size=8)
    own = PerExample(Gradients(FoldLane(net.model), task, data, local, net.device))
    layout = Layout.of(net.initial)
    matrix = layout.pack({n: v[None] for n, v in net.initial.items()}).requires_grad_()

    def total(*numbers: int) -> torch.Tensor:
        return own.clipped(matrix, layout, np.array([numbers]), torch.ones(1)).total[0].double()

    lengths = [int(n) for n in data.lengths_of(np.arange(6))]
    assert lengths[5] > 2 * lengths[1]
    for other in (2, 3, 4, 5):
        assert float((total(1, other) - total(other) - total(1)).norm()) < 1e-5
    assert float(total(1).norm()) <= C * (1 + 1e-6)


def test_an_example_that_is_not_finite_adds_zero() -> None:
    """Trap O4."""
    whole = gradient_sum(list(range(8)), poison=3)
    without = gradient_sum([n for n in range(8) if n != 3], poison=3)
    assert bool(torch.isfinite(whole).all()) and float(whole.norm()) > 0.1
    assert float((whole - without).norm()) < 1e-5


def test_little_noise_and_a_wide_clip_are_plain_training() -> None:
    """DP1 and trap O19: on the same batches, those of all examples."""
    local = Local(optimizer="sgd", lr=0.5, momentum=0.9, weight_decay=0.1, batch_size=64, steps=3)
    private = Privacy("record", noise_multiplier=1e-12, clip_norm=1e4)
    plain, _ = play(prepared_of(recipe_of(local=local)))
    noised, _ = play(prepared_of(recipe_of(local=local, privacy=private)))
    moved = flat(plain[-1].adapter) - flat(plain[0].adapter)
    assert float(moved.norm()) > 0.1
    assert float((flat(noised[-1].adapter) - flat(plain[-1].adapter)).norm()) < 1e-4


def test_the_head_is_in_the_clipped_set() -> None:
    network = tiny_network(LORA)
    names = sorted(network.initial)
    layout = Layout.of(network.initial)
    one = layout.unpack(gradient_sum([2], clip=C)[None].float())
    norms = {n: float(one[n].norm()) for n in names}
    assert any("classifier" in n and norms[n] > 0 for n in names)
    assert math.sqrt(sum(v * v for v in norms.values())) == pytest.approx(C, rel=1e-4)


# -- the noise


def test_the_released_mean_has_the_stated_variance() -> None:
    """DP3: (sigma C / (q n))^2, within 3 %."""
    sigma, expected, width = 1.5, 4.0, 50_000
    steps = NoisySteps(
        C, torch.tensor([sigma, 2 * sigma]), torch.tensor([expected, 8.0]), Randomness.seeded(0)
    )
    total = torch.ones(3, width)
    found = steps.release(total, np.array([0, -1, 1])).double()
    assert float(found[0].var()) == pytest.approx((sigma * C / expected) ** 2, rel=0.03)
    assert float(found[2].var()) == pytest.approx((2 * sigma * C / 8) ** 2, rel=0.03)
    assert float(found[0].mean()) == pytest.approx(1 / expected, abs=4e-3)
    assert torch.equal(found[1], total[1].double())  # nobody's row
    assert torch.equal(total, torch.ones(3, width))


def test_the_noise_of_a_whole_client_has_the_stated_variance() -> None:
    sums = torch.stack([gradient_sum([0, 1, 2], sigma=3.0, seed=seed) for seed in range(12)])
    noise = sums - gradient_sum([0, 1, 2])
    numbers = noise.numel()
    assert float(noise.var()) == pytest.approx((3.0 * C) ** 2, rel=4 * math.sqrt(2 / numbers))
    assert abs(float(noise.mean())) < 4 * 3 * C / math.sqrt(numbers)


def test_noise_is_independent_across_clients_steps_and_rounds() -> None:
    steps = NoisySteps(1.0, torch.ones(3), torch.ones(3), Randomness.secure())
    zero, who = torch.zeros(3, 20_000), np.arange(3)
    rows = torch.cat([steps.release(zero, who) for _ in range(3)]).numpy()
    off = np.corrcoef(rows) - np.eye(9)
    assert np.abs(off).max() < 5 / math.sqrt(20_000)


def test_an_empty_batch_takes_a_step_of_noise_alone() -> None:
    """Trap O1: the model is not called, and the noise is that of any other step."""
    local = dataclasses.replace(STEP, batch_size=1)
    privacy = Privacy("record", noise_multiplier=2.0, clip_norm=C)
    numbers = np.arange(3)
    empty = next(
        seed
        for seed in range(50)
        if bool((mechanism(privacy, local, sizes=(3,), seed=seed).plan(numbers) == -1).all())
    )
    prepared = seeded(prepared_of(recipe_of(privacy=privacy, local=local), (3,)), empty)
    [reply] = replies_of(prepared, ["c0"])
    start = prepared.network.initial
    moved = flat({n: v[0].double() - start[n].double() for n, v in reply.trees["adapter"].items()})
    stream = Randomness.seeded(empty)
    assert bool((stream.uniform(3) >= 1 / 3).all())
    noise = 2.0 * C * stream.normal(len(moved))  # over q n = 1
    assert float((moved + noise).norm() / noise.norm()) < 1e-5
    assert flatten(mechanism_of(prepared).event(3)) == {(1 / 3, 2.0): 1}


def test_a_client_without_any_batch_is_still_charged_and_replies() -> None:
    """One example at rate 1/60 of ten steps: nearly all its batches are empty."""
    privacy = Privacy("record", noise_multiplier=1.0)
    local = Local(optimizer="sgd", lr=0.1, batch_size=1, steps=10)
    prepared = prepared_of(recipe_of(privacy=privacy, local=local), (60, 60))
    states, reports = play(prepared)
    assert [report.replied for report in reports] == [2, 2]
    assert bool(torch.isfinite(flat(states[-1].adapter)).all())
    assert flatten(mechanism_of(prepared).event(60)) == {(1 / 60, 1.0): 10}


def test_causal_language_models_take_empty_batches_too() -> None:
    net, data = small.network("causal_lm"), small.examples("causal_lm")
    local = Local(clip_norm=C, clip_per="example", batch_size=8)
    own = PerExample(Gradients(FoldLane(net.model), "causal_lm", data, local, net.device))
    layout = Layout.of(net.initial)
    matrix = layout.pack({n: v[None] for n, v in net.initial.items()}).requires_grad_()
    found = own.clipped(matrix, layout, np.full((1, 1), -1), torch.ones(1))
    assert not bool(found.total.any())


# -- the batches


def test_batches_are_poisson() -> None:
    local = Local(batch_size=20, steps=2000)
    own = mechanism(local=local, sizes=(200,))
    assert own.rate(200) == 0.1
    plan = own.plan(np.arange(1000, 1200))
    sizes = (plan >= 0).sum(1)
    assert plan.shape[0] == 2000 and set(plan[plan >= 0]) == set(range(1000, 1200))
    assert sizes.mean() == pytest.approx(20, abs=4 * math.sqrt(18 / 2000))
    assert sizes.var() == pytest.approx(18, rel=4 * math.sqrt(2 / 2000))
    member = np.array([(row == 1000).any() for row in plan]).astype(float)
    assert member.mean() == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 2000))
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in plan[:50])
    assert abs(np.corrcoef(sizes[1:], sizes[:-1])[0, 1]) < 4 / math.sqrt(2000)


def test_batches_do_not_follow_from_the_recipes_seed() -> None:
    """Two secure runs of one recipe: whoever knows the seed does not know the batches."""
    plans = []
    for _ in range(2):
        prepared = prepared_of(
            recipe_of(privacy=RECORD, local=Local(batch_size=5, steps=20)), (50,)
        )
        assert mechanism_of(prepared).randomness.safe
        plans.append(mechanism_of(prepared).plan(np.arange(50)))
    assert plans[0].shape != plans[1].shape or not np.array_equal(*plans)


def test_a_batch_larger_than_the_data_is_all_of_it() -> None:
    """Trap O16: q is 1, and the event claims no amplification."""
    own = mechanism(local=Local(batch_size=32, steps=3), sizes=(10,))
    assert (np.sort(own.plan(np.arange(10)), axis=1) == np.arange(10)).all()
    assert flatten(own.event(10)) == {(1.0, 1.0): 3}
    assert float(own.steps([10]).expected[0]) == 10.0


def test_the_expected_batch_is_below_whatever_came() -> None:
    own = mechanism(local=Local(batch_size=8, accumulate=2, steps=1), sizes=(40, 10))
    assert own.steps([40, 10]).expected.tolist() == [16.0, 10.0]
    steps = dataclasses.replace(own.steps([40]), clip_norm=1e-12)
    for count in (3.0, 30.0):
        found = steps.release(torch.full((1, 4), count), np.array([0]))
        assert torch.allclose(found, torch.full((1, 4), count / 16))


def test_other_clients_data_do_not_matter_for_ones_result() -> None:
    """DP10's other half: bit by bit, with the others' tokens and labels changed."""
    found = []
    for change in (False, True):
        people = tiny_population((5, 9, 3))
        if change:
            own = people.clients[0]
            others = np.setdiff1d(np.arange(len(people.examples)), own.train)
            assert people.examples.labels is not None
            people.examples.labels[others] = (people.examples.labels[others] + 1) % 3
        prepared = seeded(prepared_of(recipe_of(privacy=RECORD), population=people), 5)
        [reply] = replies_of(prepared, ["c0", "c1", "c2"])
        found.append(reply.trees["adapter"])
    same = [all(torch.equal(a[k], b[k]) for a, b in _pairs(*found)) for k in range(3)]
    assert same == [True, False, False]


def _pairs(one: Tree, other: Tree) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(one[n], other[n]) for n in one]
