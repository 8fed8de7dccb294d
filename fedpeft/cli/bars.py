"""The two progress bars of a run: its rounds, and the clients of the round."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

NAME, BAR = 11, 20
"""Columns of a bar's name (the longest baseline's) and of the bar."""


@dataclass
class _Pace:
    """When something began, how much of it was done then (counted from 0), and when it will end."""

    began: float = 0.0
    first: float = 0.0
    end: float | None = None

    def at(self, done: float, total: float) -> None:
        """So much of ``total`` is done now."""
        if done > self.first:
            now = monotonic()
            each = (now - self.began) / (done - self.first)
            self.end = now + each * max(0.0, total - done)

    @property
    def left(self) -> str:
        """Minutes and seconds still to go; counts down between two calls of ``at``."""
        if self.end is None:
            return "--:--"
        seconds = max(0, round(self.end - monotonic()))
        hours, rest = divmod(seconds, 3600)
        minutes = f"{rest // 60:02d}:{rest % 60:02d}"
        return f"{hours}:{minutes}" if hours else minutes


class Bars:
    """Bars at the bottom of the terminal; nothing at all where the output is no terminal.

    A context manager: whatever ends the block, the terminal is left clean. The bars are two lines
    from beginning to end: rich writes over what was printed above when their height changes while
    its own thread redraws them.
    """

    def __init__(self, console: Console, shown: bool = True) -> None:
        self._spinner = Spinner("dots", style="green")
        self._name = ""
        self._rounds = self._number = self._sampled = self._trained = self._tokens = 0
        self._run, self._round = _Pace(), _Pace()
        self._rate = ""
        self._live = (
            Live(get_renderable=self.draw, console=console, transient=True, refresh_per_second=8)
            if shown and console.is_interactive
            else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Removes the bars."""
        if self._live:
            self._live.stop()

    def stage(self, name: str, rounds: int) -> None:
        """A training of so many rounds begins."""
        self._name, self._rounds, self._number = name, rounds, 0

    def round_began(self, number: int, clients: int) -> None:
        """Round ``number``, from 1, with so many clients."""
        if not self._number:  # of this stage here: after a resume that is not round 1
            self._run = _Pace(monotonic(), number - 1)
        self._number, self._sampled = number, clients
        self._trained = self._tokens = 0
        self._round, self._rate = _Pace(monotonic()), ""
        if self._live:
            self._live.refresh()

    def chunk_done(self, clients: int, tokens: int) -> None:
        """So many more clients of the round are trained, on so many tokens."""
        self._trained += clients
        self._tokens += tokens
        self._round.at(self._trained, self._sampled)
        self._run.at(self._done, self._rounds)
        self._rate = f"{self._tokens / max(monotonic() - self._round.began, 1e-9):,.0f} tokens/s"

    def round_done(self) -> None:
        """The round is over, whoever of its clients replied."""
        self._trained = self._sampled
        self._run.at(self._number, self._rounds)

    @property
    def _done(self) -> float:
        """Rounds done, with the part of this round's clients that is."""
        if not self._number:
            return 0.0
        return self._number - 1 + min(1.0, self._trained / max(1, self._sampled))

    def draw(self) -> RenderableType:
        """The bars as they are now, two lines."""
        grid = Table.grid(padding=(0, 1))
        for width in (1, NAME, BAR, None, None, None):
            grid.add_column(width=width, no_wrap=True)
        if not self._name:
            grid.add_row(self._spinner, "loading")
            grid.add_row("")
            return grid
        rounds = f"round {max(1, self._number)}/{self._rounds}"
        run = ProgressBar(self._rounds, self._done, BAR)
        grid.add_row(self._spinner, self._name, run, rounds, "", f"ETA {self._run.left}")
        clients = ProgressBar(max(1, self._sampled), self._trained, BAR)
        many = f"{self._trained}/{self._sampled}"
        rate, left = Text(self._rate, "cyan"), f"ETA {self._round.left}"
        grid.add_row("", "clients", clients, many, rate, left)
        return grid
