"""Asynchronous runs: updates of clients that began from older versions of the server's model.

FedBuff (Nguyen et al., AISTATS 2022, arXiv 2106.06639) over the run's own strategy. A client trains
from the version that it was sent; its update, weighed by (1 + staleness)^-exponent, is put onto the
version that the server has when its reply counts. So the strategy receives what it would receive
from clients that began now, and its mean is w + sum_k p_k s_k d_k; that is what ``linear`` and
``shares`` ask for. Clients that begin between two versions train as one cohort.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedpeft.comms.ledger import Bytes, Entry, entries, grouped
from fedpeft.costs import Costs
from fedpeft.engine import AbortedRoundError, Books, Lost, RoundReport, intake_of, received, short
from fedpeft.errors import FedpeftError
from fedpeft.federation import Federation
from fedpeft.fleet.buffered import Arrival, Window
from fedpeft.fleet.draws import Draws
from fedpeft.fleet.jobs import BEFORE, DELIVERED, REASONS, STALE, Ends, Jobs
from fedpeft.fleet.simulator import Simulator
from fedpeft.message import Messages
from fedpeft.postprocess import Postprocessor, applied, updates
from fedpeft.prepare import Prepared
from fedpeft.still import Still
from fedpeft.strategy import Strategy, addressed
from fedpeft.tree import Tree


@dataclass(frozen=True)
class Pending:
    """A reply that is under way. move: its trees as updates, float32. each: its bytes by kind."""

    move: dict[str, Tree]
    scalars: dict[str, float]
    each: Bytes

    def memory(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {"move": self.move, "scalars": self.scalars, "each": self.each}

    @staticmethod
    def restored(memory: Mapping[str, Any]) -> Pending:
        """What ``memory`` gave."""
        return Pending(memory["move"], memory["scalars"], memory["each"])


class Windows:
    """The run's windows, from one version of the model to the next. pending: client -> reply."""

    def __init__(self, prepared: Prepared, fleet: Simulator, costs: Costs, still: Still) -> None:
        self._prepared, self._fleet, self._costs, self._still = prepared, fleet, costs, still
        self._names = prepared.population.clients.names
        self._order = Draws(prepared.recipe.seed, "start")
        self._window, self._began, self._number = Window((), (), (), {}, (), 0.0), 0.0, 0
        self.pending: dict[str, Pending] = {}
        self.line: dict[str, Any] = {}

    def begin(self, state: Any, number: int, there: np.ndarray) -> tuple[str, ...]:
        """Plays window ``number``; who begins in it, sorted."""
        strategy, fleet = self._prepared.strategy, self._fleet
        [one] = addressed(strategy, state, number, self._names[:1])
        [entry] = entries(one)
        down = float(sum(entry.each.values()))
        [reply] = entries(self._still.reply(number, one))
        up = float(sum(reply.each.values()))
        self._began, self._number = fleet.clock.now, number

        def begin(clients: np.ndarray) -> tuple[Jobs, Ends]:
            size = np.full(len(clients), up)
            efforts = strategy.efforts(state, [self._names[int(k)] for k in clients])
            work = self._costs.of(clients, {self._names.find(n): e for n, e in efforts.items()})
            jobs = fleet.jobs(clients, number, np.full(len(clients), down), size, work)
            ends = fleet.alone(jobs, number)
            fleet.charge(jobs, ends, number)
            return jobs, ends

        free = np.flatnonzero(there)
        order = free[np.argsort(self._order.uniforms(free, number)[:, 0], kind="stable")]
        self._window = fleet.buffered.window(number, order, begin)
        fleet.land(self._window)
        return tuple(sorted(self._names[k] for k in self._window.started))

    def play(
        self,
        state: Any,
        federation: Federation,
        number: int,
        names: tuple[str, ...],
        post: Postprocessor,
    ) -> tuple[Any, RoundReport]:
        """Trains who began, and takes in what has arrived; see ``fedpeft.engine.play_round``."""
        began, rounds = time.perf_counter(), self._prepared.recipe.rounds
        strategy, size = self._prepared.strategy, self._fleet.settings.buffer
        books, missed = Books([], [], {}), self._missed()
        [sent] = addressed(strategy, state, number, names or self._names[:1])
        sent = post.announce(sent)
        going = books.out([sent.rows(range(len(names)))], missed)
        intake = intake_of(strategy, going, federation.clients(), rounds, post.tells)
        fresh = list(intake.stream(federation.run(number, *going) if going else iter(())))
        books.lost |= intake.excluded
        replies = self._arrived(sent, fresh, intake.entries, books)
        post.arrived([n for one in going for n in one.clients if n not in books.lost])
        counted = {name for one in replies for name in one.clients}
        own = {self._names[one.client]: one.seconds for one in self._window.arrived}
        times = {name: seconds for name, seconds in own.items() if name in counted}
        after, why = state, ""
        if books.replied < max(1, math.ceil(rounds.quorum * size)):
            why = short(number, size, books.replied, rounds, books.lost)
        else:
            after = received(strategy, state, [sent], iter(replies), post)
            self._fleet.deliver(np.array([self._names.find(n) for n in times], np.int64))
        self.line = self._line(number, times)
        thrown = (k for k, kind in self._window.lost.items() if kind == STALE)
        lost = {*missed, *(self._names[k] for k in thrown)}
        report = books.report(number, names, lost, time.perf_counter() - began, why)
        if why:
            raise AbortedRoundError(report)
        return strategy.told(after, times), report

    def memory(self) -> dict[str, Any]:
        """Replies under way."""
        return {name: one.memory() for name, one in self.pending.items()}

    def _missed(self) -> dict[str, Lost]:
        """Who began and will not finish."""
        return {
            self._names[int(client)]: Lost(REASONS[str(kind)], str(kind) != BEFORE, int(part))
            for jobs, ends in self._window.parts
            for client, kind, good, part in zip(
                jobs.clients, ends.kind, ends.good, jobs.arrived(ends.time), strict=True
            )
            if not good
        }

    def _arrived(
        self, sent: Messages, fresh: Sequence[Messages], came: Sequence[Entry], books: Books
    ) -> list[Messages]:
        """What the strategy receives, and its books; the other replies wait until they arrive."""
        window, names = self._window, self._names
        each = {name: entry.each for entry in came for name in entry.clients}
        old = [one for one in window.arrived if names[one.client] in self.pending]
        old = sorted((one for one in old if one.version < self._number), key=lambda o: o.client)
        stale = [self.pending.pop(names[one.client]) for one in old]
        thrown = [self.pending.pop(names[k], None) for k in window.lost]
        direct = {names[one.client] for one in window.arrived if one.version == self._number}
        replies = list[Messages]()
        for stack in fresh:
            self._keep(sent, _of(stack, lambda name: name not in direct), each)
            replies.append(_of(stack, lambda name: name in direct))
        if stale:
            replies.append(self._rebased(sent, old, stale, fresh))
        replies = [one for one in replies if len(one)]
        up = [Entry((name,), own) for name, own in each.items() if name not in self.pending]
        up += [Entry((names[one.client],), p.each) for one, p in zip(old, stale, strict=True)]
        up += [
            Entry((names[k],), p.each)
            for k, p in zip(window.lost, thrown, strict=True)
            if p is not None and window.lost[k] == STALE
        ]
        books.up.extend(grouped(up))
        books.replied = sum(map(len, replies))
        told = [(one.scalars["weight"], one.scalars["loss"]) for one in replies if _tells(one)]
        weight = sum(float(own.sum()) for own, _ in told)
        if weight > 0:
            books.loss = sum(float((own * loss).sum()) for own, loss in told) / weight
        return replies

    def _keep(self, sent: Messages, later: Messages, each: Mapping[str, Bytes]) -> None:
        """Keeps replies that are under way, as updates."""
        if not len(later):
            return
        moved = updates(sent, later)
        for k, name in enumerate(later.clients):
            move = {
                part: {n: x[k].float().cpu() for n, x in own.items()} for part, own in moved.items()
            }
            self.pending[name] = Pending(move, dict(later[k].scalars), each[name])

    def _rebased(
        self,
        sent: Messages,
        old: Sequence[Arrival],
        stale: Sequence[Pending],
        fresh: Sequence[Messages],
    ) -> Messages:
        """Updates of older versions as replies to ``sent``, weighed by their staleness."""
        power = self._fleet.settings.exponent
        scale = [(1.0 + self._number - one.version) ** -power for one in old]
        moved: dict[str, Tree] = {
            part: {
                n: torch.stack(
                    [s * p.move[part][n].double() for s, p in zip(scale, stale, strict=True)]
                )
                for n in own
            }
            for part, own in stale[0].move.items()
        }
        whole = applied(sent, moved)
        like = sent.trees
        trees = {p: {n: x.to(like[p][n].dtype) for n, x in t.items()} for p, t in whole.items()}
        scalars = {
            n: torch.tensor([one.scalars[n] for one in stale], dtype=torch.float64)
            for n in stale[0].scalars
        }
        found = Messages(tuple(self._names[one.client] for one in old), trees, scalars)
        devices = [x.device for one in fresh for t in one.trees.values() for x in t.values()]
        return found.to(devices[0]) if devices else found

    def _line(self, number: int, times: Mapping[str, float]) -> dict[str, Any]:
        """The window for the record."""
        fleet, window = self._fleet, self._window
        waiting = fleet.idle_of(window, self._began)
        fleet.books.wait(waiting)
        done = [one.computed for one in window.landed]
        waste = [one.computed for one in window.landed if one.kind != DELIVERED]
        return {
            "time": fleet.clock.now,
            "seconds": fleet.clock.now - self._began,
            "idle": waiting,
            "wasted": sum(waste) / sum(done) if sum(done) else 0.0,
            "dropped": {self._names[k]: kind for k, kind in sorted(window.lost.items())},
            "times": dict(sorted(times.items())),
            "staleness": [number - one.version for one in window.arrived],
            "in_flight": len(fleet.buffered.flights),
            "digest": fleet.clock.digest,
        }


def _of(stack: Messages, wanted: Callable[[str], bool]) -> Messages:
    """The messages of the clients that are wanted."""
    return stack.rows([k for k, name in enumerate(stack.clients) if wanted(name)])


def _tells(stack: Messages) -> bool:
    return "loss" in stack.scalars


def check_asynchronous(prepared: Prepared, count: int, concurrency: int) -> None:
    """Raises FedpeftError where the recipe's strategy or numbers do not fit asynchronous rounds."""
    fleet, strategy, name = (
        prepared.recipe.fleet,
        prepared.strategy,
        prepared.recipe.strategy["name"],
    )
    if not fleet.buffer <= concurrency <= count:
        raise FedpeftError(
            f"fleet.policy={fleet.policy}: fleet.buffer={fleet.buffer} replies of {concurrency} "
            f"clients at work (fleet.concurrency, or what rounds.sampling draws) of {count}: each "
            f"must be at most the next."
        )
    if prepared.workers > 1:
        raise FedpeftError(
            f"fleet.policy={fleet.policy} with {prepared.workers} workers, which answer for many "
            f"clients with one mean: set engine.workers=1."
        )
    problem = _unfit(prepared, strategy)
    if problem:
        raise FedpeftError(
            f"strategy.name={name!r} with fleet.policy={fleet.policy}: {problem}. Updates of older "
            f"versions are put onto the newest and averaged, which is a rule for strategies of one "
            f"global adapter that average, such as fedavg, fedprox or ffa_lora: use one of these, "
            f"or fleet.policy=sync."
        )


def _unfit(prepared: Prepared, strategy: Strategy[Any]) -> str:
    """Why updates of older versions mean nothing to a strategy; empty where they do."""
    kind = type(strategy)
    if kind.groups is not Strategy.groups:
        return "it sends clients messages of different shapes"
    wanted = {"linear": True, "shares": True, "exchanges": 1}
    wanted |= dict.fromkeys(("pools", "remembers", "keeps", "folds", "walks"), False)
    for flag, value in wanted.items():
        if getattr(kind, flag) != value:
            return f"it is declared {flag}={getattr(kind, flag)}, and {flag}={value} is needed"
    names = prepared.population.clients.names[:1]
    state = strategy.init(prepared.problem)
    first, second = (strategy.send(state, number, names)[0] for number in (1, 2))
    shapes = [_shapes(own) for own in (first.trees, second.trees, strategy.expects(first))]
    if shapes[0] != shapes[1]:
        return "its messages hold other tensors from round to round"
    if shapes[2] != shapes[0]:
        return "its replies hold other tensors than it sends"
    return ""


def _shapes(trees: Mapping[str, Tree]) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(p, n): tuple(x.shape) for p, tree in trees.items() for n, x in tree.items()}
