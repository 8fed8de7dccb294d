"""``fedpeft check-strategy``: the conformance kit on a strategy, and what it prints."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from fedpeft.errors import FedpeftError

if TYPE_CHECKING:
    from fedpeft.conformance import Property, Verdict
    from fedpeft.strategy import Strategy

STYLES = {"holds": "green", "broken": "bold red", "skipped": "dim"}


def strategy(name: str, settings: Sequence[str]) -> Strategy[Any]:
    """The strategy of a shipped name, a module, or a Python file, with ``key=value`` settings.

    Modules are looked for in the working folder too. Raises FedpeftError for a module that does not
    exist, cannot be imported, or holds no strategy, and for a wrong setting.
    """
    from fedpeft.config_load import parse_override
    from fedpeft.strategy import build

    given: dict[str, Any] = {}
    for text in settings:
        given |= parse_override(f"strategy.{text}")["strategy"]
    module = _file(Path(name)) if name.endswith(".py") else name
    sys.path.insert(0, str(Path.cwd()))
    try:
        return build(module, given)
    except FedpeftError:
        raise
    except Exception as error:
        raise FedpeftError(
            f"{name!r} cannot be imported ({type(error).__name__}: {error}): mend it, or see the "
            f"traceback with --verbose."
        ) from error


def _file(path: Path) -> str:
    """The module name of a Python file, whose folder goes on the path."""
    from fedpeft.strategy import available

    if not path.is_file():
        raise FedpeftError(f"{str(path)!r} is no file: give a Python file, or a module's name.")
    if path.stem in available():
        raise FedpeftError(
            f"{str(path)!r} has the name of a strategy that ships with fedpeft: rename the file, "
            f"or give the name {path.stem} for the one that ships."
        )
    sys.path.insert(0, str(path.resolve().parent))
    return path.stem


def properties(deep: bool, oracle: str | None) -> tuple[Property, ...]:
    """The properties to check; ``oracle`` is the dotted name of a function of that type."""
    from fedpeft.conformance import PROPERTIES, agrees_with

    found: tuple[Property, ...] = PROPERTIES
    if oracle is not None:
        module, _, function = oracle.rpartition(".")
        try:
            found = (*found, agrees_with(vars(importlib.import_module(module))[function]))
        except (ImportError, KeyError, ValueError) as error:
            raise FedpeftError(
                f"--oracle={oracle!r} is no function of an importable module ({error}): give "
                f"MODULE.FUNCTION, e.g. my_tests.oracle."
            ) from error
    if deep:
        from fedpeft.conformance.deep import PROPERTIES as DEEP

        found = (*found, *DEEP)
    return found


def table(verdicts: Iterable[Verdict]) -> Table:
    """A row per property: its name, the verdict, what was found."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("property", ratio=2, min_width=24)
    shown.add_column("verdict", no_wrap=True)
    shown.add_column("found", ratio=3, overflow="fold")
    for line in verdicts:
        style = STYLES[line.verdict]
        found = Text(line.found, "" if line.verdict == "broken" else "dim")
        shown.add_row(Text(line.property), Text(line.verdict, style), found)
    return shown


def summary(name: str, verdicts: Sequence[Verdict]) -> str:
    """The last line: how many properties hold, are broken, were skipped."""
    count = Counter(line.verdict for line in verdicts)
    told = f"{count['holds']} hold, {count['broken']} broken, {count['skipped']} skipped"
    return f"{name}: of {len(verdicts)} properties {told}."
