"""Findings as rows and as text."""

from __future__ import annotations

import math

from fedpeft.audit.report import HEADS, Finding, refuted, rows, text

NAN = (math.nan, math.nan)
AUC = Finding("loss of canaries", "auc", 0.61234, (0.5, 0.7), 2.0, None)
BOUND = Finding("epsilon by canaries", "epsilon", 2.5, (2.5, math.inf), 2.0, False)
FINE = Finding("epsilon by canaries", "epsilon", 0.5, (0.5, math.inf), 2.0, True)
TEXT = Finding("text of c0", "share", 0.125, NAN, math.inf, None)


def test_rows_say_score_claim_and_verdict() -> None:
    assert rows([AUC, BOUND, FINE, TEXT]) == [
        ("loss of canaries", "AUC 0.612", "0.500 to 0.700", "2.000", ""),
        ("epsilon by canaries", ">= 2.500", "", "2.000", "REFUTED"),
        ("epsilon by canaries", ">= 0.500", "", "2.000", "not refuted"),
        ("text of c0", "12.5 %", "", "none", "no claim"),
    ]


def test_text_is_in_columns() -> None:
    lines = text([AUC, BOUND]).splitlines()
    assert lines[0].split("  ")[0] == HEADS[0]
    assert lines[2].endswith("2.000            REFUTED")
    assert len({line.index("2.000") for line in lines[1:]}) == 1
    assert all(line == line.rstrip() for line in lines)


def test_refuted_is_what_contradicts_the_claim() -> None:
    assert refuted([AUC, BOUND])
    assert not refuted([AUC, FINE, TEXT])
