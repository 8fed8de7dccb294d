"""FedYogi against its rule in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.errors import FedpeftError
from fedpeft.strategies.fedadam import FedAdam
from fedpeft.strategies.fedyogi import FedYogi
from fedpeft.strategy import build
from tests.strategies.oracle import average, close, rounds_of
from tests.strategies.toy import Arrays, Present, arrays, everyone, make, play, some


def oracle(strategy: FedYogi, rounds: int, present: Present, lora: bool = True) -> Arrays:
    toy = make(lora=lora)
    m = {n: np.zeros(x.shape) for n, x in toy.initial.items()}
    v = {n: np.full(x.shape, strategy.tau**2) for n, x in toy.initial.items()}

    def merge(w: Arrays, owns: list[Arrays], p: np.ndarray) -> Arrays:
        mean, new = average(owns, p), {}
        for n in w:
            d = mean[n] - w[n]
            m[n] = strategy.beta1 * m[n] + (1 - strategy.beta1) * d
            v[n] = v[n] - (1 - strategy.beta2) * d**2 * np.sign(v[n] - d**2)
            new[n] = w[n] + strategy.lr * m[n] / (np.sqrt(v[n]) + strategy.tau)
        return new

    return rounds_of(toy, rounds, present, merge)


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("strategy", [FedYogi(), FedYogi(0.1, 0.5, 0.8, 0.05)])
def test_three_rounds_equal_the_rule_in_numpy(
    present: Present, lora: bool, strategy: FedYogi
) -> None:
    states = play(strategy, make(lora=lora), 3, present, size=2).states
    for rounds in (1, 2, 3):
        assert close(states[rounds].adapter, oracle(strategy, rounds, present, lora))


def test_a_first_step_is_bounded_whatever_clients_did() -> None:
    """By lr (1 - beta1) / sqrt(1 - beta2) = lr for the defaults."""
    toy = make()
    toy.targets = {c: {n: 1e6 * x for n, x in own.items()} for c, own in toy.targets.items()}
    adapter = play(FedYogi(lr=0.01), toy, 1).states[-1].adapter
    moves = [abs(adapter[n].numpy() - x).max() for n, x in arrays(toy.initial).items()]
    assert 0.0099 < max(moves) <= 0.01 + 1e-9


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"tau": 0.0}, {"beta1": 1.0}, {"beta2": -0.1}])
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, object]) -> None:
    strategy = build("fedyogi", settings)
    with pytest.raises(FedpeftError, match=rf"strategy\.{next(iter(settings))}="):
        strategy.init(make().problem())


def test_the_second_moment_falls_slower_than_adams_after_a_large_move() -> None:
    """One round of large moves, then rounds without any: Yogi's v stays, Adam's decays."""
    yogi, adam = FedYogi(), FedAdam()
    states = []
    for strategy in (yogi, adam):
        toy = make()
        state = play(strategy, toy, 1).states[-1]
        toy.lr = 0.0
        for number in (2, 3):
            sent = strategy.send(state, number, toy.clients)
            state = strategy.receive(state, iter([strategy.train(sent, toy.cohort(toy.clients))]))
        states.append(state)
    for name in states[0].second:
        assert bool((states[0].second[name] >= states[1].second[name]).all())
    assert any(bool((states[0].second[n] > states[1].second[n]).any()) for n in states[0].second)
