"""The privacy ledger: what was released of whom, on disk before it is released.

One line per charge, in a chain of hashes (see ``chain``)::

    {"sha256": ..., "previous": ..., "round": 3, "note": "", "charges": [[event, [client, ...]]]}

``charge`` returns when the line is on the device. So a whole line stands for a release that may
have left, and is spent whether it did or not; a last line that broke off was never followed by a
release, and is cut off when the file is opened.

The budget is not in the file, which holds what happened: any accountant can price it later. A
client's spending is the composition of its own events; other clients' do not matter to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from fedpeft.errors import FedpeftError
from fedpeft.privacy.accountants import Accountant, check_accountant, check_delta, epsilon_of
from fedpeft.privacy.calibrate import affordable_of
from fedpeft.privacy.chain import Chain
from fedpeft.privacy.events import (
    Event,
    History,
    as_json,
    from_json,
    history,
    join,
    unflatten,
)

SCHEMA = 1
_HEADER = {"kind": "fedpeft privacy ledger", "schema": SCHEMA}


@dataclass(frozen=True)
class Budget:
    """What may be spent on one client.

    epsilon: positive; infinite where spending is only recorded. delta: in (0, 1), for each client.
    accountant: which one prices what was spent.
    """

    epsilon: float
    delta: float
    accountant: Accountant = "prv"

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise FedpeftError(
                f"epsilon={self.epsilon} must be positive, or infinite to record without a limit."
            )
        check_delta(self.delta)
        check_accountant(self.accountant)


class BudgetError(FedpeftError):
    """A release that would take a client over its budget. Nothing was charged."""


@final
class Ledger:
    """An open ledger; made by ``open``, to be closed, or used in ``with``.

    While it is open no other process can open it. It is not for several threads.
    """

    def __init__(self, chain: Chain, budget: Budget) -> None:
        self.budget = budget
        self._chain = chain
        self._spent: dict[str, History] = {}
        self._last = 0
        self._known: list[History] = []

    @staticmethod
    def open(path: Path, budget: Budget, head: str | None = None) -> Ledger:
        """The ledger at ``path``, verified line by line; a new one where there is no file.

        head: the ``head`` of an earlier time (a checkpoint's), which the file must hold: a chain
        cannot show by itself that whole lines are missing at its end. The file is readable by its
        owner only. A last line that broke off is cut, with a warning in the log.

        Raises FedpeftError, with the line's number, where the file is not as it was written; where
        it does not hold ``head``; where another process has it open; where writing fails.
        """
        chain = Chain(path, _HEADER)
        try:
            ledger = Ledger(chain, budget)
            for number, fields in chain.replay():
                ledger._take(f"{path}, line {number}", fields)
            if head is not None and not chain.holds(head):
                raise FedpeftError(
                    f"{path} does not hold the line {head[:16]!r}..., which was written: lines are "
                    "missing at its end, or it is another run's. Restore the file."
                )
        except BaseException:
            chain.close()
            raise
        return ledger

    @property
    def head(self) -> str:
        """The SHA-256 of the last line: it stands for the whole ledger so far."""
        return self._chain.head

    @property
    def last(self) -> int:
        """The latest round that was charged; 0 where none was."""
        return self._last

    def charge(self, round: int, events: Mapping[str, Event], note: str = "") -> None:
        """Records, for good, that each client's event is about to be released.

        Call it before the release leaves. One line and one sync for all clients; those with equal
        events are grouped. round: from 0, which is before the first (a noised initialisation).
        Without events nothing is written.

        Raises BudgetError where a client's budget does not hold its event; then nothing is charged
        to anybody. Raises FedpeftError where writing fails; then nothing may be released, and the
        ledger is closed.
        """
        if type(round) is not int or round < 0:
            raise FedpeftError(f"round={round!r} must be a whole number from 0.")
        groups: dict[Event, list[str]] = {}
        for client, event in events.items():
            groups.setdefault(event, []).append(client)
        for event, clients in groups.items():
            self._check(clients, history(event))
        if not groups:
            return
        for event, clients in groups.items():
            self._add(clients, history(event))  # first: what is cut short here is counted too high
        charges = [[as_json(event), clients] for event, clients in groups.items()]
        self._last = max(self._last, round)
        self._chain.append({"round": round, "note": note, "charges": charges})

    def spent(self, client: str) -> Event:
        """All that was charged to a client, as one canonical event; Nothing for an unknown one."""
        return unflatten(dict(self._spent.get(client, ())))

    def epsilon(self, client: str) -> float:
        """What a client has spent, at the budget's delta, by its accountant."""
        return self._price(self._spent.get(client, ()))

    def may(self, client: str, event: Event) -> bool:
        """Whether the client's budget holds ``event`` on top of what is spent.

        Milliseconds where RDP's bound is enough. Else, for an event that the client has had before,
        a search for how often it fits, once for all clients with the same past but for it; else one
        evaluation per distinct past.
        """
        return self._fits(self._spent.get(client, ()), history(event))

    def allow(self, event: Event) -> None:
        """Prices repetitions of one release once, for all clients that will have at most as much.

        A past whose releases are no more, none sampled more often and none with less noise, then
        fits without a further evaluation. Nothing happens where the budget does not hold the event,
        or it is of several releases.
        """
        found = history(event)
        if len(found) == 1 and found not in self._known and self._price(found) <= self._limit:
            self._known.append(found)

    def clients(self) -> list[str]:
        """All clients that were ever charged, in ascending order."""
        return sorted(self._spent)

    def epsilons(self) -> list[tuple[float, int]]:
        """How spending is distributed: (epsilon, clients that spent it), the largest first.

        One evaluation per distinct past; ``spread`` needs three at most.
        """
        clients: dict[float, int] = {}
        for past, count in self._distinct().items():
            price = self._price(past)
            clients[price] = clients.get(price, 0) + count
        return sorted(clients.items(), reverse=True)

    def spread(self) -> tuple[float, float, float]:
        """The epsilon of the client that spent most, of the one in the middle, and of the least.

        Who these are, RDP says, which is cheap; then they are priced. Zeros without a client.
        """
        delta, found = self.budget.delta, self._distinct()
        order = sorted(found, key=lambda past: -epsilon_of(past, delta, "rdp"))
        if not order:
            return 0.0, 0.0, 0.0
        half, middle = (sum(found.values()) + 1) // 2, order[0]
        for past in order:
            half, middle = half - found[past], past
            if half <= 0:
                break
        return self.worst(), self._price(middle), self._price(order[-1])

    def worst(self) -> float:
        """The largest epsilon of any client, 0 without one.

        Only a past that is not part of another client's is priced.
        """
        front: list[dict[tuple[float, float], int]] = []
        for past in sorted(self._distinct(), key=lambda p: -sum(n for _, n in p)):
            if not any(all(n <= more.get(release, 0) for release, n in past) for more in front):
                front.append(dict(past))
        return max((self._price(tuple(sorted(past.items()))) for past in front), default=0.0)

    def close(self) -> None:
        """Gives the file free for other processes."""
        self._chain.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _limit(self) -> float:
        return self.budget.epsilon

    def _price(self, past: History) -> float:
        return epsilon_of(past, self.budget.delta, self.budget.accountant)

    def _fits(self, past: History, one: History) -> bool:
        limit, delta, accountant = self._limit, self.budget.delta, self.budget.accountant
        if limit == math.inf or not one:
            return True
        after = join(past, one)
        if any(_within(after, known) for known in self._known):
            return True
        if epsilon_of(after, delta, "rdp") <= limit:
            return True
        times, rest = _divide(past, one)
        if times:
            return times < affordable_of(one, rest, limit, delta, accountant)
        return self._price(after) <= limit

    def _check(self, clients: Iterable[str], one: History) -> None:
        """Raises BudgetError for the first client whose budget does not hold ``one``."""
        good: set[History] = set()
        for client in clients:
            past = self._spent.get(client, ())
            if past not in good and not self._fits(past, one):
                raise BudgetError(
                    f"client {client!r} has spent epsilon={self._price(past):.4g}; this release "
                    f"would take it to {self._price(join(past, one)):.4g}, over its budget of "
                    f"{self.budget.epsilon:g} at delta={self.budget.delta:g}. Leave the client out "
                    "of the round."
                )
            good.add(past)

    def _add(self, clients: Iterable[str], one: History) -> None:
        after: dict[History, History] = {}  # clients with one past share one object
        for client in clients:
            past = self._spent.get(client, ())
            if past not in after:
                after[past] = join(past, one)
            self._spent[client] = after[past]

    def _distinct(self) -> dict[History, int]:
        """Each past -> how many clients have it."""
        found: dict[History, int] = {}
        for past in self._spent.values():
            found[past] = found.get(past, 0) + 1
        return found

    def _take(self, at: str, fields: dict[str, Any]) -> None:
        """Counts a line that was read. Raises FedpeftError where it is no charge."""
        match fields:
            case {"round": int(round), "note": str(), "charges": list(charges)} if len(fields) == 3:
                for charge in charges:
                    self._take_charge(at, charge)
                self._last = max(self._last, round)
            case _:
                raise FedpeftError(f"{at} is no charge: it holds {sorted(fields)}.")

    def _take_charge(self, at: str, charge: object) -> None:
        match charge:
            case [event, list(clients)] if all(isinstance(c, str) for c in clients):
                try:
                    one = history(from_json(event))
                except FedpeftError as error:
                    raise FedpeftError(f"{at}: {error}") from error
                self._add(clients, one)
            case _:
                raise FedpeftError(f"{at} holds a charge that is not [event, [client, ...]].")


def _divide(past: History, one: History) -> tuple[int, History]:
    """How often all of ``one`` is in ``past``, and what else is in it."""
    counts = dict(past)
    times = min(counts.get(release, 0) // n for release, n in one)
    for release, n in one:
        counts[release] = counts.get(release, 0) - n * times
    return times, tuple(sorted((release, n) for release, n in counts.items() if n > 0))


def _within(past: History, known: History) -> bool:
    """Whether ``past`` costs no more than ``known``, one release repeated, whoever accounts.

    Sampling less often, more noise and fewer releases each lose nothing of privacy.
    """
    [((rate, noise), times)] = known
    fewer = sum(count for _, count in past) <= times
    return fewer and all(own <= rate and more >= noise for (own, more), _ in past)
