"""Mechanisms as data: what they flatten to, their JSON, and what they refuse to be."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from fedpeft.errors import FedpeftError
from fedpeft.privacy.events import (
    Composed,
    Event,
    Gaussian,
    Nothing,
    Repeated,
    SampledGaussian,
    as_json,
    compose,
    flatten,
    from_json,
    history,
    join,
    unflatten,
)


def drawn(random: random.Random, depth: int) -> Event:
    kind = random.randrange(3, 5) if depth and random.random() < 0.8 else random.randrange(3)
    noise = random.choice([0.5, 1.0, 1 / 3])
    if kind == 0:
        return Nothing()
    if kind == 1:
        return Gaussian(noise)
    if kind == 2:
        return SampledGaussian(random.choice([0.1, 1.0]), noise)
    if kind == 3:
        return Repeated(drawn(random, depth - 1), random.randrange(1, 4))
    return Composed(tuple(drawn(random, depth - 1) for _ in range(random.randrange(2, 5))))


def one_by_one(event: Event) -> list[tuple[float, float]]:
    """Every single release, by plain recursion."""
    if isinstance(event, Gaussian):
        return [(1.0, event.noise_multiplier)]
    if isinstance(event, SampledGaussian):
        return [(event.rate, event.noise_multiplier)]
    if isinstance(event, Repeated):
        return one_by_one(event.event) * event.times
    if isinstance(event, Composed):
        return [release for inner in event.events for release in one_by_one(inner)]
    return []


EVENTS = [drawn(random.Random(seed), 4) for seed in range(60)]


def test_flatten_counts_every_single_release() -> None:
    sizes = []
    for event in EVENTS:
        releases = one_by_one(event)
        assert flatten(event) == {key: releases.count(key) for key in releases}
        assert sum(flatten(event).values()) == len(releases)
        sizes.append(len(releases))
    assert max(sizes) > 10 and min(sizes) == 0


def test_equal_releases_make_equal_canonical_events() -> None:
    a, b = SampledGaussian(0.1, 1.0), Gaussian(2.0)
    left = Composed((Repeated(a, 3), b, Nothing()))
    right = Composed((a, Composed((b, a)), a))
    assert history(left) == history(right)
    assert compose([left]) == compose([right]) == Composed((Repeated(a, 3), b))
    assert compose([]) == compose([Nothing()]) == Nothing()
    assert compose([a]) == a
    assert compose([SampledGaussian(1.0, 2.0)]) == b
    for event in EVENTS:
        assert flatten(unflatten(flatten(event))) == flatten(event)


def test_join_is_composition() -> None:
    for first, second in zip(EVENTS, reversed(EVENTS), strict=True):
        both = Composed((first, Repeated(second, 5)))
        assert join(history(first), history(second), 5) == history(both)


def test_json_gives_the_event_back() -> None:
    for event in [*EVENTS, Gaussian(0.1 + 0.2), SampledGaussian(1 / 3, 1e-17)]:
        assert from_json(json.loads(json.dumps(as_json(event)))) == event


BAD_NUMBERS: list[Any] = [0.0, -1.0, float("nan"), float("inf"), True, "1", None, 10**400]


@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_a_noise_multiplier_must_be_a_positive_number(value: Any) -> None:
    for make in (Gaussian, lambda noise: SampledGaussian(0.5, noise)):
        with pytest.raises(FedpeftError, match="noise_multiplier"):
            make(value)


@pytest.mark.parametrize("value", [*BAD_NUMBERS, 1.0000001])
def test_a_rate_must_be_a_probability(value: Any) -> None:
    with pytest.raises(FedpeftError, match="rate"):
        SampledGaussian(value, 1.0)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, 10**12 + 1])
def test_times_must_be_a_count(value: Any) -> None:
    with pytest.raises(FedpeftError, match="times"):
        Repeated(Gaussian(1.0), value)


def test_numbers_of_numpy_are_taken() -> None:
    assert type(Gaussian(np.float64(2)).noise_multiplier) is float
    assert SampledGaussian(1, 2) == SampledGaussian(1.0, 2.0)


def test_repetitions_of_repetitions_have_a_limit() -> None:
    event: Event = Gaussian(1.0)
    for _ in range(3):
        event = Repeated(event, 10**6)
    with pytest.raises(FedpeftError, match="more than 1000000000000 times"):
        flatten(event)


def test_only_events_compose() -> None:
    with pytest.raises(FedpeftError, match="not a privacy event"):
        Repeated("gaussian", 2)  # type: ignore[arg-type]
    with pytest.raises(FedpeftError, match="not a privacy event"):
        Composed((Gaussian(1.0), 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[]", "JSON object with a kind"),
        ("{}", "JSON object with a kind"),
        ('{"kind": 3}', "JSON object with a kind"),
        ('{"kind": "gausian", "noise_multiplier": 1}', "Did you mean 'gaussian'"),
        ('{"kind": "gaussian"}', "must hold exactly"),
        ('{"kind": "gaussian", "noise_multiplier": 1, "rate": 1}', "must hold exactly"),
        ('{"kind": "gaussian", "noise_multiplier": "1"}', "must be a number"),
        ('{"kind": "gaussian", "noise_multiplier": NaN}', "positive and finite"),
        ('{"kind": "gaussian", "noise_multiplier": true}', "must be a number"),
        ('{"kind": "sampled_gaussian", "rate": 2, "noise_multiplier": 1}', "probability"),
        ('{"kind": "repeated", "event": {"kind": "nothing"}, "times": 1.5}', "whole number"),
        ('{"kind": "repeated", "event": 1, "times": 1}', "JSON object with a kind"),
        ('{"kind": "composed", "events": {}}', "must be a list"),
        ('{"kind": "nothing", "events": []}', "must hold exactly"),
    ],
)
def test_other_json_is_refused(text: str, match: str) -> None:
    with pytest.raises(FedpeftError, match=match):
        from_json(json.loads(text))


def test_json_of_great_depth_is_refused() -> None:
    value: dict[str, Any] = {"kind": "nothing"}
    for _ in range(500):
        value = {"kind": "composed", "events": [value]}
    with pytest.raises(FedpeftError, match="nested deeper"):
        from_json(value)
