"""``fedpeft audit``: the attacks on a run, and the table of what they got."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpeft.cli import logs
from fedpeft.cli.bars import Bars
from fedpeft.cli.failures import reported

if TYPE_CHECKING:
    from fedpeft.audit.report import Finding

STYLES = {"REFUTED": "bold red", "not refuted": "green"}


def refuted(folder: str, canaries: int, seed: int, json: bool, verbose: bool) -> bool:
    """Audits a run and prints what was found; whether that contradicts the run's claim.

    With ``json`` stdout carries events alone.
    """
    out = sys.stdout
    human = Console(file=sys.stderr if json else out, highlight=False)
    with reported(verbose), contextlib.ExitStack() as stack:
        stack.enter_context(logs.shown(human, verbose=verbose))
        if json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        bars = stack.enter_context(Bars(human, shown=not json))
        from fedpeft.audit.report import refuted
        from fedpeft.audit.run import Settings, audit_run
        from fedpeft.cli.jsonl import write
        from fedpeft.cli.watchers import Progress

        watcher = Progress(bars)
        found = audit_run(folder, Settings(canaries, seed), watcher)
        bars.stop()
        if json:
            for text in watcher.notes:
                write(out, "note", {"text": text})
            for finding in found:
                write(out, "finding", dataclasses.asdict(finding))
        else:
            human.print(table(found))
            for text in watcher.notes:
                human.print(Text(f"note: {text}", "yellow"), soft_wrap=not human.is_terminal)
    return refuted(found)


def table(findings: Sequence[Finding]) -> Table:
    """A row per attack: its score and interval, the claim, and whether the claim stands."""
    from fedpeft.audit.report import HEADS, rows

    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for head in HEADS:
        shown.add_column(head, justify="left" if head in ("attack", "verdict") else "right")
    for cells in rows(findings):
        shown.add_row(*(Text(cell, STYLES.get(cell, "")) for cell in cells))
    return shown
