"""Shards are near the best division, and depend on nothing but clients, costs and workers."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from fedpeft.workers.shards import divide


def loads(shards: list[list[int]], costs: list[float]) -> list[float]:
    return [sum(costs[k] for k in shard) for shard in shards]


def test_longest_first_each_to_the_least_loaded() -> None:
    names, costs = ["a", "b", "c", "d", "e"], [2.0, 7.0, 3.0, 4.0, 5.0]
    assert divide(names, costs, 2) == [[1, 2], [0, 3, 4]]  # 7; 5 + 4; 7 + 3; 5 + 4 + 2


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_every_client_is_in_one_shard_and_none_is_empty(workers: int) -> None:
    stream = np.random.default_rng(workers)
    for count in (1, 2, 7, 40):
        costs = stream.integers(0, 5, count).astype(float).tolist()
        shards = divide([f"c{k}" for k in range(count)], costs, workers)
        assert sorted(itertools.chain(*shards)) == list(range(count))
        assert all(shard == sorted(shard) for shard in shards) and all(shards)
        assert len(shards) <= workers


def test_ties_go_by_name_and_the_order_of_clients_does_not_matter() -> None:
    names = [f"c{k}" for k in range(12)]
    cost = dict(
        zip(names, [3.0, 3.0, 3.0, 3.0, 1.0, 1.0, 2.0, 2.0, 2.0, 5.0, 5.0, 1.0], strict=True)
    )
    wanted = {frozenset(names[k] for k in s) for s in divide(names, list(cost.values()), 3)}
    for seed in range(5):
        mixed = random.Random(seed).sample(names, len(names))
        found = divide(mixed, [cost[name] for name in mixed], 3)
        assert {frozenset(mixed[k] for k in shard) for shard in found} == wanted


def test_the_busiest_worker_is_within_grahams_bound_of_the_best() -> None:
    stream = np.random.default_rng(0)
    for workers in (2, 3):
        for _ in range(20):
            costs = stream.exponential(1.0, 7).tolist()
            found = max(loads(divide([f"c{k}" for k in range(7)], costs, workers), costs))
            best = min(
                max(
                    sum(c for c, w in zip(costs, at, strict=True) if w == worker)
                    for worker in range(workers)
                )
                for at in itertools.product(range(workers), repeat=7)
            )
            assert found <= best * (4 / 3 - 1 / (3 * workers)) + 1e-12
