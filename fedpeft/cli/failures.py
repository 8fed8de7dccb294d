"""How a command fails: what the user reads on stderr, and the exit code.

====  ==========================================================================
0     done
1     a defect of fedpeft: traceback
2     a fault in what the user gave: one paragraph (argument errors as well)
3     a round had too few valid replies; the run can be resumed
130   interrupted (Ctrl-C); the run can be resumed
====  ==========================================================================
"""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
import typer
from rich.console import Console
from rich.text import Text

from fedpeft.errors import FedpeftError, QuorumError

DEFECT, FAULT, QUORUM, INTERRUPTED = 1, 2, 3, 130


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
    except KeyboardInterrupt:
        _say(f"interrupted.{_way_on(folder)}", verbose)
        raise typer.Exit(INTERRUPTED) from None
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
        sys.stderr.write(traceback.format_exc())
    console = Console(stderr=True, highlight=False)
    console.print(Text(text, "red"), soft_wrap=not console.is_terminal)


def _way_on(folder: Callable[[], str | None] | None) -> str:
    if folder is None:
        return ""
    path = folder()
    if path is None:
        return " Nothing was trained yet."
    return f" The run can go on: fedpeft resume {shlex.quote(path)}"
