"""What an audit found, and how it reads: one row per attack, beside the claim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

HEADS = ("attack", "score", "95 %", "claimed epsilon", "verdict")
"""The columns of ``rows``."""


@dataclass(frozen=True)
class Finding:
    """The result of one attack.

    measure: what the score is: ``auc`` (area under the ROC, 0.5 is guessing), ``epsilon`` (a lower
    bound) or ``share`` (of what could be recovered). interval: where the score lies with confidence
    0.95; NaN where there is none. claimed: the run's epsilon, infinite without privacy. sound:
    whether the score agrees with the claim; None where it can say nothing of it.
    """

    attack: str
    measure: Literal["auc", "epsilon", "share"]
    score: float
    interval: tuple[float, float]
    claimed: float
    sound: bool | None


def refuted(findings: Sequence[Finding]) -> bool:
    """Whether one of the attacks got more than the claim allows."""
    return any(finding.sound is False for finding in findings)


def rows(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    """A row of text for each finding, in the columns of HEADS."""
    return [
        (
            finding.attack,
            _figure(finding),
            _interval(finding),
            _number(finding.claimed),
            _verdict(finding),
        )
        for finding in findings
    ]


def text(findings: Sequence[Finding]) -> str:
    """The same as lines of plain text, in columns."""
    lines = [HEADS, *rows(findings)]
    widths = [max(len(line[c]) for line in lines) for c in range(len(HEADS))]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return "\n".join(padded)


def _figure(finding: Finding) -> str:
    value = finding.score
    if finding.measure == "share":
        return f"{100 * value:.1f} %"
    return f"{'AUC' if finding.measure == 'auc' else '>='} {value:.3f}"


def _interval(finding: Finding) -> str:
    low, high = finding.interval
    if math.isnan(low) or math.isinf(high):
        return ""
    return f"{low:.3f} to {high:.3f}"


def _number(value: float) -> str:
    return "none" if math.isinf(value) else f"{value:.3f}"


def _verdict(finding: Finding) -> str:
    if math.isinf(finding.claimed):
        return "no claim"
    if finding.sound is None:
        return ""
    return "not refuted" if finding.sound else "REFUTED"
