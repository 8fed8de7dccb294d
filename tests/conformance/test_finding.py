"""Verdicts: a finding, a reason to skip, and whatever else a strategy raises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from fedpeft.conformance import Finding, NotApplicable, Verdict, check, name_of
from fedpeft.conformance.finding import examine, require
from fedpeft.strategies.fedavg import FedAvg, State
from fedpeft.strategy import Messages, Strategy


def a_property_that_holds(strategy: Strategy[State]) -> str:
    return type(strategy).__name__


def a_property_that_is_broken(strategy: Strategy[State]) -> str:
    raise Finding("it is not so")


def a_property_of_others(strategy: Strategy[State]) -> str:
    raise NotApplicable("not asked of it")


def a_property_that_sends(strategy: Strategy[State]) -> str:
    strategy.send(State({}), 1, ["a"])
    return ""


@dataclass(frozen=True)
class Fails(FedAvg):
    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        raise KeyError("adapter")


def test_one_line_for_each_property() -> None:
    properties = (a_property_that_holds, a_property_that_is_broken, a_property_of_others)
    assert list(check(FedAvg(), properties)) == [
        Verdict("a property that holds", "holds", "FedAvg"),
        Verdict("a property that is broken", "broken", "it is not so"),
        Verdict("a property of others", "skipped", "not asked of it"),
    ]


def test_what_a_strategy_raises_is_a_finding_with_its_place() -> None:
    line = examine(Fails(), a_property_that_sends)
    assert line.verdict == "broken"
    assert line.found.startswith("raised KeyError: 'adapter' (test_finding.py:")


def test_what_is_raised_elsewhere_has_no_place() -> None:
    line = examine(FedAvg(), lambda strategy: str(1 / len("")))
    assert line.found == "raised ZeroDivisionError: division by zero"


def test_checking_is_lazy() -> None:
    lines = check(FedAvg(), (a_property_that_holds, a_property_that_sends))
    assert next(lines).verdict == "holds"


def test_require() -> None:
    require(True, "nothing")
    with pytest.raises(Finding, match="so it is"):
        require(False, "so it is")
    assert name_of(a_property_of_others) == "a property of others"
