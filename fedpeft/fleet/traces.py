"""Traces of real devices, from JSON: FedScale's capacities and availability, FLASH's states.

FedScale ships its traces as pickles, and a pickle runs code when it is read: none is read here.
Write them out as JSON once, on a machine where you trust the file; docs/fleets.md has the lines.

- FedScale's capacities: ``{client: {"computation": ms per example, "communication": kbit/s}}``.
- FedScale's availability: ``{client: {"active": [s], "inactive": [s], "finish_time": s}}``.
- FLASH's states: ``{client: {"messages": "2020-01-29 00:00:00<tab>battery_charged_on..."}}``; a
  client is there while its screen is off or locked, its battery charges and it is on Wi-Fi.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.errors import FedpeftError
from fedpeft.fleet.availability import Intervals

_STATES = {
    "screen_off": ("off", True),
    "screen_on": ("off", False),
    "screen_lock": ("locked", True),
    "screen_unlock": ("locked", False),
    "battery_charged_on": ("charging", True),
    "battery_charged_off": ("charging", False),
    "wifi": ("wifi", True),
    **{name: ("wifi", False) for name in ("unknown", "2g", "3g", "4g", "5g")},
}
_FORMAT = "%Y-%m-%d %H:%M:%S"


def read_json(path: str, key: str) -> dict[str, Any]:
    """A trace file's clients. Raises FedpeftError that names the recipe's ``key``."""
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise FedpeftError(f"{key}={path!r} cannot be read: {error}.") from None
    if data[:1] == b"\x80" or data[:2] in (b"(d", b"}q"):
        raise FedpeftError(
            f"{key}={path!r} looks like a pickle, which runs code when it is read: write it out as "
            f"JSON first, where you trust it (docs/fleets.md)."
        )
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise FedpeftError(
            f"{key}={path!r} is not JSON: see docs/fleets.md for the forms."
        ) from None
    if not isinstance(found, dict) or not found or not all(map(_is_dict, found.values())):
        raise FedpeftError(f"{key}={path!r} must be a JSON object with an object for each client.")
    return found


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def capacities(found: Mapping[str, Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Seconds per example and bits per second of FedScale's clients, float64 ``[n]`` each."""
    return (
        np.array([_number(own, "computation", name, key) for name, own in found.items()]) / 1e3,
        np.array([_number(own, "communication", name, key) for name, own in found.items()]) * 1e3,
    )


def availabilities(found: Mapping[str, Mapping[str, Any]], key: str) -> list[Intervals]:
    """The clients' intervals, of FedScale's form or of FLASH's, in the file's order."""
    made = [
        flash(own["messages"], f"{key}: client {name!r}")
        if "messages" in own
        else _fedscale(own, name, key)
        for name, own in found.items()
    ]
    if not any(len(one.on) for one in made):
        raise FedpeftError(f"{key}: no client is ever there in these traces; give another file.")
    return made


def _fedscale(own: Mapping[str, Any], name: str, key: str) -> Intervals:
    period = _number(own, "finish_time", name, key)
    on, off = (_numbers(own, side, name, key) for side in ("active", "inactive"))
    size = min(len(on), len(off))
    return tidy(on[:size], off[:size], period)


def tidy(on: np.ndarray, off: np.ndarray, period: float) -> Intervals:
    """Intervals in order within the period, those that overlap as one."""
    pairs = sorted((max(0.0, a), min(b, period)) for a, b in zip(on, off, strict=True) if a <= b)
    found: list[list[float]] = []
    for begin, end in pairs:
        if found and begin <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        elif begin <= end:
            found.append([begin, end])
    both = np.array(found, np.float64).reshape(-1, 2)
    return Intervals(both[:, 0], both[:, 1], period)


def flash(messages: object, where: str) -> Intervals:
    """The intervals of FLASH's state messages, from the first message on; they repeat at the last.

    Lines that are no time and state are passed over, as are battery levels.
    """
    if not isinstance(messages, str):
        raise FedpeftError(f"{where}: messages must be text, lines of a time, a tab and a state.")
    events = sorted(filter(None, map(_event, messages.splitlines())), key=lambda event: event[0])
    if len(events) < 2:
        return Intervals(np.empty(0), np.empty(0), 1.0)
    state = dict.fromkeys(("off", "locked", "charging", "wifi"), False)
    first, on, off, since = events[0][0], list[float](), list[float](), math.nan
    for time, what in events:
        if what.lower() in _STATES:
            name, value = _STATES[what.lower()]
            state[name] = value
        ready = (state["off"] or state["locked"]) and state["charging"] and state["wifi"]
        if ready and math.isnan(since):
            since = time - first
        elif not ready and not math.isnan(since):
            on.append(since)
            off.append(time - first)
            since = math.nan
    period = max(events[-1][0] - first, 1.0)
    if not math.isnan(since):
        on.append(since)
        off.append(period)
    return tidy(np.array(on), np.array(off), period)


def _event(line: str) -> tuple[float, str] | None:
    time, tab, what = line.strip().partition("\t")
    try:
        moment = datetime.strptime(time.strip(), _FORMAT)
    except ValueError:
        return None
    return ((moment - datetime(2020, 1, 1)).total_seconds(), what.strip()) if tab else None


def _number(own: Mapping[str, Any], field: str, name: str, key: str) -> float:
    value = own.get(field)
    good = isinstance(value, int | float) and math.isfinite(value) and value > 0
    if not good or isinstance(value, bool):
        raise FedpeftError(
            f"{key}: client {name!r} has {field}={value!r}, which must be a number above 0."
        )
    return float(own[field])


def _numbers(own: Mapping[str, Any], field: str, name: str, key: str) -> np.ndarray:
    values = own.get(field)
    plain = isinstance(values, Sequence) and all(type(v) in (int, float) for v in values)
    if not plain or not all(math.isfinite(v) and v >= 0 for v in own[field]):
        raise FedpeftError(
            f"{key}: client {name!r} has {field}={str(values)[:40]}, which must be a list of "
            f"seconds, at least 0."
        )
    return np.array(values, np.float64)
