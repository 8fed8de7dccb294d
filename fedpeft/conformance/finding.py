"""What checking a property ends with: a finding, a reason why it does not apply, or a verdict."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedpeft.strategy import Strategy

Property = Callable[[Strategy[Any]], str]
"""Checks one property of a strategy; returns what was measured, in a few words.

Raises Finding where the strategy does not have the property, NotApplicable where it need not. The
function's name is the property's, its docstring says what must hold, how closely, and why.
"""


class Finding(Exception):
    """A property that a strategy does not have: where, what was found, what was to be found."""


class NotApplicable(Exception):
    """A property that this strategy need not have; the message says why."""


def require(holds: bool, finding: str) -> None:
    """Raises Finding unless ``holds``."""
    if not holds:
        raise Finding(finding)


@dataclass(frozen=True)
class Verdict:
    """One line of a check.

    property: its name, in words. verdict: ``broken`` is a finding. found: what was measured, found
    wrong, or why the property was skipped.
    """

    property: str
    verdict: Literal["holds", "broken", "skipped"]
    found: str


def name_of(check: Property) -> str:
    """A property's name in words."""
    return getattr(check, "__name__", "property").replace("_", " ")


def examine(strategy: Strategy[Any], check: Property) -> Verdict:
    """The verdict on one property. Whatever a strategy raises is a finding, with its place."""
    try:
        return Verdict(name_of(check), "holds", check(strategy))
    except NotApplicable as reason:
        return Verdict(name_of(check), "skipped", str(reason))
    except Finding as finding:
        return Verdict(name_of(check), "broken", str(finding))
    except Exception as error:
        text = f"raised {type(error).__name__}: {error}{_place(strategy, error)}"
        return Verdict(name_of(check), "broken", text)


def check(strategy: Strategy[Any], properties: Iterable[Property]) -> Iterator[Verdict]:
    """The verdicts on ``properties``, one after another."""
    return (examine(strategy, one) for one in properties)


def _place(strategy: Strategy[Any], error: Exception) -> str:
    """`` (FILE:LINE)`` of the last line of the strategy's own file that was under way."""
    own = inspect.getsourcefile(type(strategy))
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == own]
    return f" ({Path(own).name}:{lines[-1]})" if own and lines else ""
