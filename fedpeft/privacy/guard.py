"""Who may take part in a round: the sampler's draw, less whose budget is spent, charged beforehand.

The ledger is charged, and is on disk, before a message leaves. A round that then fails counts as
spent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from fedpeft import sampling
from fedpeft.config import Recipe
from fedpeft.errors import FedpeftError
from fedpeft.privacy.events import Event, flatten
from fedpeft.privacy.ledger import Budget, Ledger
from fedpeft.privacy.statement import Statement, statement
from fedpeft.privacy.terms import EVERYONE, Terms


class BudgetSpentError(FedpeftError):
    """Nobody may take part in a further round. What was trained so far stays."""


class Guard:
    """The terms of a run and its ledger, a file that survives the run."""

    def __init__(self, terms: Terms, path: Path, recipe: Recipe) -> None:
        self.terms = terms
        self._recipe = recipe
        most = recipe.privacy.epsilon or math.inf
        budget = Budget(most, terms.delta, recipe.privacy.accountant)
        self.ledger = Ledger.open(path, budget)

    def close(self) -> None:
        """Lets the ledger go."""
        self.ledger.close()

    def statement(self) -> Statement:
        """What the run may promise after what has been charged."""
        return statement(self.terms, self._recipe, self.ledger)

    def admit(self, number: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """The clients of round ``number``, charged. sizes: client -> number of training examples.

        Raises BudgetSpentError where clients were drawn and none of them may take part.
        """
        recipe, terms = self._recipe, self.terms
        secret = terms.mechanism.randomness.uniform if terms.sampled == "poisson" else None
        drawn = sampling.draw(recipe.rounds.sampling, sizes, recipe.seed, number, secret)
        if terms.everyone:
            self._charge_everyone(number)
            return drawn
        events = {name: terms.event(sizes[name]) for name in drawn}
        allowed = {name: event for name, event in events.items() if self._may(name, event)}
        if drawn and not allowed:
            raise BudgetSpentError(
                f"round {number}: all {len(drawn)} clients that were drawn have spent their "
                f"privacy budget (privacy.epsilon, privacy.max_rounds). The adapter of the last "
                f"round is kept."
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

    def _may(self, client: str, event: Event) -> bool:
        taken = _releases(self.ledger.spent(client)) // _releases(event)
        return taken < self.terms.rounds and self.ledger.may(client, event)


def _releases(event: Event) -> int:
    return sum(flatten(event).values())
