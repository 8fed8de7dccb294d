"""Synthetic look-alikes of traces, by seed: of their form and rough shape, measuring nothing.

The traces themselves are others' to give away. These stand in for them in tests and trials;
figures from them must be called synthetic.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np

from fedpeft.fleet.draws import Draws

SECONDS_PER_EXAMPLE, SIGMA = 0.005, 1.0
"""FedScale's lognormal: median seconds per example, deviation of the logarithm."""

KBPS, KBPS_SIGMA = 8000.0, 0.8

PERIOD = 172_800
"""Seconds of a trace: two days."""

NIGHT = 6 * 3600.0
"""Mean seconds that a device charges at night."""


def capacities(seed: int, count: int) -> dict[str, dict[str, float]]:
    """As FedScale's capacity file: milliseconds per example, kbit/s."""
    z = Draws(seed, "capacities").normals(np.arange(count), 0, 2)
    compute = 1e3 * SECONDS_PER_EXAMPLE * np.exp(SIGMA * z[:, 0])
    speed = KBPS * np.exp(KBPS_SIGMA * z[:, 1])
    return {
        str(k): {"computation": float(compute[k]), "communication": float(speed[k])}
        for k in range(count)
    }


def availabilities(seed: int, count: int) -> dict[str, dict[str, object]]:
    """As FedScale's availability file: two nights of charging, each device at its own hours."""
    found: dict[str, dict[str, object]] = {}
    begin, length = _nights(seed, count)
    for k in range(count):
        on = [float(begin[k]), float(begin[k]) + PERIOD / 2]
        off = [on[0] + float(length[k, 0]), on[1] + float(length[k, 1])]
        off = [min(off[0], on[1]), min(off[1], float(PERIOD))]
        found[str(k)] = {"active": on, "inactive": off, "finish_time": PERIOD}
    return found


def states(seed: int, count: int) -> dict[str, dict[str, str]]:
    """As FLASH's state file, of the same nights."""
    found: dict[str, dict[str, str]] = {}
    start = datetime(2020, 1, 29)
    for name, own in availabilities(seed, count).items():
        lines = [(0.0, "screen_on"), (0.0, "wifi"), (float(PERIOD), "screen_on")]
        active, inactive = own["active"], own["inactive"]
        assert isinstance(active, list) and isinstance(inactive, list), "as made above"
        for on, off in zip(active, inactive, strict=True):
            lines += [(on, "battery_charged_on"), (on, "screen_off")]
            lines += [(off, "screen_on"), (off, "battery_charged_off")]
        text = [
            f"{start + timedelta(seconds=round(at)):%Y-%m-%d %H:%M:%S}\t{what}"
            for at, what in sorted(lines, key=lambda line: line[0])
        ]
        found[name] = {"messages": "\n".join(text)}
    return found


def _nights(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """When each device's first night begins, ``[count]``; its nights' lengths ``[count, 2]``."""
    draws = Draws(seed, "nights")
    begin = draws.uniforms(np.arange(count), 0)[:, 0] * 0.4 * PERIOD
    length = NIGHT * np.exp(0.5 * draws.normals(np.arange(count), 1, 2))
    return begin, length
