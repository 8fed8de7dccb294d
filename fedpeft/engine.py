"""The round loop: sample, send, train, check, receive. No algorithm, no transport, no files."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fedpeft import sampling
from fedpeft.cohort.federation import client_weights
from fedpeft.comms.ledger import Bytes, total_bytes
from fedpeft.config import Rounds
from fedpeft.errors import QuorumError
from fedpeft.federation import Federation
from fedpeft.intake import Intake
from fedpeft.strategy import Messages, Strategy, addressed
from fedpeft.tree import Tree


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round.

    sampled: clients drawn. dropped: of these, the ones that dropped out (simulated). excluded:
    client -> why its training failed or its reply was refused. replied: clients in the aggregate.
    loss: mean training loss of the replies, by weight. down, up: bytes by kind. seconds: wall time.
    """

    round: int
    sampled: tuple[str, ...]
    dropped: tuple[str, ...]
    excluded: dict[str, str]
    replied: int
    loss: float
    down: Bytes
    up: Bytes
    seconds: float


def play_round(
    strategy: Strategy[Any],
    state: Any,
    federation: Federation,
    rounds: Rounds,
    seed: int,
    number: int,
) -> tuple[Any, RoundReport]:
    """One round: the state after it and what happened. ``number`` counts from 1.

    A round that Poisson sampling leaves empty keeps the state. Raises QuorumError when fewer valid
    replies come back than ``rounds.quorum`` of the clients sampled; the state is then unchanged.
    """
    began = time.perf_counter()
    names = sampling.draw(rounds.sampling, federation.clients(), seed, number)
    lost = sampling.draw_failures(rounds.failure_rate, names, seed, number)
    if not names:
        empty = RoundReport(number, (), (), {}, 0, math.nan, {}, {}, time.perf_counter() - began)
        return state, empty
    after, books = state, _Books({}, {}, dict.fromkeys(sorted(lost), "dropped out"))
    asked: tuple[str, ...] = names
    for _ in range(strategy.exchanges):
        sent = addressed(strategy, after, number, asked)
        after, intake = _exchange(strategy, after, federation, rounds, number, books.out(sent))
        books.back(intake)
        if intake.replied < max(1, math.ceil(rounds.quorum * len(names))):
            raise QuorumError(_short(number, names, intake.replied, rounds, books.lost))
        asked = tuple(name for name in names if name not in books.lost)
    report = RoundReport(
        round=number,
        sampled=names,
        dropped=tuple(sorted(lost)),
        excluded={name: why for name, why in sorted(books.lost.items()) if name not in lost},
        replied=intake.replied,
        loss=books.loss,
        down=books.down,
        up=books.up,
        seconds=time.perf_counter() - began,
    )
    return after, report


@dataclass
class _Books:
    """What a round has sent and received so far, by kind; client -> why it is in it no more."""

    down: Bytes
    up: Bytes
    lost: dict[str, str]
    loss: float = math.nan

    def out(self, sent: Sequence[Messages]) -> list[Messages]:
        """Counts what is sent; the messages of the clients that are still there."""
        _add(self.down, total_bytes(sent))
        present = [
            stack.rows([k for k, name in enumerate(stack.clients) if name not in self.lost])
            for stack in sent
        ]
        return [stack for stack in present if len(stack)]

    def back(self, intake: Intake) -> None:
        """Counts what came back. The loss is that of the first exchange that trains."""
        _add(self.up, intake.up)
        self.lost |= intake.excluded
        if math.isnan(self.loss) and intake.weight_sum > 0:
            self.loss = intake.loss_sum / intake.weight_sum


def _add(books: Bytes, more: Bytes) -> None:
    for kind, size in more.items():
        books[kind] = books.get(kind, 0) + size


def _exchange(
    strategy: Strategy[Any],
    state: Any,
    federation: Federation,
    rounds: Rounds,
    number: int,
    stacks: Sequence[Messages],
) -> tuple[Any, Intake]:
    """The state after the replies to ``stacks``, and what the intake counted."""
    intake = intake_of(strategy, stacks, federation.clients(), rounds)
    stream = intake.stream(federation.run(number, *stacks) if stacks else iter(()))
    first = list(islice(stream, 1))
    after = strategy.receive(state, _chain(first, stream)) if first else state
    for _ in stream:  # whatever the strategy left unread still counts in the books
        pass
    return after, intake


def intake_of(
    strategy: Strategy[Any], stacks: Sequence[Messages], sizes: Mapping[str, int], rounds: Rounds
) -> Intake:
    """What takes in the replies to ``stacks``; sizes: client -> number of training examples."""
    like: dict[str, Mapping[str, Tree]] = {}
    weights: dict[str, float] = {}
    for stack in stacks:
        like.update(dict.fromkeys(stack.clients, strategy.expects(stack[0])))
        own = client_weights([sizes[name] for name in stack.clients], rounds)
        weights.update(zip(stack.clients, own.tolist(), strict=True))
    return Intake(like, weights)


def _chain(first: list[Messages], rest: Iterator[Messages]) -> Iterator[Messages]:
    """``first``, which is emptied so that nobody keeps it, and the rest."""
    while first:
        yield first.pop()
    yield from rest


def _short(
    number: int,
    names: tuple[str, ...],
    replied: int,
    rounds: Rounds,
    reasons: Mapping[str, str],
) -> str:
    some = "; ".join(f"{client}: {why}" for client, why in list(reasons.items())[:3])
    return (
        f"round {number}: {replied} valid replies of {len(names)} clients, fewer than "
        f"rounds.quorum={rounds.quorum} asks for ({some}). The last round's adapter is kept: "
        f"mend the clients or lower rounds.quorum, then resume."
    )
