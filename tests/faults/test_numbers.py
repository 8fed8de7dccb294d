"""Faults 21 to 26: weights and metrics."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from flwr.app import MetricRecord, RecordDict

from fedpeft.errors import QuorumError
from fedpeft.flower.records import Header, encode
from fedpeft.message import Message
from tests.faults.federated import (
    NAMES,
    Spoil,
    changes_nothing,
    costs_c1_alone,
    faulty_client,
    grid_of,
    play,
    recipe_of,
)
from tests.faults.register import fault


def scalars(**changed: float | None) -> Spoil:
    """Other scalars; None takes one out."""

    def spoil(content: RecordDict, message: Message, header: Header) -> RecordDict:
        every = {**message.scalars, **changed}
        own = {name: value for name, value in every.items() if value is not None}
        return encode(Message(message.trees, own), header)

    return spoil


def raw(name: str, value: object) -> Spoil:
    """A scalar of another type, as only another program than fedpeft would send it."""

    def spoil(content: RecordDict, message: Message, header: Header) -> RecordDict:
        content["scalars"] = MetricRecord({**message.scalars, name: value})  # type: ignore[dict-item]
        return content

    return spoil


@fault(21, "A")
def test_weight_zero_counts_for_nothing_and_all_zero_give_the_round_up(tiny: Path) -> None:
    """Weights are registered: a claim of none leaves the client out, as weight 0 would."""
    zero = scalars(weight=0.0)
    costs_c1_alone(faulty_client(zero), recipe_of(tiny), "weight 0.0 claimed")
    with pytest.raises(QuorumError, match="round 2: 0 valid replies of 4 clients"):
        play(grid_of(faulty_client(zero, NAMES)), recipe_of(tiny))


@fault(22, "X")
@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, 1e308])
def test_a_weight_that_is_none(tiny: Path, weight: float) -> None:
    costs_c1_alone(faulty_client(scalars(weight=weight)), recipe_of(tiny), "claimed, but it is")


@fault(22, "X")
@pytest.mark.parametrize("weight", [9, [9.0]])
def test_a_weight_that_is_no_float(tiny: Path, weight: object) -> None:
    """Flower's records hold no bool."""
    costs_c1_alone(faulty_client(raw("weight", weight)), recipe_of(tiny), "scalar 'weight' is")


@fault(23, "X")
@pytest.mark.parametrize("what", ["record", "weight"])
def test_no_metrics_or_no_weight(tiny: Path, what: str) -> None:
    def without(content: RecordDict, message: Message, header: Header) -> RecordDict:
        content.pop("scalars")
        return content

    spoil = without if what == "record" else scalars(weight=None)
    costs_c1_alone(faulty_client(spoil), recipe_of(tiny), "is missing")


@fault(24, "K")
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_dropped_and_the_update_kept(tiny: Path, loss: float) -> None:
    reports = changes_nothing(faulty_client(scalars(loss=loss)), recipe_of(tiny))
    assert math.isfinite(reports[2].loss)
    _, honest = play(grid_of(), recipe_of(tiny), {2: ("c0", "c2", "c3")})
    assert reports[2].loss == honest[2].loss  # of those that told one


@fault(25, "K")
def test_other_metrics_than_the_others(tiny: Path) -> None:
    """More than was asked for is passed over; a loss less is a mean of fewer."""
    reports = changes_nothing(faulty_client(scalars(extra=1.0)), recipe_of(tiny))
    _, honest = play(grid_of(), recipe_of(tiny))
    assert reports[2].loss == pytest.approx(honest[2].loss)
    silent = changes_nothing(faulty_client(scalars(loss=None)), recipe_of(tiny))
    _, fewer = play(grid_of(), recipe_of(tiny), {2: ("c0", "c2", "c3")})
    assert silent[2].loss == fewer[2].loss


@fault(26, "K")
@pytest.mark.parametrize("value", [7, [1.0, 2.0]])
def test_a_metric_of_another_type_costs_the_metric_alone(tiny: Path, value: object) -> None:
    reports = changes_nothing(faulty_client(raw("loss", value)), recipe_of(tiny))
    _, fewer = play(grid_of(), recipe_of(tiny), {2: ("c0", "c2", "c3")})
    assert reports[2].loss == fewer[2].loss


@fault(26, "K")
def test_text_as_a_metric_does_not_leave_a_client() -> None:
    """Flower's records hold none."""
    with pytest.raises(TypeError):
        MetricRecord({"loss": "low"})  # type: ignore[dict-item]
