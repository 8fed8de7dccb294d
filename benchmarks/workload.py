"""The workloads in numbers. Data, initial values and batch order are the same for every way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fedpeft.config import Local

SEED = 0
CLASSES = 4


@dataclass(frozen=True)
class Workload:
    """One client: ``examples`` texts of ``tokens`` tokens, ``batch`` per step, one pass per round.

    There are ``population`` clients; round r trains the ``cohort`` clients that follow those of the
    round before. The base has ``layers`` layers of width ``hidden``, and is a BERT that classifies
    or a Llama that predicts the next token (``kv_heads`` heads of keys and values, embeddings
    tied).
    rank: of LoRA; alpha is twice as much. precision: of autocast; under bf16 the base is held in
    bf16 too. overhead: a step is too small to share among threads, so one thread is tried too.
    batches: sizes of which the centralised run's best counts. actors: concurrent clients per GPU,
    of which the best of Flower's simulation counts.
    """

    name: str
    hidden: int
    feed_forward: int
    examples: int
    tokens: int
    batch: int
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    vocabulary: int = 8192
    rank: int = 8
    cohort: int = 32
    population: int = 96
    overhead: bool = False
    base: Literal["bert", "llama"] = "bert"
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    batches: tuple[int, ...] = (32, 64, 128)
    actors: tuple[int, ...] = ()

    @property
    def local(self) -> Local:
        """SGD 0.05, one pass."""
        return Local(
            optimizer="sgd", lr=0.05, epochs=1, batch_size=self.batch, precision=self.precision
        )

    @property
    def task(self) -> Literal["classification", "causal_lm"]:
        """A BERT classifies, a Llama predicts the next token."""
        return "classification" if self.base == "bert" else "causal_lm"

    @property
    def targets(self) -> tuple[str, ...]:
        """The modules that have LoRA: query and value, or all linear layers."""
        if self.base == "bert":
            return ("query", "value")
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")
        return (*attention, "gate_proj", "up_proj", "down_proj")

    @property
    def tokens_per_round(self) -> int:
        """Tokens that all clients of a round train on."""
        return self.cohort * self.examples * self.tokens

    def shrunk(self) -> Workload:
        """The same, so small and on the CPU that every command can be tried."""
        return replace(
            self,
            name=f"{self.name}-small",
            hidden=32,
            feed_forward=48,
            layers=2,
            heads=4,
            kv_heads=2,
            vocabulary=64,
            rank=2,
            examples=4,
            tokens=6,
            batch=2,
            cohort=4,
            population=4,
            device="cpu",
            batches=(8,),
            actors=(),
        )


ON_CPU = (
    Workload("A", 256, 1024, examples=64, tokens=32, batch=8),
    Workload("B", 64, 256, examples=8, tokens=8, batch=1, overhead=True),
    Workload(
        "C",
        hidden=384,
        feed_forward=1536,
        layers=6,
        heads=12,
        examples=48,
        tokens=64,
        batch=16,
        cohort=8,
        population=24,
    ),
)
"""A: bound by arithmetic. B: bound by overhead. C: MiniLM's shape."""

ON_GPU = (
    Workload(
        "bert-mini",
        hidden=256,
        feed_forward=1024,
        vocabulary=30522,
        examples=64,
        tokens=64,
        batch=8,
        cohort=256,
        population=256,
        device="cuda",
        precision="bf16",
        batches=(256, 1024, 4096),
        actors=(1, 4, 8, 12),
    ),
    Workload(
        "llama-1b",
        hidden=2048,
        feed_forward=8192,
        layers=16,
        heads=32,
        kv_heads=8,
        vocabulary=128256,
        rank=16,
        examples=4,
        tokens=512,
        batch=4,
        cohort=64,
        population=64,
        base="llama",
        device="cuda",
        precision="bf16",
        batches=(4, 8, 16, 32),
        actors=(1, 2, 4),
    ),
)
"""bert-mini: many small clients. llama-1b: Llama-3.2-1B's shape, one step per client."""

TINY = Workload("tiny", 16, 32, examples=6, tokens=5, batch=2, layers=1, cohort=4, population=8)
"""For tests of the benchmark itself."""

WORKLOADS = {w.name: w for w in (*ON_CPU, *ON_GPU, *(w.shrunk() for w in ON_GPU), TINY)}


def client_name(client: int) -> str:
    """A client's stable name."""
    return f"client-{client:03d}"


def clients_of(workload: Workload, round: int) -> list[int]:
    """The clients of a round, which counts from 1."""
    first = (round - 1) * workload.cohort % workload.population
    return list(range(first, first + workload.cohort))
