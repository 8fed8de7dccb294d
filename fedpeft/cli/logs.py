"""What other libraries may say during a command, decided in one place."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from fedpeft.logs import ROUNDS, is_own

_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "FLWR_LOG_LEVEL": "ERROR",
    "RAY_LOG_TO_DRIVER": "0",
}
"""Read by the libraries when they are imported, here and in the processes that they start."""


class _Lines(logging.Handler):
    """Prints records through a console, so that they appear above its progress bars."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        self._console.print(Text(self.format(record), style), soft_wrap=True)


def _without_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


def _from(others: int, own: int) -> Callable[[logging.LogRecord], bool]:
    """Records from these levels on, for a handler: a log file beside it may ask for more."""

    def shows(record: logging.LogRecord) -> bool:
        return record.name != ROUNDS and record.levelno >= (own if is_own(record) else others)

    return shows


@contextmanager
def shown(console: Console, quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """Sends what is logged to ``console``; enter it before torch and its like are imported.

    Of fedpeft: with ``verbose`` everything from INFO, with ``quiet`` errors, else warnings; those
    with a traceback are details (the user hears of an excluded client otherwise) and verbose too.
    Of the other libraries: with ``verbose`` Python's warnings and what they log as one, else
    errors. Their progress bars never; a variable that the user has set stands.
    """
    before = dict(os.environ)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    handler, root, own = _Lines(console), logging.getLogger(), logging.getLogger("fedpeft")
    if not verbose:
        handler.addFilter(_without_traceback)
    levels = (root.level, own.level)
    root.setLevel(logging.WARNING if verbose else logging.ERROR)
    own.setLevel(logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING)
    handler.addFilter(_from(root.level, own.level))
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        root.setLevel(levels[0])
        own.setLevel(levels[1])
        for name in _QUIET.keys() - before.keys():
            os.environ.pop(name, None)
