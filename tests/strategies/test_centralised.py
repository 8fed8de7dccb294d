"""Centralised training against its rule in numpy: local training on the one pool, every round."""

from __future__ import annotations

import pytest

from fedpeft.strategies.centralised import Centralised
from tests.strategies.toy import arrays, make, play


@pytest.mark.parametrize("lora", [True, False])
def test_three_rounds_equal_the_rule_in_numpy(lora: bool) -> None:
    toy = make(1, lora=lora)
    (pool,) = toy.clients
    toy.steps[pool], toy.weights[pool] = 5, 123.0
    states = play(Centralised(), toy).states
    w = arrays(toy.initial)
    for state in states[1:]:
        for _ in range(toy.steps[pool]):
            gradient = toy.gradient(pool, w)
            w = {name: value - toy.lr * gradient[name] for name, value in w.items()}
        for name, value in w.items():
            assert abs(state.adapter[name].numpy() - value).max() <= 1e-12


def test_it_asks_for_the_pool_of_all_data() -> None:
    assert Centralised.pools and not Centralised.remembers
