"""Figures as people read them. NaN and what is not there are an en dash."""

from __future__ import annotations

import math
from collections.abc import Mapping

NOTHING = "\N{EN DASH}"


def size(count: float) -> str:
    """Bytes in B, KiB, MiB, GiB or TiB.

    >>> size(1536)
    '1.5 KiB'
    """
    if math.isnan(count):
        return NOTHING
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if round(count, 1) < 1024 or unit == "TiB":
            break
    return f"{count:,.1f} {unit}"


def total(kinds: Mapping[str, int]) -> str:
    """Bytes by kind, added up; nothing where nothing was sent."""
    return size(sum(kinds.values())) if kinds else NOTHING


def shares(dense: int, sent: int) -> str:
    """What was sent, as shares of the same numbers uncompressed; dense: their bytes as float32.

    >>> shares(1000, 10)
    '1 % of uncompressed float32, 2 % of float16'
    """
    single, half = 100 * sent / dense, 200 * sent / dense
    return f"{single:,.3g} % of uncompressed float32, {half:,.3g} % of float16"


def percent(share: float, digits: int = 1) -> str:
    """A share of one.

    >>> percent(0.8734)
    '87.3 %'
    """
    return NOTHING if math.isnan(share) else f"{100 * share:.{digits}f} %"


def figure(value: float, digits: int = 3) -> str:
    """A loss or a perplexity; large ones without decimals."""
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞"
    return f"{value:,.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}"


def seconds(value: float) -> str:
    """Wall time in seconds; nothing where none was spent."""
    return f"{value:,.1f}" if value > 0 else NOTHING


def clock(value: float) -> str:
    """A duration in words.

    >>> clock(3725)
    '1 h 02 min'
    """
    if round(value, 1) < 60:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
