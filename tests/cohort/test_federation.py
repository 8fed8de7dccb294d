"""Cohorts in this process: memory that runs out, faulty clients, progress."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from fedpeft import tree
from fedpeft.cohort.chunk import COHORT
from fedpeft.cohort.federation import CohortFederation
from fedpeft.cohort.gradient import Gradients
from fedpeft.federation import Failure
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategy import Messages
from tests.tiny import Tiny

SIZES = tuple(3 + k % 5 for k in range(20))


def federation(tiny: Tiny, chunk: int) -> CohortFederation:
    return tiny.federation(FedAvg(), chunk)


def replies(tiny: Tiny, at: CohortFederation) -> list[Messages | Failure]:
    strategy = FedAvg()
    sent = strategy.send(strategy.init(tiny.problem), 1, tuple(at.clients()))
    return list(at.run(1, sent))


def adapters(found: list[Messages | Failure]) -> dict[str, tree.Tree]:
    stacks = [r for r in found if isinstance(r, Messages)]
    return {
        name: tree.row(stack.trees["adapter"], k)
        for stack in stacks
        for k, name in enumerate(stack.clients)
    }


def run_out_beyond(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> list[int]:
    """Steps with more than ``most`` clients in flight fail; returns all widths that were tried."""
    real, widths = Gradients.step, []

    def step(self: Gradients, matrix: torch.Tensor, *rest: Any) -> Any:
        widths.append(len(matrix))
        if len(matrix) > most:
            raise error
        return real(self, matrix, *rest)

    monkeypatch.setattr(Gradients, "step", step)
    return widths


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_clients_in_flight_and_loses_nothing(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = Tiny(SIZES)
    wanted = adapters(replies(tiny, federation(tiny, 2)))
    widths = run_out_beyond(monkeypatch, 2, error)
    at = federation(tiny, 8)
    with caplog.at_level(logging.WARNING, logger="fedpeft"):
        found = replies(tiny, at)
    assert not [r for r in found if isinstance(r, Failure)]
    assert widths[:2] == [8, 4] and set(widths[2:]) <= {1, 2}
    assert "out of memory with 8 clients in flight: going on with 4" in caplog.text
    got = adapters(found)
    assert list(got) == list(wanted)
    for name, own in wanted.items():
        assert tree.norm(tree.sub(got[name], own)) <= 1e-5 * tree.norm(own)
    replies(tiny, at)
    assert max(widths[-10:]) == 2  # it stays so in later rounds


def test_a_client_too_large_for_the_memory_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Tiny((4, 4, 40, 4))
    at = federation(tiny, 4)
    real = Gradients.step

    def step(self: Gradients, matrix: Any, layout: Any, index: Any, scale: Any) -> Any:
        if any(i in tiny.population.clients[2].train for i in index.flatten()):
            raise torch.OutOfMemoryError("too large")
        return real(self, matrix, layout, index, scale)

    monkeypatch.setattr(Gradients, "step", step)
    failed = [r for r in replies(tiny, at) if isinstance(r, Failure)]
    assert [(f.client, f.reason) for f in failed] == [("c2", "OutOfMemoryError: too large")]


def test_a_faulty_client_is_found_by_halving(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Tiny(SIZES)
    at, seen = federation(tiny, 4), []
    real = FedAvg.train

    def train(self: FedAvg, messages: Messages, cohort: Any) -> Messages:
        seen.append(len(messages))
        if "c13" in messages.clients:
            raise OSError("disk on fire")
        return real(self, messages, cohort)

    monkeypatch.setattr(FedAvg, "train", train)
    found = replies(tiny, at)
    assert [r.client for r in found if isinstance(r, Failure)] == ["c13"]
    assert len(adapters(found)) == len(SIZES) - 1
    assert len(seen) < 2 * len(SIZES) and seen[0] == len(SIZES) <= COHORT * 4


def test_every_client_is_reported_once_with_its_tokens() -> None:
    tiny, said = Tiny(SIZES), []
    at = tiny.federation(FedAvg(), 2, on_chunk=lambda n, tokens: said.append((n, tokens)))
    replies(tiny, at)
    assert [n for n, _ in said] == [1] * len(SIZES)
    assert sum(tokens for _, tokens in said) == sum(at.tokens(name) for name in at.clients())
