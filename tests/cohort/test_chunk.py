"""The chunk keeps the device busy and stays within memory."""

from __future__ import annotations

import pytest

from fedpeft.cohort import chunk
from fedpeft.cohort.chunk import MOST, TOKENS, choose, estimate
from fedpeft.config import Local
from tests.tiny import LORA, tiny_network


def test_enough_tokens_but_no_more() -> None:
    net = tiny_network(LORA)
    assert choose(net, Local(batch_size=8), 32) == TOKENS["cpu"] // 256
    assert choose(net, Local(batch_size=1), 1) == MOST["cpu"]
    assert choose(net, Local(batch_size=512), 512) == 1


def test_memory_bounds_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    net, local = tiny_network(LORA), Local(batch_size=8)
    need = estimate(net, local, 32).per_client
    monkeypatch.setattr(chunk, "free_memory", lambda device: 6 * need)
    assert choose(net, local, 32) == 3  # half of what is free
    monkeypatch.setattr(chunk, "free_memory", lambda device: need // 2)
    assert choose(net, local, 32) == 1


def test_the_estimate_grows_with_rows_and_length() -> None:
    net = tiny_network(LORA)
    small = estimate(net, Local(batch_size=4), 16).per_client
    assert estimate(net, Local(batch_size=8), 16).per_client > 1.5 * small
    assert estimate(net, Local(batch_size=4), 32).per_client > 1.9 * small
