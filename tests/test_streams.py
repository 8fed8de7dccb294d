"""Random streams: named, independent of order, of Python's hash seed and of each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.streams import derive, numpy_stream, torch_stream


def test_a_stream_is_fixed_for_ever() -> None:
    """Changing these numbers changes every run that anyone has made."""
    assert derive(0) == 4246866556266386882
    assert derive(7, "batches", "client-3", 2) == 1241604074901831064
    assert numpy_stream(7, "a").integers(0, 1000, 3).tolist() == [982, 620, 789]
    assert torch.randint(0, 1000, (3,), generator=torch_stream(7, "a")).tolist() == [263, 67, 257]


def test_seeds_fit_in_63_bits() -> None:
    seeds = [derive(k, "x") for k in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**61 and len(set(seeds)) == 200


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, "a"), (1, "a")),
        ((0, "a"), (0, "b")),
        ((0, 1), (0, "1")),
        ((0, "a", "b"), (0, "b", "a")),
        ((0, "ab", "c"), (0, "a", "bc")),
        ((0, "a"), (0, "a", "")),
        ((12, 3), (1, 23)),
        ((-1, "a"), (1, "a")),
    ],
)
def test_other_seeds_or_labels_are_other_streams(
    one: tuple[int, str], other: tuple[int, str]
) -> None:
    assert derive(*one) != derive(*other)
    assert derive(*one) == derive(*one)


def test_streams_are_fresh_and_do_not_touch_the_global_generators() -> None:
    torch.manual_seed(0)
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two = (torch.rand(4, generator=torch_stream(3, "x")) for _ in range(2))
    three, four = (numpy_stream(3, "x").random(4) for _ in range(2))
    assert torch.equal(one, two) and np.array_equal(three, four)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], legacy)
