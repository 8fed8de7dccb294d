"""What adaptive servers have in common, on numbers small enough to check by hand."""

from __future__ import annotations

import pytest
import torch

from fedpeft.errors import FedpeftError
from fedpeft.server_optimizer import State, adaptive_step, start
from fedpeft.strategy import Messages


def reply(*values: float) -> Messages:
    weight = torch.arange(1.0, len(values) + 1, dtype=torch.float64)
    own = {"w": torch.tensor(values)[:, None]}
    names = tuple(f"c{k}" for k in range(len(values)))
    return Messages(names, {"adapter": own}, {"weight": weight})


def test_a_step_by_hand() -> None:
    """From w = 1, m = 0.5, v = 4: D = (1 * 2 + 2 * 5) / 3 - 1 = 3, v' = v + D = 7."""
    one = torch.ones(1, dtype=torch.float64)
    state = State({"w": torch.ones(1)}, {"w": 0.5 * one}, {"w": 4.0 * one})
    after = adaptive_step(state, iter([reply(2.0, 5.0)]), lambda v, d: v + d, 0.8, 0.1, 0.5)
    assert float(after.first["w"]) == pytest.approx(0.8 * 0.5 + 0.2 * 3)
    assert float(after.second["w"]) == pytest.approx(7.0)
    assert float(after.adapter["w"]) == pytest.approx(1 + 0.1 * 1.0 / (7**0.5 + 0.5))
    assert after.adapter["w"].dtype == torch.float32 and after.second["w"].dtype == torch.float64


def test_the_first_state_has_no_momentum_and_second_moments_of_tau_squared() -> None:
    state = start({"w": torch.full((2,), 3.0)}, 0.1, 1e-3, [0.9])
    assert state.first["w"].tolist() == [0.0, 0.0]
    assert state.second["w"].tolist() == pytest.approx([1e-6, 1e-6])
    assert state.adapter["w"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("lr", "tau", "betas", "name"),
    [(0.0, 1.0, [0.9], "lr"), (1.0, float("inf"), [0.9], "tau"), (1.0, 1.0, [0.9, 1.0], "beta2")],
)
def test_settings_out_of_range_are_named(
    lr: float, tau: float, betas: list[float], name: str
) -> None:
    with pytest.raises(FedpeftError, match=rf"strategy\.{name}="):
        start({}, lr, tau, betas)
