"""Every file in strategies/, with every value of its literal settings, through the conformance kit.

Whether a rule is the paper's is for the numeric oracles beside this file; that the kit finds what
is wrong is for ``test_planted_bugs``.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from fedpeft.conformance import PROPERTIES, Property, deep, name_of
from fedpeft.conformance.finding import examine
from fedpeft.strategy import Strategy, available, build, load

FILES = sorted((Path(__file__).parents[2] / "strategies").glob("[!_]*.py"))
ALL = (*PROPERTIES, *deep.PROPERTIES)
VERBS = "|".join(name for name in vars(Strategy) if not name.startswith("_"))
DICTATED = re.compile(
    rf"def ({VERBS})\(self|\w+: ClassVar\[bool\] = |@dataclass\(frozen|class State:"
)


def variants(name: str) -> list[dict[str, str]]:
    """A strategy's literal settings: the first value of each, and every other one in its turn."""
    choices: dict[str, tuple[str, ...]] = {
        key: get_args(hint)
        for key, hint in get_type_hints(load(name)).items()
        if get_origin(hint) is Literal
    }
    first = {key: values[0] for key, values in choices.items()}
    others = [first | {key: one} for key, values in choices.items() for one in values[1:]]
    return [first, *others]


CASES = [
    pytest.param((path.stem, settings), id="-".join([path.stem, *settings.values()]))
    for path in FILES
    for settings in variants(path.stem)
]


@pytest.fixture(params=CASES)
def strategy(request: pytest.FixtureRequest) -> Strategy[Any]:
    return build(*request.param)


def test_the_kit_meets_every_file_and_has_its_properties() -> None:
    assert [path.stem for path in FILES] == sorted(available())
    assert len(FILES) >= 5 and len(CASES) >= len(FILES) + 2
    assert len(PROPERTIES) == 35 and len(deep.PROPERTIES) == 2
    assert len({name_of(one) for one in ALL}) == len(ALL)


@pytest.mark.parametrize("check", ALL, ids=lambda one: one.__name__)
def test_holds(check: Property, strategy: Strategy[Any]) -> None:
    verdict = examine(strategy, check)
    assert verdict.verdict != "broken", verdict.found


def test_no_property_is_skipped_for_all() -> None:
    strategies = [build(*case.values[0]) for case in CASES]
    for one in PROPERTIES:
        assert any(examine(s, one).verdict == "holds" for s in strategies), name_of(one)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_one_self_contained_algorithm(path: Path) -> None:
    text = path.read_text()
    module = ast.parse(text)
    header = ast.get_docstring(module) or ""
    assert re.search(r"arXiv \d{4}\.\d{5}|^Baseline, not a paper", header, re.M), "no source"
    assert re.search(r"<-|=|argmin", header), "no equation in the header"
    assert len(header.split("\n")[0]) <= 100
    assert 30 <= len(text.splitlines()) <= 150
    for node in ast.walk(module):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        assert not any(name.startswith("fedpeft.strategies") for name in names), "imports another"
    kind = load(path.stem)
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")
    assert kind() == kind(), "settings have defaults and are compared by value"


def body(path: Path) -> Counter[str]:
    """The lines of code in a file, as Python writes them: no imports, comments, docstrings.

    Nor what the contract dictates word by word: declarations, and the verbs' signatures.
    """
    module = ast.parse(path.read_text())
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    kept = [n for n in module.body if not isinstance(n, ast.Import | ast.ImportFrom)]
    lines = "\n".join(ast.unparse(n) for n in kept).split("\n")
    own = (line.strip() for line in lines)
    return Counter(line for line in own if line and not DICTATED.match(line))


def test_two_files_share_fewer_than_12_lines_of_code() -> None:
    bodies = {path.stem: body(path) for path in FILES}
    shared = {
        (one, two): (bodies[one] & bodies[two]).total()
        for one, two in itertools.combinations(bodies, 2)
    }
    assert max(shared.values()) >= 10, "the count finds nothing"
    assert {pair: lines for pair, lines in shared.items() if lines >= 12} == {}
