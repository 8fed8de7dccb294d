"""The two workloads in numbers. Data, initial values and batch order are the same for every way."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.config import Local

SEED = 0
CLASSES = 4
VOCABULARY = 8192


@dataclass(frozen=True)
class Workload:
    """One client: ``examples`` texts of ``tokens`` tokens, ``batch`` per step, one pass per round.

    The base is BERT-shaped with ``layers`` layers of width ``hidden``. There are ``population``
    clients; round r trains the ``cohort`` clients that follow those of the round before.
    overhead: a step is too small to share among threads, so one thread is tried too.
    """

    name: str
    hidden: int
    feed_forward: int
    examples: int
    tokens: int
    batch: int
    layers: int = 4
    cohort: int = 32
    population: int = 96
    overhead: bool = False

    @property
    def local(self) -> Local:
        """SGD 0.05, one pass."""
        return Local(optimizer="sgd", lr=0.05, epochs=1, batch_size=self.batch)

    @property
    def tokens_per_round(self) -> int:
        """Tokens that all clients of a round train on."""
        return self.cohort * self.examples * self.tokens


WORKLOADS = {
    w.name: w
    for w in (
        Workload("A", 256, 1024, examples=64, tokens=32, batch=8),
        Workload("B", 64, 256, examples=8, tokens=8, batch=1, overhead=True),
        Workload("tiny", 16, 32, examples=6, tokens=5, batch=2, layers=1, cohort=4, population=8),
    )
}
"""A: bound by arithmetic. B: bound by overhead. tiny: for tests of the benchmark itself."""


def client_name(client: int) -> str:
    """A client's stable name."""
    return f"client-{client:03d}"


def clients_of(workload: Workload, round: int) -> list[int]:
    """The clients of a round, which counts from 1."""
    first = (round - 1) * workload.cohort % workload.population
    return list(range(first, first + workload.cohort))
