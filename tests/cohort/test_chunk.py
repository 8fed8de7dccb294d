"""How many clients are in flight: by tokens, within memory, on a GPU by trying."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fedpeft.cohort import chunk
from fedpeft.cohort.chunk import COHORT, MARGIN, MOST, TOKENS, choose, estimate, fastest
from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import FoldLane, LoopLane
from fedpeft.config import Local
from fedpeft.data.examples import flatten
from fedpeft.model import Network
from tests.tiny import LORA, tiny_network


def gradients(network: Network, batch_size: int, tokens: int, **how: Any) -> Gradients:
    lane = FoldLane(network.model, **how)
    examples = flatten([[1] * tokens] * 4, [0] * 4, 0)
    local = Local(optimizer="sgd", batch_size=batch_size)
    return Gradients(lane, "classification", examples, local, network.device)


def test_small_steps_share_a_batch_up_to_the_token_budget() -> None:
    net = tiny_network(LORA)
    assert choose(net, gradients(net, 32, 8)) == TOKENS["cpu"] // 256
    assert choose(net, gradients(net, 1, 1)) == MOST["cpu"]
    assert choose(net, gradients(net, 512, 16)) == 1


def test_memory_bounds_the_chunk_and_one_client_always_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = tiny_network(LORA)
    at = gradients(net, 4, 8)
    need = estimate(net, at).per_client
    monkeypatch.setattr(chunk, "free_memory", lambda device: 6 * need + 1)
    assert choose(net, at) == 3  # half of what is free
    assert choose(net, at, workers=3) == 1  # in a third of it
    monkeypatch.setattr(chunk, "free_memory", lambda device: 0)
    assert choose(net, at) == 1


def test_the_loop_lane_has_one_client_in_flight() -> None:
    net = tiny_network(LORA)
    at = gradients(net, 4, 8)
    at.lane = LoopLane(net.model)
    assert choose(net, at) == 1


def test_activations_are_counted_and_the_state_is_added() -> None:
    net = tiny_network(LORA)
    state = 4 * net.layout.size * (4 + 2 * COHORT)
    few = estimate(net, gradients(net, 4, 8)).per_client - state
    assert estimate(net, gradients(net, 8, 8)).per_client - state == pytest.approx(2 * few, rel=0.1)
    assert (
        few > MARGIN["cpu"] * 32 * 16 * 4 * 8
    )  # 32 tokens, at least eight hidden vectors of floats each
    adam = gradients(net, 4, 8)
    adam.local = dataclasses.replace(adam.local, optimizer="adamw")
    assert estimate(net, adam).per_client - state == few + 2 * 4 * net.layout.size


def test_the_estimate_leaves_no_trace() -> None:
    net = tiny_network(LORA)
    before = {name: value.clone() for name, value in net.model.state_dict().items()}
    draw = torch.random.get_rng_state()
    estimate(net, gradients(net, 4, 8))
    assert torch.equal(draw, torch.random.get_rng_state())
    assert all(torch.equal(before[n], v) for n, v in net.model.state_dict().items())


def test_checkpointing_lowers_the_estimate_of_a_deep_base() -> None:
    net = tiny_network(LORA, layers=6)
    plain = estimate(net, gradients(net, 32, 8)).per_client
    assert estimate(net, gradients(net, 32, 8, checkpointing=True)).per_client < 0.6 * plain


def test_the_fastest_width_is_the_smallest_that_doubling_does_not_improve() -> None:
    tried: list[int] = []

    def saturating(width: int) -> float:
        tried.append(width)
        return max(1.0, width / 4)

    assert fastest(saturating, 64) == 4
    assert tried == [1, 2, 4, 8]
    assert fastest(lambda width: 1.0, 6) == 6  # the bound, which is no power of two
    assert fastest(float, 64) == 1


def test_the_search_ends_where_memory_does() -> None:
    def short(width: int) -> float:
        if width > 4:
            raise torch.OutOfMemoryError
        return 1.0

    assert fastest(short, 64) == 4
