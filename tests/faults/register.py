"""Which test is of which fault, and how fedpeft must end it.

The faults are numbered 1 to 64; ``docs/faults.md`` says what each is. Outcomes:

E  a clear error at the start, before any work
X  the client is excluded from the round, with a reason; the run goes on
Q  the run stops cleanly, its checkpoint kept
A  the round is given up, the model unchanged, and tried again
K  the run goes on, nothing lost
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

Outcome = Literal["E", "X", "Q", "A", "K"]
F = TypeVar("F", bound=Callable[..., None])

FOUND: dict[int, list[tuple[str, str, str]]] = {}
"""Number of the fault -> (outcome, module, test)."""


def fault(number: int, *outcomes: Outcome) -> Callable[[F], F]:
    """Registers the test below as one of the fault ``number``."""

    def register(test: F) -> F:
        for outcome in outcomes:
            own = (outcome, test.__module__, test.__name__)
            FOUND.setdefault(number, []).append(own)
        return test

    return register
