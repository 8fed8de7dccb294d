"""One run under the eyes of a watcher: output, bars, logs and failures put together."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from fedpeft.cli import logs
from fedpeft.cli.bars import Bars
from fedpeft.cli.failures import reported, signals

if TYPE_CHECKING:
    from fedpeft.cli.jsonl import Json
    from fedpeft.cli.watchers import Lines, Quiet
    from fedpeft.events import Summary, Watcher


@dataclass(frozen=True)
class Mode:
    """What a command says while it works."""

    quiet: bool = False
    json: bool = False
    verbose: bool = False


def play(start: Callable[[Watcher], Summary], mode: Mode) -> None:
    """Calls ``start`` with the watcher for ``mode``; its failures become messages and exit codes.

    Heavy imports belong inside ``start``. With ``json`` stdout carries events alone: whatever else
    is printed goes to stderr.
    """
    out = sys.stdout
    human = Console(file=sys.stderr if mode.json else out, highlight=False)
    watchers: list[Lines | Quiet | Json] = []

    def folder() -> str | None:
        return watchers[0].folder if watchers else None

    with reported(mode.verbose, folder), signals(), contextlib.ExitStack() as stack:
        stack.enter_context(logs.shown(human, mode.quiet, mode.verbose))
        if mode.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        bars = stack.enter_context(Bars(human, shown=not (mode.quiet or mode.json)))
        if mode.json:
            from fedpeft.cli.jsonl import Json

            watchers.append(Json(out))
        else:
            from fedpeft.cli.watchers import Lines, Quiet

            watchers.append(Quiet(human) if mode.quiet else Lines(human, bars))
        start(watchers[0])
