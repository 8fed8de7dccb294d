"""What other libraries may say during a command, decided in one place."""

from __future__ import annotations

import logging
import os

from rich.console import Console
from rich.text import Text

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


def set_up(console: Console, quiet: bool, verbose: bool) -> None:
    """Sends what is logged to ``console``; call it before torch and its like are imported.

    Of fedpeft: errors with ``quiet``, everything from INFO with ``verbose``, else warnings. Of the
    other libraries: warnings with ``verbose``, else errors, and no progress bars.
    """
    for name, value in ({} if verbose else _QUIET).items():
        os.environ.setdefault(name, value)
    logging.captureWarnings(True)
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _Lines)]:
        root.removeHandler(old)
    root.addHandler(_Lines(console))
    root.setLevel(logging.WARNING if verbose else logging.ERROR)
    own = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    logging.getLogger("fedpeft").setLevel(own)
