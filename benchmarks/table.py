"""From runs to the table: the best variant of each family, compared with the limit and the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

from benchmarks.ways import Way

HEAD = (
    "way",
    "s/round",
    "min-max",
    "CPU s/round",
    "start-up s",
    "peak MB",
    "x centralised",
    "% of centralised",
    "x loop",
    "tokens/s",
    "% of peak",
    "GPU MB",
    "largest difference",
    "others on the machine",
)


@dataclass(frozen=True)
class Run:
    """One process: what it measured about itself and what was measured about it.

    seconds, cpu, others: per round (see Recorder), the untimed first one left out. gap: largest
    absolute difference of the adapter from the loop's, None where they are not comparable. notes:
    what the way says of itself, e.g. the chunk that fedpeft chose.
    """

    workload: str
    way: Way
    repeat: int
    seconds: list[float]
    cpu: list[float]
    others: list[float]
    startup: float
    peak_bytes: int
    proportional: bool
    gap: float | None
    notes: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A variant over all its runs.

    seconds, least, most: the median, shortest and longest round. cpu: mean per round. startup: the
    median. peak_bytes, gap, gpu_bytes: the largest (of the last: in use on the GPU, 0 without one).
    others: mean share of the machine that others took.
    """

    way: Way
    label: str
    seconds: float
    least: float
    most: float
    cpu: float
    startup: float
    peak_bytes: int
    gap: float | None
    others: float
    gpu_bytes: int


@dataclass(frozen=True)
class Arithmetic:
    """A round's tokens, the floating-point operations of one, and the device's peak in TFLOP/s."""

    tokens: int
    flops_per_token: float
    peak: float | None

    def utilisation(self, seconds: float) -> str:
        """Share of the peak that a round of so many seconds used, in per cent; "" if unknown."""
        if self.peak is None:
            return ""
        used = self.tokens * self.flops_per_token / seconds
        return f"{100 * used / (self.peak * 1e12):.1f}"


def rows(runs: Sequence[Run]) -> list[Row]:
    """One row per variant, in order of appearance; the runs are of one workload."""
    found: dict[Way, list[Run]] = {}
    for run in runs:
        found.setdefault(run.way, []).append(run)
    return [row(way, own) for way, own in found.items()]


def row(way: Way, runs: Sequence[Run]) -> Row:
    """A variant's runs in one row."""
    seconds = [s for run in runs for s in run.seconds]
    chunk = runs[0].notes.get("chunk", way.chunk)
    return Row(
        way=way,
        label=replace(way, chunk=0 if way.family == "sequential" else chunk).label,
        seconds=median(seconds),
        least=min(seconds),
        most=max(seconds),
        cpu=mean(s for run in runs for s in run.cpu),
        startup=median(run.startup for run in runs),
        peak_bytes=max(run.peak_bytes for run in runs),
        gap=max((run.gap for run in runs if run.gap is not None), default=None),
        others=mean(s for run in runs for s in run.others),
        gpu_bytes=max(int(run.notes.get("gpu_used", 0)) for run in runs),
    )


def best(found: Sequence[Row]) -> dict[str, Row]:
    """The fastest variant of each family."""
    fastest: dict[str, Row] = {}
    for one in found:
        family = one.way.family
        if family not in fastest or one.seconds < fastest[family].seconds:
            fastest[family] = one
    return fastest


def render(found: Sequence[Row], arithmetic: Arithmetic) -> str:
    """The table in Markdown; the fastest variant of a family is starred."""
    fastest = best(found)
    limit, loop = fastest.get("centralised"), fastest.get("loop")
    lines = [HEAD, tuple("---" for _ in HEAD)]
    for one in found:
        star = " *" if fastest[one.way.family] is one else ""
        lines.append(
            (
                one.label + star,
                f"{one.seconds:.3f}",
                f"{one.least:.3f}-{one.most:.3f}",
                f"{one.cpu:.3f}",
                f"{one.startup:.1f}",
                f"{one.peak_bytes / 1e6:.0f}",
                f"{one.seconds / limit.seconds:.2f}" if limit else "",
                f"{100 * limit.seconds / one.seconds:.0f}" if limit else "",
                f"{one.seconds / loop.seconds:.3f}" if loop else "",
                f"{arithmetic.tokens / one.seconds:.0f}",
                arithmetic.utilisation(one.seconds),
                f"{one.gpu_bytes / 1e6:.0f}" if one.gpu_bytes else "",
                "" if one.gap is None else f"{one.gap:.1e}",
                f"{100 * one.others:.0f} %",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
