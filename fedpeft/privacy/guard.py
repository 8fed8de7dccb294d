"""Who may take part in a round: the sampler's draw, less whose budget is spent, charged beforehand.

The ledger is charged, and is on disk, before a message leaves. A round that then fails counts as
spent, and one that is played again after a resume is charged again. On resume the terms must be
those that the run began with, which ``privacy.json`` beside the ledger holds from its start.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from fedpeft import sampling
from fedpeft.config import Recipe
from fedpeft.errors import FedpeftError
from fedpeft.privacy.client_level import ClientLevel
from fedpeft.privacy.events import Event, flatten
from fedpeft.privacy.ledger import Budget, Ledger
from fedpeft.privacy.statement import Statement, statement, terms_as_dict
from fedpeft.privacy.terms import EVERYONE, Terms
from fedpeft.record.files import replace


class BudgetSpentError(FedpeftError):
    """Nobody may take part in a further round. What was trained so far stays."""


class Guard:
    """The terms of a run and its ledger, a file that survives the run.

    path: of the ledger, ``privacy.jsonl``. head: of the ledger when the checkpoint was written from
    which a run goes on. Raises FedpeftError where terms or ledger are not those of that run.
    """

    def __init__(self, terms: Terms, path: Path, recipe: Recipe, head: str | None = None) -> None:
        self.terms = terms
        self._recipe = recipe
        self._promise = path.with_name("privacy.json")
        self._check_terms()
        most = recipe.privacy.epsilon or math.inf
        budget = Budget(most, terms.delta, recipe.privacy.accountant)
        self.ledger = Ledger.open(path, budget, head)
        if not self._promise.exists():
            self.write()

    def close(self) -> None:
        """Lets the ledger go."""
        self.ledger.close()

    def statement(self) -> Statement:
        """What the run may promise after what has been charged."""
        return statement(self.terms, self._recipe, self.ledger)

    def write(self) -> None:
        """Writes the statement as of now into ``privacy.json``."""
        text = json.dumps(self.statement().as_dict(), indent=2)
        replace(self._promise, text.encode("ascii") + b"\n")

    def again(self, done: int) -> list[str]:
        """A sentence where rounds after ``done``, the last complete one, are charged already."""
        if self.terms.whole_run or self.ledger.last <= done:
            return []
        return [
            f"rounds up to {self.ledger.last} are in the privacy ledger already; what they "
            f"released may have left, so rounds from {done + 1} on are charged once more"
        ]

    def admit(self, number: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """The clients of round ``number``, charged. sizes: client -> number of training examples.

        Raises BudgetSpentError where clients were drawn and too few of them may take part: none,
        or fewer than must share the noise.
        """
        recipe, terms = self._recipe, self.terms
        secret = terms.mechanism.randomness.uniform if terms.sampled == "poisson" else None
        drawn = sampling.draw(recipe.rounds.sampling, sizes, recipe.seed, number, secret)
        if terms.everyone:
            self._charge_everyone(number)
            return drawn
        events = {name: terms.event(sizes[name]) for name in drawn}
        if self._recipe.privacy.epsilon > 0:
            for examples in {sizes[name] for name in drawn}:
                self.ledger.allow(terms.whole(examples))
        allowed = {name: event for name, event in events.items() if self._may(name, event)}
        if drawn and len(allowed) < self._least:
            raise BudgetSpentError(
                f"round {number}: of {len(drawn)} clients that were drawn {len(allowed)} have "
                f"privacy budget left (privacy.epsilon, privacy.max_rounds), and {self._least} are "
                f"needed. The adapter of the last round is kept."
            )
        self.ledger.charge(number, allowed)
        return tuple(sorted(allowed))

    def _charge_everyone(self, number: int) -> None:
        if self.terms.whole_run and self.ledger.clients():
            return
        event = self.terms.event(1)
        if not self._may(EVERYONE, event):
            raise BudgetSpentError(
                f"round {number}: the run has spent its privacy budget (privacy.epsilon). The "
                f"adapter of the last round is kept."
            )
        self.ledger.charge(number, {EVERYONE: event})

    @property
    def _least(self) -> int:
        """The fewest clients with which a round may be played."""
        mechanism = self.terms.mechanism
        if isinstance(mechanism, ClientLevel) and mechanism.place == "shares":
            return mechanism.least
        return 1

    def _may(self, client: str, event: Event) -> bool:
        if self.terms.sampled == "cap":
            taken = _releases(self.ledger.spent(client)) // _releases(event)
            if taken >= self.terms.rounds:
                return False
        return self.ledger.may(client, event)

    def _check_terms(self) -> None:
        """Raises FedpeftError unless the terms are those of ``privacy.json``, if it is there."""
        try:
            before = json.loads(self._promise.read_bytes())["terms"]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            raise FedpeftError(f"{self._promise} is damaged ({error}). Restore it.") from error
        now = json.loads(json.dumps(terms_as_dict(self.terms, self._recipe)))
        changed = [
            f"{key}={now[key]!r}, was {before.get(key)!r}"
            for key in now
            if now[key] != before.get(key)
        ]
        if changed:
            raise FedpeftError(
                f"{self._promise}: the run began with other terms of privacy than the recipe's: "
                f"{'; '.join(changed)}. Restore them, or start a new run."
            )


def _releases(event: Event) -> int:
    return sum(flatten(event).values())
