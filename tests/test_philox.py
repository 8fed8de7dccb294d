import subprocess
import sys

import numpy as np
import pytest
import torch

from fedpeft import philox
from fedpeft.errors import FedpeftError

SEEDS = [0, 1, 0x1234567890ABCDEF, 2**64 - 1]


def as_tensor(seeds: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64))


def oracle(seed: int, stream: int, count: int) -> list[int]:
    """Figure 2 of the paper in Python's integers."""
    found: list[int] = []
    for number in range((count + 3) // 4):
        a, b, c, d = number & 0xFFFFFFFF, number >> 32, stream & 0xFFFFFFFF, stream >> 32
        low, high = seed & 0xFFFFFFFF, seed >> 32
        for _ in range(10):
            left, right = a * 0xD2511F53, c * 0xCD9E8D57
            a, b = (right >> 32) ^ b ^ low, right & 0xFFFFFFFF
            c, d = (left >> 32) ^ d ^ high, left & 0xFFFFFFFF
            low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
        found += [a, b, c, d]
    return found[:count]


def test_known_answers_of_random123() -> None:
    zero = philox.words(torch.tensor([0]), 0, 4)[0].tolist()
    assert zero == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("stream", [0, 7, 2**40 + 3])
def test_words_are_those_of_the_oracle(stream: int) -> None:
    found = philox.words(as_tensor(SEEDS), stream, 11)
    assert found.tolist() == [oracle(seed, stream, 11) for seed in SEEDS]


def test_high_counters_are_those_of_the_oracle() -> None:
    first = 4 * (2**32 - 1)  # the counter's lower half overflows within these words
    a, b = philox.words(torch.tensor([5]), 1, 8, first)[0].split(4)
    assert a.tolist() != b.tolist()
    assert torch.equal(b, philox.words(torch.tensor([5]), 1, 4, 4 * 2**32)[0])


def test_any_part_of_a_stream_by_itself() -> None:
    seeds, many = as_tensor(SEEDS), 40_000  # more than one pass
    whole = philox.words(seeds, 3, many)
    for first, count in [(0, 0), (1, 1), (3, 6), (32_765, 11), (39_999, 1)]:
        assert torch.equal(philox.words(seeds, 3, count, first), whole[:, first : first + count])
    drawn = philox.normals(seeds, 3, many)
    for first, count in [(0, 3), (1, 1), (5, 6), (39_998, 2)]:
        assert torch.equal(philox.normals(seeds, 3, count, first), drawn[:, first : first + count])


def test_rows_do_not_depend_on_each_other() -> None:
    together = philox.normals(as_tensor(SEEDS), 2, 100)
    for k, seed in enumerate(SEEDS):
        assert torch.equal(philox.normals(as_tensor([seed]), 2, 100)[0], together[k])


def test_uniform_and_normal_moments() -> None:
    flat = philox.uniforms(torch.arange(10), 0, 100_000).double()
    assert flat.min() >= 0 and flat.max() < 1
    assert abs(flat.mean() - 0.5) < 1e-3 and abs(flat.var() - 1 / 12) < 1e-3
    z = philox.normals(torch.arange(10), 0, 100_000).double()
    assert abs(z.mean()) < 4e-3 and abs(z.var() - 1) < 6e-3
    assert abs((z**4).mean() - 3) < 0.05
    products = torch.corrcoef(z) - torch.eye(10)
    assert products.abs().max() < 0.015


def test_the_table_is_normal_by_quantiles() -> None:
    table = philox.table().astype(np.float64)
    assert len(table) == 65536 and np.all(np.diff(table) > 0)
    assert np.array_equal(table, -table[::-1]) and abs(np.mean(table**2) - 1) < 1e-8


def test_another_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(philox, "_TABLE_DIGEST", "0" * 16)
    with pytest.raises(FedpeftError, match="would not mean the same"):
        philox.table.__wrapped__()


def test_chosen_places_are_even_and_ascending() -> None:
    found = philox.chosen(torch.arange(4000), 0, 10, 3)
    assert bool((found.diff(dim=1) > 0).all())
    counts = torch.bincount(found.flatten(), minlength=10)
    assert (counts.double() / 4000 - 0.3).abs().max() < 0.04
    assert philox.chosen(torch.arange(2), 0, 5, 5).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_the_same_bits_in_another_process() -> None:
    code = (
        "import torch; from fedpeft import philox; torch.set_num_threads(1);"
        "print(philox.normals(torch.tensor([9]), 4, 5).view(torch.int32).tolist())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = philox.normals(torch.tensor([9]), 4, 5).view(torch.int32).tolist()
    assert said.stdout.strip() == str(here)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_same_bits_on_a_gpu() -> None:
    seeds = as_tensor(SEEDS)
    there = seeds.cuda()
    assert torch.equal(philox.normals(there, 4, 9999).cpu(), philox.normals(seeds, 4, 9999))
    assert torch.equal(philox.chosen(there, 4, 999, 99).cpu(), philox.chosen(seeds, 4, 999, 99))
