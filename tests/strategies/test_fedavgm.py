"""FedAvgM against its rule in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.errors import FedpeftError
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.fedavgm import FedAvgM
from fedpeft.strategy import build
from tests.strategies.oracle import average, close, rounds_of
from tests.strategies.toy import Arrays, Present, everyone, make, play, some


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(("lr", "beta"), [(1.0, 0.9), (0.3, 0.5)])
def test_three_rounds_equal_the_rule_in_numpy(
    present: Present, lora: bool, lr: float, beta: float
) -> None:
    toy = make(lora=lora)
    states = play(FedAvgM(lr, beta), toy, 3, present, size=2).states
    for rounds in (1, 2, 3):
        v: Arrays = {n: np.zeros(x.shape) for n, x in toy.initial.items()}

        def merge(w: Arrays, owns: list[Arrays], p: np.ndarray, v: Arrays = v) -> Arrays:
            mean = average(owns, p)
            v.update({n: beta * v[n] + mean[n] - w[n] for n in w})
            return {n: w[n] + lr * v[n] for n in w}

        assert close(states[rounds].adapter, rounds_of(toy, rounds, present, merge))


def test_without_momentum_and_with_step_one_it_is_fedavg() -> None:
    one = play(FedAvgM(1.0, 0.0), make(), present=some).states[-1].adapter
    two = play(FedAvg(), make(), present=some).states[-1].adapter
    assert close(one, {n: x.numpy() for n, x in two.items()}, 1e-14)


def test_momentum_goes_on_when_clients_stand_still() -> None:
    toy, strategy = make(), FedAvgM()
    played = play(strategy, toy, 1)
    toy.lr = 0.0
    state = played.states[-1]
    sent = strategy.send(state, 2, toy.clients)
    after = strategy.receive(state, iter([strategy.train(sent, toy.cohort(toy.clients))]))
    for name, before in state.adapter.items():
        first = before - toy.initial[name]
        assert float((after.adapter[name] - before - 0.9 * first).abs().max()) <= 1e-14


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"beta": 1.0}, {"beta": -0.1}])
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, object]) -> None:
    with pytest.raises(FedpeftError, match=rf"strategy\.{next(iter(settings))}="):
        build("fedavgm", settings)
