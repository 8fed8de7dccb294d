"""A round's memory: one chunk and one running sum, however many clients there are."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.cohort.chunk import COHORT
from fedpeft.cohort.federation import CohortFederation
from fedpeft.config import Rounds, Sampling
from fedpeft.data.clients import Clients, Pieces, Population
from fedpeft.engine import RoundReport, play_round
from fedpeft.names import Names
from fedpeft.strategy import Cohort, Messages, Replies, Strategy, weighted_mean
from fedpeft.tree import Tree
from tests.tiny import Tiny

FLIGHT = 5
CHUNK = COHORT * FLIGHT  # of which the strategy sees all at once


@dataclass(frozen=True)
class Echo(Strategy[Tree]):
    """Clients reply with a copy of what they got: a round without training."""

    alive: ClassVar[weakref.WeakSet[Tensor]] = weakref.WeakSet()
    most: ClassVar[list[int]] = [0]

    def init(self, problem: object) -> Tree:
        return {}

    def send(self, state: Tree, round: int, clients: Sequence[str]) -> Messages:
        return Messages.broadcast(clients, {"adapter": state}, {"mu": 0.5})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        replies = {name: value.clone() for name, value in messages.trees["adapter"].items()}
        self.alive.update(replies.values())
        self.most[0] = max(self.most[0], sum(map(len, self.alive)) // len(replies))
        loss = torch.zeros(len(messages))
        return messages.reply({"adapter": replies}, weight=cohort.weights, loss=loss)

    def receive(self, state: Tree, replies: Replies) -> Tree:
        return weighted_mean(replies, "adapter")

    def adapter(self, state: Tree) -> Tree:
        return state


@dataclass
class Crowd:
    """A federation of many clients on the tiny model's examples."""

    clients: int
    tiny: Tiny = field(default_factory=Tiny)

    def __post_init__(self) -> None:
        count, per = len(self.tiny.population.examples), 3
        numbers = np.arange(per * self.clients) % count
        starts = np.arange(self.clients + 1)
        self.tiny.population = replace(
            self.tiny.population,
            clients=Clients(
                Names.of(f"c{i:07}" for i in range(self.clients)),
                Pieces(numbers, per * starts),
                Pieces(numbers[:0], 0 * starts),
            ),
        )
        self.federation: CohortFederation = self.tiny.federation(Echo(), chunk=FLIGHT)
        assert len(self.federation.clients()) == self.clients

    def play(self, size: int, failures: float = 0.0, kind: str = "fixed") -> RoundReport:
        rate = size / self.clients
        sampling = Sampling(kind, size=size, rate=rate)  # type: ignore[arg-type]
        rounds = Rounds(1, sampling, failure_rate=failures)
        state = self.tiny.network.initial
        _, report = play_round(Echo(), state, self.federation, rounds, 0, 1)
        return report

    def peak(self, size: int) -> int:
        """Largest memory of a round in Python and NumPy, beyond what there was before."""
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        self.play(size)
        found = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        return found


@pytest.mark.parametrize("failures", [0.0, 0.3])
def test_no_more_replies_are_alive_than_two_chunks(failures: float) -> None:
    """The one that is added up, and the one that is trained meanwhile."""
    Echo.most[0] = 0
    report = Crowd(3000).play(1000, failures)
    assert report.replied == 1000 - len(report.dropped)
    assert bool(report.dropped) == bool(failures)
    assert CHUNK <= Echo.most[0] <= 2 * CHUNK


def test_a_round_keeps_little_but_the_names_of_its_clients() -> None:
    """Ten times the cohort: less for each client more than even this tiny adapter takes."""
    crowd = Crowd(5000)
    crowd.play(10)
    small, large = crowd.peak(200), crowd.peak(2000)
    assert (large - small) / 1800 < 400 < 4 * crowd.tiny.network.layout.size


def test_a_round_does_not_walk_the_population() -> None:
    """Many times the population, the same cohort: not a byte for each client more."""
    small, large = Crowd(12_000), Crowd(300_000)
    for crowd in (small, large):
        crowd.play(10)
    assert large.peak(100) - small.peak(100) < 100_000


def test_every_chunk_lets_go_of_the_pages_that_it_read(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[Population] = []
    monkeypatch.setattr(Population, "release", lambda self: released.append(self))
    Crowd(300).play(210)
    assert len(released) == 6  # five chunks of 40, one of 10


def test_poisson_sampling_draws_one_number_for_each_client() -> None:
    crowd = Crowd(50_000)
    assert 50 < len(crowd.play(100, kind="poisson").sampled) < 150


def test_the_books_count_what_a_loop_would_count() -> None:
    crowd = Crowd(400)
    one, many = crowd.play(1), crowd.play(300, 0.3)
    assert many.down == {kind: 300 * size for kind, size in one.down.items()}
    assert many.up == {kind: many.replied * size for kind, size in one.up.items()}
