"""The ranges of a fleet's numbers, and what goes with what."""

from __future__ import annotations

import dataclasses
from math import inf, nan
from typing import Any

import pytest

from fedpeft.codecs.settings import Codec
from fedpeft.config import Comms, Engine, Privacy, Recipe, Rounds, Sampling, SecureAggregation
from fedpeft.config_load import check
from fedpeft.config_rules import RULES
from fedpeft.errors import FedpeftError
from fedpeft.fleet.settings import Fleet

NUMBERS: dict[str, tuple[list[Any], list[Any]]] = {
    "utilization": ([0.1, 1.0], [0.0, 1.1, nan]),
    "sigma": ([0.0, 2.0], [-0.1, inf]),
    "redraw": ([0, 5], [-1]),
    "load": ([0.0, 9.0], [-1.0, inf]),
    "beta": ([0.0, 0.9], [1.0, -0.1]),
    "dropout": ([0.0, 0.9], [1.0, -0.1, nan]),
    "deadline": ([], [-1.0, inf]),
    "overcommit": ([1.0, 2.5], [0.9, inf, nan]),
    "buffer": ([1, 20], [0]),
    "concurrency": ([0, 20], [-1]),
    "exponent": ([0.0, 1.0], [-0.5, inf]),
    "max_staleness": ([0, 20], [-1]),
    "target": ([0.0, 1.0], [1.1, -0.1]),
}


def test_every_number_has_its_range() -> None:
    kinds = {f.name for f in dataclasses.fields(Fleet) if f.type in ("int", "float")}
    assert kinds == set(NUMBERS) == {k[6:] for k in RULES if k.startswith("fleet.")}
    for name, (good, bad) in NUMBERS.items():
        for value in good:
            check(Recipe(fleet=dataclasses.replace(Fleet("rpi4"), **{name: value})))
        for value in bad:
            with pytest.raises(FedpeftError) as caught:
                check(Recipe(fleet=dataclasses.replace(Fleet("rpi4"), **{name: value})))
            assert f"fleet.{name}={value!r} must be {RULES[f'fleet.{name}'].text}." in str(
                caught.value
            )


@pytest.mark.parametrize(
    ("fleet", "changes", "match"),
    [
        (Fleet(policy="fedbuff"), {}, r"fleet\.preset=none has no devices"),
        (Fleet("rpi4", policy="deadline"), {}, r"needs fleet\.deadline"),
        (Fleet("rpi4", deadline=3.0), {}, r"fleet\.deadline=3 with fleet\.policy=sync"),
        (Fleet("rpi4", trace="x"), {}, r"set fleet\.availability=trace"),
        (Fleet("rpi4", capacities="x"), {}, r"set fleet\.preset=fedscale"),
        (Fleet("rpi4", policy="fedbuff", buffer=9, concurrency=3), {}, "never fill"),
        (Fleet("rpi4"), {"rounds": Rounds(failure_rate=0.1)}, r"Use fleet\.dropout"),
        (
            Fleet("rpi4", policy="over_select"),
            {"rounds": Rounds(sampling=Sampling("poisson"))},
            "kind=poisson",
        ),
        (
            Fleet("rpi4"),
            {"secure_aggregation": SecureAggregation(True)},
            "does not know the exchanges",
        ),
        (
            Fleet("rpi4", policy="over_select"),
            {"privacy": Privacy("record", epsilon=3.0)},
            "Use sync or deadline",
        ),
        (
            Fleet("rpi4", policy="fedbuff"),
            {"comms": Comms(down=Codec(codec="dense", values="fp16"))},
            r"Set comms\.down\.codec=none",
        ),
        (Fleet("rpi4", policy="fedbuff"), {"engine": Engine(workers=2)}, r"Set engine\.workers=1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    fleet: Fleet, changes: dict[str, Any], match: str
) -> None:
    check(Recipe(**{**changes, "engine": Engine()} if "engine" not in changes else changes))
    with pytest.raises(FedpeftError, match=match):
        check(Recipe(fleet=fleet, **changes))
