"""Secret random numbers: of the right distribution, never twice, and never one that is infinite."""

from __future__ import annotations

import copy
import hashlib
import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from scipy import stats

from fedpeft.privacy.randomness import Randomness

KEY = bytes(range(32))
COUNT = 200_000


def _p_values(numbers: np.ndarray, law: str) -> list[float]:
    """Of Kolmogorov and Smirnov's test on each hundredth: themselves uniform if the law holds."""
    return [stats.kstest(part, law).pvalue for part in np.split(numbers, 100)]


def test_normals_are_normal() -> None:
    found = Randomness(KEY, True).normal(COUNT)
    assert found.dtype == torch.float64
    own = found.numpy()
    assert stats.kstest(_p_values(own, "norm"), "uniform").pvalue > 0.01
    assert abs(own.mean()) < 4 / math.sqrt(COUNT)
    assert own.var() == pytest.approx(1, abs=4 * math.sqrt(2 / COUNT))
    assert stats.skew(own) == pytest.approx(0, abs=4 * math.sqrt(6 / COUNT))
    assert stats.kurtosis(own) == pytest.approx(0, abs=4 * math.sqrt(24 / COUNT))
    assert np.abs(own).max() > 4  # tails are not cut off


def test_uniforms_are_uniform_and_independent() -> None:
    found = Randomness(KEY, True).uniform(COUNT)
    assert stats.kstest(_p_values(found, "uniform"), "uniform").pvalue > 0.01
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 4 / math.sqrt(COUNT)


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_uniforms_lie_strictly_inside(byte: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of zeros and of ones alone, which are as likely as any others."""
    monkeypatch.setattr(Randomness, "_bytes", lambda self, count: byte * count)
    one = Randomness(KEY, True)
    assert 0 < one.uniform(1)[0] < 1
    assert bool(torch.isfinite(one.normal(1)).all())


def test_the_grid_is_symmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    both = np.concatenate([words, ~words]).astype("<u8").tobytes()
    monkeypatch.setattr(Randomness, "_bytes", lambda self, count: both[:count])
    found = Randomness(KEY, True).uniform(2000)
    assert np.array_equal(found[:1000], 1 - found[1000:])


def test_it_is_chacha20_under_a_key_of_its_own_for_each_stream() -> None:
    own = hashlib.blake2b(b"1", key=KEY, digest_size=32).digest()
    stream = Cipher(ChaCha20(own, bytes(16)), mode=None).encryptor().update(bytes(8))
    word = int(np.floor(Randomness(KEY, True).uniform(1)[0] * 2**52))
    assert word == int.from_bytes(stream, "little") >> 12


def test_no_number_comes_twice() -> None:
    one = Randomness(KEY, True)
    found = [one.uniform(500), *(one.uniform(5) for _ in range(99))]
    found.append(torch.special.ndtr(one.normal(20, 25)).numpy().ravel())
    seen = Counter(np.round(np.concatenate(found), 9).tolist())
    assert max(seen.values()) == 1 and len(seen) == 500 + 495 + 500


def test_a_seed_repeats_and_is_not_safe() -> None:
    a, b, c = Randomness.seeded(3), Randomness.seeded(3), Randomness.seeded(4)
    assert not a.safe
    first, second = a.normal(4, 2), a.normal(8)
    assert torch.equal(b.normal(4, 2), first) and torch.equal(b.normal(8), second)
    assert not torch.equal(c.normal(4, 2), first)


def test_secure_numbers_cannot_be_repeated_or_read_off() -> None:
    a, b = Randomness.secure(), Randomness.secure()
    assert a.safe and len(a.key) == 32 and a.key != b.key
    assert not torch.equal(a.normal(8), b.normal(8))
    assert a.key.hex() not in repr(a) and str(a.key) not in repr(a)


def test_global_generators_have_no_part_in_it() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        found.append(Randomness.secure().normal(8))
    assert not torch.equal(*found)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_is_not_copied(duplicate: object) -> None:
    assert callable(duplicate)
    with pytest.raises(TypeError, match="would repeat its numbers"):
        duplicate(Randomness.secure())
