"""The bars: what the cohort engine promises against its peers and the limit; whether it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.table import Row


@dataclass(frozen=True)
class Bar:
    """A promise about the fastest row of ``ours``, mostly against the fastest of ``theirs``.

    time, memory: at most ``bound`` times theirs. speed: at least ``bound`` times theirs. startup:
    at most ``bound`` seconds. one_core: only rows on one thread in all count.
    """

    figure: Literal["time", "speed", "memory", "startup"]
    ours: tuple[str, ...]
    theirs: str
    bound: float
    one_core: bool = False

    @property
    def text(self) -> str:
        """The promise in words."""
        whose = f"{' or '.join(self.ours)}{' on one core' if self.one_core else ''}"
        if self.figure == "startup":
            return f"{whose}: first step within {self.bound:g} s"
        if self.figure == "speed":
            return f"{whose}: at least {self.bound:g} x as fast as {self.theirs}"
        return f"{whose}: at most {self.bound:.3g} x the {self.figure} of {self.theirs}"

    def judge(self, rows: Sequence[Row]) -> str:
        """``pass`` or ``FAIL``, the promise and the figure; or that it was not measured."""
        own, other = self._fastest(rows, self.ours), self._fastest(rows, (self.theirs,))
        if own is None or (other is None and self.theirs):
            return f"----: {self.text}: not measured"
        if other is None:
            value = own.startup
        elif self.figure == "memory":
            value = own.peak_bytes / other.peak_bytes
        elif self.figure == "time":
            value = own.seconds / other.seconds
        else:
            value = other.seconds / own.seconds
        held = value >= self.bound if self.figure == "speed" else value <= self.bound
        return f"{'pass' if held else 'FAIL'}: {self.text}: {value:.2f}"

    def _fastest(self, rows: Sequence[Row], families: tuple[str, ...]) -> Row | None:
        fitting = [
            row
            for row in rows
            if row.way.family in families and (row.way.cores == 1 or not self.one_core)
        ]
        return min(fitting, key=lambda row: row.seconds, default=None)


OURS = ("cohort",)
LIGHT = (Bar("memory", OURS, "flower", 1 / 3), Bar("startup", OURS, "", 6.0))

BARS: dict[str, tuple[Bar, ...]] = {
    "A": (
        Bar("time", OURS, "centralised", 1.00),
        Bar("speed", OURS, "pfl", 1.2),
        Bar("speed", OURS, "flower", 1.15),
        Bar("speed", ("bf16",), "cohort", 1.7),
        Bar("time", ("clipped",), "cohort", 1.25),
        Bar("time", ("private",), "cohort", 1.25),
        Bar("speed", ("workers",), "worker", 1.5),
        *LIGHT,
    ),
    "B": (
        Bar("speed", OURS, "loop", 8.0),
        Bar("speed", ("compiled",), "loop", 10.0),
        Bar("speed", OURS, "pfl", 10.0, one_core=True),
        *LIGHT,
    ),
    "C": (Bar("memory", OURS, "flower", 1 / 3),),
    "bert-mini": (
        Bar("speed", ("cohort", "compiled"), "loop", 15.0),
        Bar("speed", ("cohort", "compiled"), "flower", 10.0),
        Bar("memory", OURS, "flower", 1 / 3),
    ),
    "llama-1b": (
        Bar("speed", ("cohort", "compiled"), "centralised", 0.9),
        Bar("speed", ("clipped",), "cohort", 0.6),
        Bar("memory", OURS, "flower", 1 / 3),
    ),
}
"""By workload."""


def bars(workload: str, rows: Sequence[Row]) -> list[str]:
    """The workload's bars, judged; of a shrunk or tiny workload, none."""
    return [bar.judge(rows) for bar in BARS.get(workload, ())]
