"""The curves of ``benchmarks.scale``: memory and time of a round by cohort and by population."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MEGA = 1e6
INK, BLUE, GREY, RED = "#333333", "#1f6fb2", "#8c8c8c", "#c0392b"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Writes the curves as SVG, text as text."""
    points: Sequence[Mapping[str, Any]] = found["points"]
    largest = max(one["population"] for one in points)
    by_cohort = sorted(
        (one for one in points if one["population"] == largest), key=lambda one: one["cohort"]
    )
    shared = max({one["cohort"] for one in points}, key=lambda c: _count(points, c))
    by_population = sorted(
        (one for one in points if one["cohort"] == shared), key=lambda one: one["population"]
    )
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    _memory(axes[0][0], [one["cohort"] for one in by_cohort], by_cohort)
    _memory(axes[0][1], [one["population"] for one in by_population], by_population)
    _time(axes[1][0], [one["cohort"] for one in by_cohort], by_cohort)
    _time(axes[1][1], [one["population"] for one in by_population], by_population)
    axes[0][0].set_title(f"cohort, of {largest:,} clients", color=INK, fontsize=11)
    axes[0][1].set_title(f"registered clients, {shared:,} in a round", color=INK, fontsize=11)
    axes[1][0].set_xlabel("clients in a round")
    axes[1][1].set_xlabel("registered clients")
    axes[0][0].set_ylabel("memory, MB")
    axes[1][0].set_ylabel("ms a client")
    axes[0][0].legend(frameon=False, fontsize=9, loc="lower left")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scale"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _count(points: Sequence[Mapping[str, Any]], cohort: int) -> int:
    return sum(one["cohort"] == cohort for one in points)


def _memory(axes: Axes, at: Sequence[int], points: Sequence[Mapping[str, Any]]) -> None:
    """Peak of all that was resident, of the process's own, and with a list of replies."""
    own = [one["during"]["own"] / MEGA for one in points]
    peak = [one["during"]["peak"] / MEGA for one in points]
    kept = [
        (points[0]["during"]["own"] + one["cohort"] * one["adapter_bytes"]) / MEGA for one in points
    ]
    axes.plot(at, peak, "o--", color=GREY, label="resident at most, with mapped files")
    axes.plot(at, own, "o-", color=BLUE, label="its own (anonymous)")
    if len({one["cohort"] for one in points}) > 1:
        axes.plot(at, kept, ":", color=RED, label="if every reply were kept")
    _style(axes)


def _time(axes: Axes, at: Sequence[int], points: Sequence[Mapping[str, Any]]) -> None:
    axes.plot(at, [1e3 * min(one["seconds_per_client"]) for one in points], "o-", color=BLUE)
    _style(axes)


def _style(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
