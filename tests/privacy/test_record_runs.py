"""DP-SGD: noise for a budget, what leaves a client, and every strategy under it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedpeft.cohort.clients import RoundInfo, TorchCohort
from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import FoldLane
from fedpeft.cohort.shelf import Shelf
from fedpeft.config import Local, Privacy, Rounds
from fedpeft.errors import FedpeftError
from fedpeft.local import Progress, Trainer
from fedpeft.prepare import local_of
from fedpeft.privacy.accountants import epsilon
from fedpeft.privacy.compatibility import check_compatible, record_level
from fedpeft.privacy.events import Repeated
from fedpeft.privacy.record_level import EXACT
from fedpeft.strategy import available, build
from fedpeft.tree import Tree
from tests.privacy.federated import (
    RECORD,
    STEP,
    flat,
    mechanism,
    play,
    prepared_of,
    recipe_of,
    replies_of,
)
from tests.tiny import LORA, tiny_network, tiny_population


def test_the_noise_of_each_size_keeps_the_run_just_within_the_budget() -> None:
    privacy = Privacy("record", epsilon=2.0, delta=1e-5)
    own = mechanism(privacy, Local(batch_size=10), rounds=4, sizes=(100, 400))
    spent = [epsilon(Repeated(own.event(n), 4), 1e-5, "prv") for n in (100, 400)]
    assert all(0.985 * 2.0 <= one <= 2.0 for one in spent), spent
    assert own.multiplier(100) > 1.1 * own.multiplier(400)


def test_a_given_multiplier_is_everybodys() -> None:
    own = mechanism(sizes=(5, 9))
    assert [own.multiplier(n) for n in (5, 9, 7)] == [1.0, 1.0, 1.0]


@pytest.mark.slow
def test_binned_sizes_are_all_on_the_safe_side() -> None:
    sizes = tuple(range(200, 200 + 23 * 40, 23))
    assert len(sizes) > EXACT
    some = [n for n in sizes if n < 320 or n > 1000]  # whole bins, and the largest size
    privacy = Privacy("record", epsilon=3.0, accountant="rdp")
    own = mechanism(privacy, Local(batch_size=16, epochs=2), rounds=3, sizes=sizes)
    spent = [epsilon(Repeated(own.event(n), 3), privacy.delta, "rdp") for n in some]
    assert max(spent) <= 3.0 and min(spent) > 2.2
    assert 2 <= len({own.multiplier(n) for n in some}) < len(some) / 2


def test_noise_does_not_depend_on_who_is_asked_for_first() -> None:
    """Guard and workers are processes of their own, and what is charged must be what is added."""
    sizes = tuple(range(200, 200 + 60 * EXACT, 30))
    privacy = Privacy("record", epsilon=3.0)
    own, other = (mechanism(privacy, Local(batch_size=16), 3, sizes) for _ in range(2))
    forth = [own.multiplier(n) for n in sizes[::6]]
    back = [other.multiplier(n) for n in sizes[::6][::-1]]
    assert forth == back[::-1] and len(set(forth)) > 1


@pytest.mark.slow
def test_few_sizes_are_each_their_own() -> None:
    sizes = tuple(range(1000, 1000 + 20 * EXACT, 20))
    own = mechanism(Privacy("record", epsilon=3.0, accountant="rdp"), sizes=sizes)
    some = (sizes[0], sizes[1], sizes[-1])
    spent = [epsilon(Repeated(own.event(n), 5), 1e-5, "rdp") for n in some]
    assert all(2.98 <= one <= 3.0 for one in spent)
    assert len({own.multiplier(n) for n in some}) == 3


# -- what leaves, and what is refused


def cohort(privacy: Privacy = RECORD, local: Local = STEP) -> TorchCohort:
    sizes = (5, 9)
    net, people = tiny_network(LORA), tiny_population(sizes)
    recipe = recipe_of(privacy=privacy, local=local)
    gradients = Gradients(
        FoldLane(net.model), net.task, people.examples, local_of(recipe), net.device
    )
    info = RoundInfo(Progress(1, 1), 0, mechanism(privacy, local, sizes=sizes))
    weights, data = torch.ones(2, dtype=torch.float64), list(people.clients)
    return TorchCohort(net, Trainer(gradients, 2), data, info, weights, ({}, Shelf()))


def start() -> Tree:
    return {n: v[None].expand(2, *v.shape).clone() for n, v in tiny_network(LORA).initial.items()}


@pytest.mark.parametrize("what", ["gradients", "losses", "weight_gradients"])
def test_nothing_but_training_is_answered(what: str) -> None:
    ask = {"gradients": cohort().gradients, "losses": cohort().losses}
    with pytest.raises(FedpeftError, match=f"clients' {what}, which no noise covers"):
        ask.get(what, cohort().weight_gradients)(start())


def test_a_number_of_steps_of_its_own_is_refused() -> None:
    """The noise is made for the recipe's."""
    with pytest.raises(FedpeftError, match="clients' steps, which no noise covers"):
        cohort().fit(start(), steps=3)


def test_a_second_training_within_a_round_is_refused() -> None:
    """The ledger is charged one: two would be twice the steps."""
    own = cohort()
    own.fit(start())
    with pytest.raises(FedpeftError, match="a second time within a round, which is not charged"):
        own.fit(start())


def test_adjust_gets_the_noised_gradient() -> None:
    """So a proximal term or a control variate is post-processing."""
    seen: list[Tree] = []

    def adjust(gradient: Tree, at: Tree, own: Any) -> Tree:
        seen.append(gradient)
        return {n: torch.zeros_like(v) for n, v in gradient.items()}

    privacy = Privacy("record", noise_multiplier=1e4, clip_norm=1.0)
    found = cohort(privacy).fit(start(), adjust=adjust).adapter
    assert all(torch.equal(found[n], v) for n, v in start().items())  # nothing was added behind it
    noise = torch.cat([v.flatten(1) for v in seen[0].values()], dim=1).double()
    share = 4 / math.sqrt(2 * noise.shape[1])
    assert float(noise[0].std()) == pytest.approx(1e4 / 5, rel=share)
    assert float(noise[1].std()) == pytest.approx(1e4 / 9, rel=share)


def test_the_loss_does_not_leave() -> None:
    prepared = prepared_of(recipe_of(privacy=RECORD))
    [reply] = replies_of(prepared, ["c0", "c1"])
    assert reply.scalars.keys() == {"weight"}
    _, reports = play(prepared)
    assert all(math.isnan(report.loss) for report in reports)
    _, plain = play(prepared_of(recipe_of()))
    assert all(math.isfinite(report.loss) for report in plain)


def test_the_loss_is_not_even_known_to_the_client() -> None:
    assert bool(torch.isnan(cohort().fit(start()).loss).all())


@pytest.mark.parametrize("name", sorted(available()))
def test_every_strategy_is_played_or_refused(name: str) -> None:
    recipe = recipe_of(name, privacy=RECORD, rounds=Rounds(count=2))
    refusal = record_level(build(name, {}))
    if refusal:
        assert "noise covers" in refusal or "prunes clients' models" in refusal
        with pytest.raises(FedpeftError, match=r"privacy\.unit=record with strategy\.name="):
            check_compatible(recipe, build(name, {}))
        return
    check_compatible(recipe, build(name, {}))
    prepared = prepared_of(recipe)
    states, reports = play(prepared)
    assert not any(report.excluded for report in reports)
    assert all(report.replied == len(prepared.population.clients) for report in reports)
    adapter = prepared.strategy.adapter(states[-1])
    assert bool(torch.isfinite(flat(adapter)).all())


def test_some_strategies_are_refused() -> None:
    assert [n for n in sorted(available()) if record_level(build(n, {}))] == [
        "fedcomloc",
        "fedspine",
        "light_peft",
        "lora_a2",
    ]
