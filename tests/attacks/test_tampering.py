"""Who is malicious, and what leaves them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.attacks.settings import Attack
from fedpeft.attacks.tampering import (
    attackers,
    gaussian,
    little_is_enough,
    safe_z,
    scaling,
    sign_flip,
    tamper,
)
from fedpeft.errors import FedpeftError
from fedpeft.names import Names, Roster
from fedpeft.streams import torch_stream

NAMES = [f"c{k:02d}" for k in range(50)]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_attackers_are_a_share_of_the_clients_fixed_by_the_seed() -> None:
    attack = Attack("sign_flip", share=0.2)
    found = attackers(attack, NAMES, 3)
    assert len(found) == 10 and found < set(NAMES)
    assert attackers(attack, NAMES[::-1], 3) == found
    assert attackers(attack, Names.of(NAMES), 3) == found
    assert attackers(attack, Roster(Names.of(NAMES), np.ones(50, np.int64)), 3) == found
    assert attackers(attack, NAMES, 4) != found
    counts = dict.fromkeys(NAMES, 0)
    for seed in range(200):
        for name in attackers(attack, NAMES, seed):
            counts[name] += 1
    assert min(counts.values()) > 15 and max(counts.values()) < 70  # 40 expected


def test_a_positive_share_is_at_least_one_client_and_no_attack_is_nobody() -> None:
    assert len(attackers(Attack("scaling", share=0.001), NAMES, 0)) == 1
    assert attackers(Attack("scaling", share=1.0), NAMES, 0) == frozenset(NAMES)
    assert attackers(Attack("scaling", share=0.0), NAMES, 0) == frozenset()
    assert attackers(Attack("none", share=0.5), NAMES, 0) == frozenset()
    assert attackers(Attack("scaling"), [], 0) == frozenset()


def test_sign_flip_and_scaling_are_multiples() -> None:
    updates = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    assert sign_flip(updates, 10.0).tolist() == [[-10.0, 20.0], [-5.0, 0.0]]
    assert scaling(updates, 3.0).tolist() == [[3.0, -6.0], [1.5, 0.0]]


def test_gaussian_is_noise_of_the_given_deviation_and_nothing_else() -> None:
    streams = [torch_stream(0, k) for k in range(3)]
    found = gaussian(1e6 + draw(3, 20000), 0.5, streams)
    assert found.dtype == torch.float32 and found.shape == (3, 20000)
    assert found.std(dim=1).tolist() == pytest.approx([0.5] * 3, rel=0.03)
    assert float(found.mean(dim=1).abs().max()) < 0.02
    assert abs(float(torch.corrcoef(found)[0, 1])) < 0.05
    with pytest.raises(ValueError, match="shorter"):
        gaussian(draw(3, 2), 1.0, streams[:2])


def test_little_is_enough_by_hand() -> None:
    """Columns 1, 3 and 2, 2, 2, 6: means 2 and 3, deviations 1 and sqrt 3."""
    updates = torch.tensor([[1.0, 2.0], [3.0, 2.0], [1.0, 2.0], [3.0, 6.0]])
    found = little_is_enough(updates, 1.5)
    assert found.shape == updates.shape
    for row in found.tolist():
        assert row == pytest.approx([2 - 1.5, 3 - 1.5 * math.sqrt(3)])
    alone = draw(1, 4)
    assert little_is_enough(alone, 9.0).tolist() == alone.tolist()


def test_safe_z_is_the_papers() -> None:
    """n = 50, m = 24: s = 2, and 24 of 26 honest clients; z = 1.43 (arXiv 1902.06156)."""
    assert safe_z(50, 24) == pytest.approx(1.4261, abs=1e-4)
    assert safe_z(50, 10) == pytest.approx(0.2533, abs=1e-4)
    assert safe_z(3, 1) == pytest.approx(0.0, abs=1e-12)
    assert safe_z(1, 0) == 0.0
    with pytest.raises(FedpeftError, match=r"attack\.z=0: 3 malicious of 5 clients"):
        safe_z(5, 3)


def test_tamper_does_what_the_kind_says() -> None:
    updates, names = draw(3, 5), NAMES[:3]
    for kind, wanted in (
        ("none", updates),
        ("label_flip", updates),
        ("sign_flip", -4 * updates),
        ("scaling", 4 * updates),
        ("backdoor", 4 * updates),
        ("little_is_enough", little_is_enough(updates, 2.0)),
    ):
        attack = Attack(kind, factor=4.0, z=2.0, trigger=(1,))  # type: ignore[arg-type]
        assert torch.equal(tamper(attack, updates, names, 10, 0, 1), wanted), kind
    by_default = tamper(Attack("little_is_enough"), updates, names, 10, 0, 1)
    assert torch.equal(by_default, little_is_enough(updates, safe_z(10, 3)))


def test_noise_is_the_clients_own_in_any_division() -> None:
    attack, updates, names = Attack("gaussian"), draw(4, 6), NAMES[:4]
    whole = tamper(attack, updates, names, 10, seed=5, round=2)
    parts = [tamper(attack, updates[k : k + 1], names[k : k + 1], 10, 5, 2) for k in (3, 0, 2, 1)]
    assert torch.equal(torch.cat(parts), whole[[3, 0, 2, 1]])
    assert not torch.equal(tamper(attack, updates, names, 10, 5, 3), whole)
    assert not torch.equal(tamper(attack, updates, names, 10, 6, 2), whole)


def test_honest_updates_are_not_written_to() -> None:
    updates = draw(3, 5)
    before = updates.clone()
    for kind in ("sign_flip", "scaling", "gaussian", "little_is_enough"):
        tamper(Attack(kind), updates, NAMES[:3], 10, 0, 1).zero_()  # type: ignore[arg-type]
    assert torch.equal(updates, before)
