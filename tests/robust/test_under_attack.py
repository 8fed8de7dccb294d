"""Robust rules do their work: logistic regression by federated averaging, some clients hostile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from fedpeft.attacks.settings import Attack
from fedpeft.attacks.tampering import attackers, tamper
from fedpeft.robust.rules import combine
from fedpeft.robust.settings import Robust, Rule

CLIENTS, CLASSES, WIDTH, EACH = 25, 4, 10, 60
NAMES = [f"c{k:02d}" for k in range(CLIENTS)]
HOSTILE = 5


@dataclass(frozen=True)
class Data:
    """x ``[..., n, WIDTH]``, y ``[..., n]``, with a leading [CLIENTS] for the clients."""

    x: Tensor
    y: Tensor


@cache
def blobs() -> tuple[Tensor, Data]:
    """A class's centre for each class, and 2000 test examples around them."""
    stream = torch.Generator().manual_seed(0)
    centres = 0.7 * torch.randn(CLASSES, WIDTH, generator=stream)
    y = torch.randint(CLASSES, (2000,), generator=stream)
    return centres, Data(centres[y] + torch.randn(2000, WIDTH, generator=stream), y)


def clients(skewed: bool) -> Data:
    """Classes at random, or one class per client."""
    stream = torch.Generator().manual_seed(1)
    y = torch.randint(CLASSES, (CLIENTS, EACH), generator=stream)
    if skewed:
        y = (torch.arange(CLIENTS) % CLASSES)[:, None].expand(CLIENTS, EACH)
    return Data(blobs()[0][y] + torch.randn(CLIENTS, EACH, WIDTH, generator=stream), y)


def trained(weights: Tensor, data: Data) -> Tensor:
    """Five gradient steps from ``[(WIDTH + 1) * CLASSES]``: the updates ``[K, P]``."""
    one = torch.cat([data.x, torch.ones_like(data.x[..., :1])], dim=-1)
    target = torch.nn.functional.one_hot(data.y, CLASSES).float()
    own = weights.view(WIDTH + 1, CLASSES).expand(len(one), -1, -1)
    start = own
    for _ in range(5):
        own = own - 0.2 * one.mT @ ((one @ own).softmax(-1) - target) / one.shape[1]
    return (own - start).flatten(1)


def accuracy(settings: Robust, attack: Attack, skewed: bool = False) -> float:
    """In per cent on the test set, after 15 rounds of all clients."""
    bad = attackers(attack, NAMES, seed=0)
    index = [k for k, name in enumerate(NAMES) if name in bad]
    data, test = clients(skewed), blobs()[1]
    if attack.kind == "label_flip":
        y = data.y.clone()
        y[index] = CLASSES - 1 - y[index]
        data = Data(data.x, y)
    root = Data(test.x[None, :100], test.y[None, :100])
    weights = torch.zeros((WIDTH + 1) * CLASSES)
    for number in range(1, 16):
        sent = trained(weights, data)
        if index:
            own = [NAMES[k] for k in index]
            sent[index] = tamper(attack, sent[index], own, CLIENTS, 0, number)
        step = combine(settings, sent, root=trained(weights, root)[0])
        weights = weights + step.float()
    one = torch.cat([test.x, torch.ones_like(test.x[:, :1])], dim=1)
    scores = one @ weights.view(WIDTH + 1, CLASSES)
    return 100 * float((scores.argmax(1) == test.y).float().mean())


ROBUST: dict[Rule, Robust] = {
    "norm_clip": Robust("norm_clip"),
    "median": Robust("median", HOSTILE),
    "trimmed_mean": Robust("trimmed_mean", HOSTILE, trim=0.2),
    "krum": Robust("krum", HOSTILE),
    "multi_krum": Robust("multi_krum", HOSTILE),
    "bulyan": Robust("bulyan", HOSTILE),
    "geometric_median": Robust("geometric_median", HOSTILE),
    "fltrust": Robust("fltrust"),
}


def lost(settings: Robust, attack: Attack) -> float:
    """Points of accuracy below the mean of honest clients."""
    return accuracy(Robust(), Attack()) - accuracy(settings, attack)


SIGN_FLIP = Attack("sign_flip", share=0.2, factor=10.0)


def test_the_mean_collapses_under_sign_flips_of_a_fifth() -> None:
    assert len(attackers(SIGN_FLIP, NAMES, 0)) == HOSTILE
    assert accuracy(Robust(), Attack()) > 80
    assert lost(Robust(), SIGN_FLIP) > 50


@pytest.mark.parametrize("rule", [rule for rule in ROBUST if rule != "krum"])
def test_robust_rules_lose_less_than_two_points_under_sign_flips_of_a_fifth(rule: Rule) -> None:
    assert lost(ROBUST[rule], SIGN_FLIP) < 2


def test_krum_pays_for_listening_to_one_client_with_or_without_attack() -> None:
    """3 points here, for the noise of 60 examples in place of 1500."""
    assert 1 < lost(ROBUST["krum"], Attack()) < 5
    assert 1 < lost(ROBUST["krum"], SIGN_FLIP) < 5


@pytest.mark.parametrize(
    "attack",
    [Attack("scaling", factor=100.0), Attack("gaussian", std=100.0), Attack("label_flip")],
    ids=lambda attack: attack.kind,
)
def test_robust_rules_bear_attacks_that_the_mean_does_not(attack: Attack) -> None:
    assert lost(Robust(), attack) > 2
    for rule, settings in ROBUST.items():
        assert rule == "krum" or lost(settings, attack) < 2, rule


def test_without_attack_and_with_one_class_per_client_robust_rules_cost_accuracy() -> None:
    plain = accuracy(Robust(), Attack(), skewed=True)
    assert plain > 80
    cost = {rule: plain - accuracy(own, Attack(), skewed=True) for rule, own in ROBUST.items()}
    assert cost["krum"] > 40 and cost["bulyan"] > 10 and cost["multi_krum"] > 5
    assert cost["median"] > 2 and cost["trimmed_mean"] > 1 and cost["geometric_median"] > 1
