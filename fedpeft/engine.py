"""The round loop: sample, send, train, check, receive. No algorithm, no transport, no files."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

from fedpeft import sampling
from fedpeft.cohort.federation import client_weights
from fedpeft.comms.ledger import PARTIAL, Bytes, Entry, entries, grouped, totals
from fedpeft.config import Rounds
from fedpeft.config_comms import size_of
from fedpeft.errors import QuorumError
from fedpeft.federation import Federation
from fedpeft.intake import Intake
from fedpeft.postprocess import NOTHING, Postprocessor
from fedpeft.strategy import Messages, Strategy, addressed
from fedpeft.tree import Tree


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round.

    sampled: clients drawn. dropped: of these, the ones that dropped out (simulated). excluded:
    client -> why its training failed or its reply was refused. replied: clients in the aggregate.
    loss: mean training loss of the replies, by weight. down, up: bytes by kind. sent, came: the
    same by client and exchange. seconds: wall time. aborted: why the round has no result, if it has
    none. zeros: clients whose update was zero; not told where noise hides the updates. figures: the
    strategy's own, of the round's aggregate.
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
    sent: tuple[Entry, ...] = ()
    came: tuple[Entry, ...] = ()
    aborted: str = ""
    zeros: tuple[str, ...] = ()
    figures: Mapping[str, float | Sequence[float]] = field(default_factory=dict)


class AbortedRoundError(QuorumError):
    """A round without a result; ``report`` says what was sent and came all the same."""

    def __init__(self, report: RoundReport) -> None:
        super().__init__(report.aborted)
        self.report = report


@dataclass(frozen=True)
class Lost:
    """A client whose reply will not count, and why. reached: whether it was sent its request.

    came: bytes of its reply that were there when it broke off.
    """

    reason: str
    reached: bool = True
    came: int = 0


class Timing(Protocol):
    """A clock under which a round is played."""

    def lost(self, state: Any, sent: Sequence[Messages]) -> Mapping[str, Lost]:
        """Plays an exchange in which ``sent`` goes out: whose replies will not be there in time."""


@dataclass(frozen=True)
class Seam:
    """What a round does beside its strategy.

    post: what is done to messages (the server's half). names: who takes part, sorted, where it is
    not for the recipe's seed to say. timing: who is in time; without one everybody is. wanted: of
    how many clients the quorum is a share, where more are asked (0: of all that are).
    """

    post: Postprocessor = NOTHING
    names: tuple[str, ...] | None = None
    timing: Timing | None = None
    wanted: int = 0


PLAIN = Seam()


def play_round(
    strategy: Strategy[Any],
    state: Any,
    federation: Federation,
    rounds: Rounds,
    seed: int,
    number: int,
    seam: Seam = PLAIN,
) -> tuple[Any, RoundReport]:
    """One round: the state after it and what happened. ``number`` counts from 1.

    seam: what is done to messages beside the algorithm, and, where the seed may not decide it, who
    takes part. A round that sampling leaves empty keeps the state, unless the seam releases
    something all the same. Raises AbortedRoundError, with the state unchanged, when fewer valid
    replies come back than ``rounds.quorum`` of the clients sampled, or than their receiver needs.
    """
    began = time.perf_counter()
    draw = partial(sampling.draw, rounds.sampling)
    names = draw(federation.clients(), seed, number) if seam.names is None else seam.names
    lost = sampling.draw_failures(rounds.failure_rate, names, seed, number)
    if not names:
        after = _nobody(strategy, state, federation, number, seam)
        seconds = time.perf_counter() - began
        return after, RoundReport(number, (), (), {}, 0, math.nan, {}, {}, seconds)
    books = Books([], [], dict.fromkeys(sorted(lost), "dropped out"))
    after, aborted = state, ""
    try:
        after = _played(strategy, state, federation, rounds, (number, names), seam, books)
    except QuorumError as error:
        aborted = str(error)
    report = books.report(number, names, lost | books.late, time.perf_counter() - began, aborted)
    if not seam.post.always:  # noise would hide the updates
        report = replace(report, zeros=tuple(sorted(books.zeros)))
    if aborted:
        raise AbortedRoundError(report)
    return after, replace(report, figures=strategy.figures(after))


def _played(
    strategy: Strategy[Any],
    state: Any,
    federation: Federation,
    rounds: Rounds,
    drawn: tuple[int, tuple[str, ...]],
    seam: Seam,
    books: Books,
) -> Any:
    """The state after all exchanges of a round. Raises QuorumError; ``state`` is then as it was.

    drawn: the round's number and clients.
    """
    number, names = drawn
    fewest = max(1, math.ceil(rounds.quorum * (seam.wanted or len(names))))
    asked = names
    for _ in range(strategy.exchanges):
        sent = [seam.post.announce(one) for one in addressed(strategy, state, number, asked)]
        going = books.out(sent, {} if seam.timing is None else seam.timing.lost(state, sent))
        intake = intake_of(strategy, going, federation.clients(), rounds, seam.post.tells)
        replies = intake.stream(federation.run(number, *going) if going else iter(()))
        try:
            state = received(strategy, state, sent, replies, seam.post)
        finally:
            books.back(intake)
        seam.post.arrived([n for one in going for n in one.clients if n not in books.lost])
        if intake.replied < fewest:
            raise QuorumError(short(number, len(names), intake.replied, rounds, books.lost))
        asked = tuple(name for name in names if name not in books.lost)
    return state


@dataclass
class Books:
    """What a round has sent and received so far.

    lost: client -> why it is in it no more. zeros: clients whose update was zero. late: those
    whom the seam's timing has lost. replied: valid replies of the last exchange.
    """

    down: list[Entry]
    up: list[Entry]
    lost: dict[str, str]
    zeros: set[str] = field(default_factory=set)
    late: set[str] = field(default_factory=set)
    replied: int = 0
    loss: float = math.nan

    def out(self, sent: Sequence[Messages], missed: Mapping[str, Lost]) -> list[Messages]:
        """Counts what is sent; the messages of the clients that are still there."""
        self.lost |= {name: one.reason for name, one in missed.items()}
        self.late |= missed.keys()
        away = {name for name, one in missed.items() if not one.reached}
        reached = [_without(stack, away) for stack in sent]
        self.down.extend(grouped(entry for stack in reached for entry in entries(stack)))
        came = (Entry((n,), {PARTIAL: one.came}) for n, one in missed.items() if one.came)
        self.up.extend(grouped(came))
        present = [_without(stack, self.lost) for stack in sent]
        return [stack for stack in present if len(stack)]

    def back(self, intake: Intake) -> None:
        """Counts what came back. The loss is that of the first exchange that trains."""
        self.up.extend(grouped(intake.entries))
        self.lost |= intake.excluded
        self.zeros |= set(intake.zeros)
        self.replied = intake.replied
        if math.isnan(self.loss) and intake.weight_sum > 0:
            self.loss = intake.loss_sum / intake.weight_sum

    def report(
        self, number: int, names: tuple[str, ...], lost: set[str], seconds: float, aborted: str
    ) -> RoundReport:
        """What happened in round ``number`` with ``names``, of whom ``lost`` dropped out."""
        return RoundReport(
            round=number,
            sampled=names,
            dropped=tuple(sorted(lost)),
            excluded={name: why for name, why in sorted(self.lost.items()) if name not in lost},
            replied=self.replied,
            loss=self.loss,
            down=totals(self.down),
            up=totals(self.up),
            seconds=seconds,
            sent=tuple(self.down),
            came=tuple(self.up),
            aborted=aborted,
        )


def _without(stack: Messages, names: Collection[str]) -> Messages:
    """The messages of the clients that are not among ``names``."""
    if not names:
        return stack
    return stack.rows([k for k, name in enumerate(stack.clients) if name not in names])


def received(
    strategy: Strategy[Any],
    state: Any,
    sent: Sequence[Messages],
    replies: Iterator[Messages],
    post: Postprocessor,
) -> Any:
    """The state after the replies to ``sent``."""
    stream = iter(post.enter(sent, strategy.expects(sent[0][0]), replies))
    first = list(islice(stream, 1))
    after = strategy.receive(state, _chain(first, stream)) if first else state
    for _ in itertools.chain(stream, replies):  # what is left unread still counts in the books
        pass
    return after


def _nobody(
    strategy: Strategy[Any], state: Any, federation: Federation, number: int, seam: Seam
) -> Any:
    """The state after a round in which nobody was drawn."""
    if not seam.post.always:
        return state
    somebody = next(iter(federation.clients()))
    for _ in range(strategy.exchanges):
        sent = [seam.post.announce(o) for o in addressed(strategy, state, number, (somebody,))]
        state = received(strategy, state, sent, iter(()), seam.post)
    return state


def intake_of(
    strategy: Strategy[Any],
    stacks: Sequence[Messages],
    sizes: Mapping[str, int],
    rounds: Rounds,
    tells: Sequence[str] = (),
) -> Intake:
    """What takes in the replies to ``stacks``; sizes: client -> number of training examples.

    tells: scalars that a reply must have beside those that the strategy reads.
    """
    like: dict[str, Mapping[str, Tree]] = {}
    weights: dict[str, float] = {}
    for stack in stacks:
        like.update(dict.fromkeys(stack.clients, strategy.expects(stack[0])))
        own = client_weights([sizes[name] for name in stack.clients], rounds)
        weights.update(zip(stack.clients, own.tolist(), strict=True))
    needed = ("weight", *strategy.tells, *tells)
    most = size_of("rounds.max_reply", rounds.max_reply)
    return Intake(like, weights, needed, stacks, rounds.reject_norm, most)


def _chain(first: list[Messages], rest: Iterator[Messages]) -> Iterator[Messages]:
    """``first``, which is emptied so that nobody keeps it, and the rest."""
    while first:
        yield first.pop()
    yield from rest


def short(
    number: int,
    asked: int,
    replied: int,
    rounds: Rounds,
    reasons: Mapping[str, str],
) -> str:
    """Why a round in which so many clients were asked is aborted."""
    some = "; ".join(f"{client}: {why}" for client, why in list(reasons.items())[:3])
    return (
        f"round {number}: {replied} valid replies of {asked} clients, fewer than "
        f"rounds.quorum={rounds.quorum} asks for ({some}). The last round's adapter is kept: "
        f"mend the clients or lower rounds.quorum, then resume."
    )
