from __future__ import annotations

import math

import pytest

from fedpeft.cli import units

NONE = "\N{EN DASH}"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),  # not 1024.0 KiB
        (1.5 * 1024**2, "1.5 MiB"),
        (3 * 1024**3, "3.0 GiB"),
        (5000 * 1024**4, "5,000.0 TiB"),
        (math.nan, NONE),
    ],
)
def test_size(count: float, text: str) -> None:
    assert units.size(count) == text


def test_total() -> None:
    assert units.total({"adapter": 1024, "head": 512}) == "1.5 KiB"
    assert units.total({"adapter": 0}) == "0 B"
    assert units.total({}) == NONE


def test_percent_has_one_decimal() -> None:
    texts = [units.percent(x) for x in (0.8766, 1.0, 0.0, math.nan)]
    assert texts == ["87.7 %", "100.0 %", "0.0 %", NONE]
    assert units.percent(0.00321, 2) == "0.32 %"


def test_figure() -> None:
    values = (1.23456, 999.5, 12345.6, math.inf, math.nan)
    assert [units.figure(x, 2) for x in values] == ["1.23", "999.50", "12,346", "∞", NONE]


def test_seconds() -> None:
    texts = [units.seconds(x) for x in (0.0, 0.04, 12.34, 1234.56)]
    assert texts == [
        NONE,
        "0.0",
        "12.3",
        "1,234.6",
    ]


def test_clock() -> None:
    texts = [units.clock(x) for x in (0.0, 59.94, 59.99, 61, 3599, 3600, 7384)]
    assert texts == ["0.0 s", "59.9 s", "1 min", "1 min", "1 h 00 min", "1 h 00 min", "2 h 03 min"]
