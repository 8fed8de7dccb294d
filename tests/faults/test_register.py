"""Every fault has its test, with the outcome that the list demands; ``docs/faults.md`` says so."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.faults.register import FOUND

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "faults.md"

DEMANDED = {
    **dict.fromkeys([*range(1, 5), 6, 7, *range(9, 13), *range(14, 21)], "X"),
    **dict.fromkeys([5, 8, 13, 24, 25, 26, 34], "K"),
    **dict.fromkeys([22, 23, *range(27, 31), *range(35, 39), 41], "X"),
    **dict.fromkeys([21, 32, 33], "A"),
    31: "AQ",
    39: "EKX",
    40: "E",
    **dict.fromkeys([42, 43, 44, 45, 46, 52, 54, 60, 61], "K"),
    **dict.fromkeys([47, 51, 53], "Q"),
    **dict.fromkeys([48, 49, 50, 55, 56, 57, 58, 59, 63, 64], "E"),
    62: "AE",
}


@pytest.fixture(scope="module")
def found() -> dict[int, set[tuple[str, str]]]:
    """Number -> (outcome, test), of all files beside this one."""
    for path in sorted(HERE.glob("test_*.py")):
        importlib.import_module(f"tests.faults.{path.stem}")
    return {number: {(o, t) for o, _, t in own} for number, own in FOUND.items()}


def rows() -> dict[int, tuple[str, set[str]]]:
    """Number -> (outcomes, tests), as the document has them."""
    lines = [line.strip("|\n").split(" | ") for line in DOCUMENT.read_text("utf-8").splitlines()]
    table = [[cell.strip() for cell in line] for line in lines if line[0].strip().isdigit()]
    return {
        int(number): ("".join(sorted(outcomes.split(", "))), set(tests.strip("`").split("`, `")))
        for number, _, outcomes, _, tests in table
    }


def test_there_are_the_64_faults_with_their_outcomes(
    found: dict[int, set[tuple[str, str]]],
) -> None:
    assert sorted(found) == sorted(DEMANDED) == list(range(1, 65))
    outcomes = {n: "".join(sorted({outcome for outcome, _ in own})) for n, own in found.items()}
    assert outcomes == DEMANDED


def test_the_document_names_every_fault_outcome_and_test(
    found: dict[int, set[tuple[str, str]]],
) -> None:
    assert list(rows()) == list(range(1, 65))
    for number, (outcomes, tests) in rows().items():
        assert outcomes == DEMANDED[number], number
        assert tests == {test for _, test in found[number]}, number
