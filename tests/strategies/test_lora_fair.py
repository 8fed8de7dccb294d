"""LoRA-FAIR against its rule in numpy, by least squares on dense matrices, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.errors import FedpeftError
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.lora_fair import LoraFair, correct
from tests.strategies.oracle import average, close, dense, ideal, rounds_of
from tests.strategies.toy import (
    LAYERS,
    Arrays,
    Present,
    a_of,
    arrays,
    b_of,
    everyone,
    make,
    play,
    some,
)


def merge(w: Arrays, owns: list[Arrays], p: np.ndarray, ridge: float) -> Arrays:
    """[D; 0] = argmin || [A^T; sqrt(ridge) I] D^T - [E^T; 0] ||, E the dense residual."""
    new = average(owns, p)
    for layer in LAYERS:
        a, b = a_of(layer), b_of(layer)
        error = sum(p[k] * own[b] @ own[a] for k, own in enumerate(owns)) - new[b] @ new[a]
        r = len(new[a])
        left = np.vstack([new[a].T, np.sqrt(ridge) * np.eye(r)])
        right = np.vstack([error.T, np.zeros((r, len(error)))])
        new[b] = new[b] + np.linalg.lstsq(left, right, rcond=None)[0].T
    return new


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_three_rounds_equal_the_rule_in_numpy(present: Present, ridge: float) -> None:
    toy = make()
    states = play(LoraFair(ridge), toy, 3, present, size=2).states
    for rounds in (1, 2, 3):
        expected = rounds_of(make(), rounds, present, lambda w, o, p: merge(w, o, p, ridge))
        assert close(states[rounds].adapter, expected)


def residual(ridge: float | None, layer: str) -> torch.Tensor:
    """Mean of updates less the update of the aggregate, after one round; None is FedAvg."""
    toy = make()
    strategy = FedAvg() if ridge is None else LoraFair(ridge)
    adapter = arrays(play(strategy, toy, 1).states[-1].adapter)
    return torch.from_numpy(ideal(toy, toy.clients)[layer] - dense(toy, adapter)[layer])


@pytest.mark.parametrize("layer", LAYERS)
def test_the_residual_is_smaller_than_fedavgs(layer: str) -> None:
    """FR1, and the smaller the ridge, the smaller."""
    sizes = [float(residual(ridge, layer).norm()) for ridge in (0.0, 0.01, 0.1, 1.0, None)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_a_large_ridge_is_fedavg() -> None:
    """FR2."""
    one, two = (play(s, make(), present=some).states[-1] for s in (LoraFair(1e12), FedAvg()))
    assert close(one.adapter, arrays(two.adapter), 1e-12)


@pytest.mark.parametrize("layer", LAYERS)
def test_without_ridge_nothing_is_left_in_the_row_space_of_a(layer: str) -> None:
    """FR3."""
    toy = make()
    a = play(LoraFair(0.0), toy, 1).states[-1].adapter[a_of(layer)]
    assert float((residual(0.0, layer) @ a.T).norm()) <= 1e-14
    assert float((residual(None, layer) @ a.T).norm()) > 1e-5


def test_a_mean_of_a_without_full_rank_is_no_error() -> None:
    """Without ridge the smallest correction is taken: clients with opposite A leave Ā = 0."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(1, 2, 5, generator=draw, dtype=torch.float64)
    b = torch.randn(2, 4, 2, generator=draw, dtype=torch.float64)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert torch.allclose(correct(b, torch.cat([a, -a]), half, 0.0), b.mean(dim=0))


@pytest.mark.parametrize("ridge", [-1.0, float("inf")])
def test_a_ridge_out_of_range_is_refused_by_name(ridge: float) -> None:
    with pytest.raises(FedpeftError, match=r"strategy\.ridge="):
        LoraFair(ridge)
