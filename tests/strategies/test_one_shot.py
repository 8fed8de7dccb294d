"""One-shot merging against the three rules in numpy, entry by entry, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedpeft.errors import FedpeftError
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.one_shot import OneShot, pcb, ties
from fedpeft.strategy import build
from tests.strategies.oracle import close, rounds_of
from tests.strategies.toy import Arrays, Present, arrays, everyone, make, play, some


def top(x: np.ndarray, count: int) -> float:
    """The ``count``-th largest number."""
    return float(np.sort(x)[-count])


def by_ties(moves: np.ndarray, p: np.ndarray, density: float) -> np.ndarray:
    m, size = moves.shape
    kept = np.array([np.where(abs(t) >= top(abs(t), round(density * size)), t, 0) for t in moves])
    merged = np.zeros(size)
    for i in range(size):
        sign = np.sign(sum(p[k] * kept[k, i] for k in range(m)))
        agree = [k for k in range(m) if kept[k, i] != 0 and np.sign(kept[k, i]) == sign]
        if agree:
            merged[i] = sum(p[k] * kept[k, i] for k in agree) / sum(p[k] for k in agree)
    return merged


def by_pcb(moves: np.ndarray, p: np.ndarray, density: float) -> np.ndarray:
    m, size = moves.shape
    balance = np.zeros_like(moves)
    for k, t in enumerate(moves):
        span = abs(t).max() - abs(t).min()
        intra = np.exp(m * ((abs(t) - abs(t).min()) / span) ** 2)
        inter = np.tanh(t * sum(m * p[j] * moves[j] for j in range(m)))
        b = intra * inter
        floor = top(b, round(density * size) + 1)
        balance[k] = np.maximum(b - floor, 0) / (b.max() - floor)
    total = sum(p[k] * balance[k] for k in range(m))
    above = sum(p[k] * balance[k] * moves[k] for k in range(m))
    return above / np.maximum(total, 1e-12)


def by_mean(moves: np.ndarray, p: np.ndarray, density: float) -> np.ndarray:
    return p @ moves


RULES = {"task_arithmetic": by_mean, "ties": by_ties, "pcb": by_pcb}


def oracle(rule: str, density: float, scale: float, rounds: int, present: Present) -> Arrays:
    def flat(w: Arrays) -> np.ndarray:
        return np.concatenate([w[n].ravel() for n in sorted(w)])

    def merge(w: Arrays, owns: list[Arrays], p: np.ndarray) -> Arrays:
        move = RULES[rule](np.array([flat(own) - flat(w) for own in owns]), p, density)
        new, first = {}, 0
        for n in sorted(w):
            part = move[first : first + w[n].size].reshape(w[n].shape)
            new[n], first = w[n] + scale * part, first + w[n].size
        return new

    return rounds_of(make(), rounds, present, merge)


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize(("density", "scale"), [(0.2, 1.0), (0.5, 0.4)])
def test_the_merge_equals_the_rule_in_numpy(
    present: Present, rule: str, density: float, scale: float
) -> None:
    strategy = build("one_shot", {"rule": rule, "density": density, "scale": scale})
    states = play(strategy, make(), 2, present, size=2).states
    for rounds in (1, 2):
        expected = oracle(rule, density, scale, rounds, present)
        assert close(states[rounds].adapter, expected, 1e-11)


def test_task_arithmetic_of_scale_one_is_fedavg() -> None:
    one, two = (play(s, make(), 1, some).states[-1] for s in (OneShot("task_arithmetic"), FedAvg()))
    assert close(one.adapter, arrays(two.adapter), 1e-14)


def test_ties_by_hand() -> None:
    """Trimmed to 2 of 4; signs +, +, none, -; what disagrees with the sign does not count."""
    moves = torch.tensor([[3.0, 2.0, 0.1, 0.2], [1.0, -0.5, 0.2, -4.0], [-1.5, 0.3, 0.2, 3.0]])
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    merged = ties(moves.double(), third, 0.5)
    assert merged.tolist() == pytest.approx([2.0, 2.0, 0.0, -4.0])
    heavy = torch.tensor([0.1, 0.1, 0.8], dtype=torch.float64)
    assert ties(moves.double(), heavy, 0.5).tolist() == pytest.approx([-1.5, 2.0, 0.0, 3.0])


def test_pcb_by_hand() -> None:
    """Two clients, three entries, two kept: the largest entry has weight 1, the floor weight 0."""
    moves = torch.tensor([[2.0, 1.0, 0.0], [2.0, -1.0, 0.0]], dtype=torch.float64)
    half = torch.full((2,), 0.5, dtype=torch.float64)
    assert pcb(moves, half, 2 / 3).tolist() == pytest.approx([2.0, 0.0, 0.0])
    moves = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.5, 0.0]], dtype=torch.float64)
    score = [
        math.exp(2 * 0.25) * math.tanh(1.5) / (math.exp(2) * math.tanh(8)),
        math.exp(2 * 0.0625) * math.tanh(0.75) / (math.exp(2) * math.tanh(8)),
    ]
    wanted = (score[0] * 1.0 + score[1] * 0.5) / sum(score)
    assert pcb(moves, half, 2 / 3).tolist() == pytest.approx([2.0, wanted, 0.0])


def test_equal_weights_give_the_authors_pcb() -> None:
    """Their code on plain sums, m clients of weight 1, with a floor in place of their quantile."""
    draw = torch.Generator().manual_seed(0)
    moves = torch.randn(4, 50, generator=draw, dtype=torch.float64)
    size = moves.abs()
    low, high = size.amin(1, keepdim=True), size.amax(1, keepdim=True)
    score = torch.exp(4 * ((size - low) / (high - low)) ** 2) * torch.tanh(moves * moves.sum(0))
    floor = score.sort(dim=1).values[:, 50 - 10 - 1 : 50 - 10]
    scale = (score.clamp(min=floor) - floor) / (score.amax(1, keepdim=True) - floor)
    wanted = (scale * moves).sum(0) / scale.sum(0).clamp(min=1e-12)
    found = pcb(moves, torch.full((4,), 0.25, dtype=torch.float64), 0.2)
    assert float((found - wanted).abs().max()) <= 1e-12


@pytest.mark.parametrize("merge", [ties, pcb])
@pytest.mark.parametrize("density", [0.01, 0.5, 1.0])
def test_clients_that_did_not_move_are_no_error(merge: object, density: float) -> None:
    moves = torch.zeros(3, 10, dtype=torch.float64)
    moves[1, 4] = 1.0
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    merged = merge(moves, third, density)  # type: ignore[operator]
    assert bool(torch.isfinite(merged).all()) and float(merged[4]) == pytest.approx(1.0)
    assert not bool(merge(0 * moves, third, density).any())  # type: ignore[operator]


@pytest.mark.parametrize("settings", [{"density": 0.0}, {"density": 1.1}, {"scale": 0.0}])
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, object]) -> None:
    with pytest.raises(FedpeftError, match=rf"strategy\.{next(iter(settings))}="):
        build("one_shot", settings)
