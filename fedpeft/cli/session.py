"""One run under the eyes of a watcher: output, bars, logs and failures put together."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
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
    """What a command says while it works, and to whom besides.

    log: a file that gets structured logs. metrics_port: where Prometheus scrapes; 0: nowhere.
    """

    quiet: bool = False
    json: bool = False
    verbose: bool = False
    log: Path | None = None
    metrics_port: int = 0


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
        start(stack.enter_context(_observed(watchers[0], mode)))


@contextlib.contextmanager
def _observed(watcher: Watcher, mode: Mode) -> Iterator[Watcher]:
    """The watcher, with those that ``mode`` asks for beside it."""
    if mode.log is None and not mode.metrics_port:
        yield watcher
        return
    from fedpeft.observe import watchers

    with contextlib.ExitStack() as stack:
        every = [watcher]
        if mode.log is not None:
            stack.enter_context(watchers.logged(mode.log, "--log"))
            every.append(watchers.LogLines())
        if mode.metrics_port:
            every.append(stack.enter_context(watchers.metrics(mode.metrics_port, "--metrics-port")))
        yield watchers.Several(every)
