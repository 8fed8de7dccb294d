"""How a command fails: what the user reads on stderr, and the exit code.

====  ==========================================================================
0     done
1     a defect of fedpeft: traceback
2     a fault in what the user gave: one paragraph (argument errors as well)
3     a round had too few valid replies; the run can be resumed
130   interrupted (Ctrl-C); the run can be resumed
143   ended by SIGTERM; the run can be resumed
====  ==========================================================================
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import click
import typer
from rich.console import Console
from rich.text import Text

from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.redact import without_secrets

DEFECT, FAULT, QUORUM, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM; whatever cleans up after Ctrl-C does so after this."""


@contextmanager
def signals() -> Iterator[None]:
    """SIGTERM ends what is inside as Ctrl-C does; a second signal of either ends the process now.

    In other threads than the main one Python takes no signals, and nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}

    def first(number: int, frame: FrameType | None) -> None:
        for own in kinds:
            signal.signal(own, _now)
        raise kinds[signal.Signals(number)]

    before = {number: signal.signal(number, first) for number in kinds}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _now(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


@contextmanager
def reported(
    verbose: bool = False, folder: Callable[[], str | None] | None = None
) -> Iterator[None]:
    """Turns what escapes the block into a message on stderr and an exit code.

    verbose: tracebacks for every failure. folder: for a run, the folder that can be resumed by now.
    """
    try:
        yield
    except (typer.Exit, click.ClickException, BrokenPipeError):
        raise
    except KeyboardInterrupt as stop:
        _say(f"interrupted.{_way_on(folder)}", verbose)
        raise typer.Exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED) from None
    except QuorumError as error:
        _say(f"error: {error}{_way_on(folder)}", verbose)
        raise typer.Exit(QUORUM) from None
    except FedpeftError as error:
        _say(f"error: {error}", verbose)
        raise typer.Exit(FAULT) from None
    except Exception as error:
        _say(
            f"This is a defect of fedpeft, not a fault of yours ({type(error).__name__}). "
            f"Please report it with the traceback above.",
            True,
        )
        raise typer.Exit(DEFECT) from None


def _say(text: str, trace: bool) -> None:
    if trace:
        sys.stderr.write(without_secrets(traceback.format_exc()))
    console = Console(stderr=True, highlight=False)
    console.print(Text(without_secrets(text), "red"), soft_wrap=not console.is_terminal)


def _way_on(folder: Callable[[], str | None] | None) -> str:
    if folder is None:
        return ""
    path = folder()
    if path is None:
        return " Nothing was trained yet."
    return f" The run can go on: fedpeft resume {shlex.quote(path)}"
