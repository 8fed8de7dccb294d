"""The two progress bars of a run: its rounds, and the clients of the round."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class Bars:
    """Bars at the bottom of the terminal; nothing at all where the output is no terminal.

    A context manager: whatever ends the block, the terminal is left clean.
    """

    def __init__(self, console: Console, shown: bool = True) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[done]}"),
            TextColumn("{task.fields[rate]}", style="cyan"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not (shown and console.is_interactive),
            speed_estimate_period=3600,
        )
        self._rounds = self._progress.add_task("loading", total=None, done="", rate="")
        self._clients = self._progress.add_task("", total=1, visible=False, done="", rate="")
        self._resumed = True
        self._number = self._count = self._trained = self._sampled = self._tokens = 0
        self._began = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Removes the bars."""
        self._progress.stop()

    def stage(self, name: str, rounds: int) -> None:
        """A training of so many rounds begins."""
        self._count, self._resumed = rounds, True
        self._progress.reset(self._rounds, total=rounds, description=name, done="", rate="")

    def round_began(self, number: int, clients: int) -> None:
        """Round ``number``, from 1, with so many clients."""
        if self._resumed:  # the rounds before a resume say nothing about the speed
            self._progress.reset(self._rounds, completed=number - 1, done="", rate="")
            self._resumed = False
        self._number, self._sampled = number, clients
        self._trained = self._tokens = 0
        self._began = time.monotonic()
        self._progress.update(self._rounds, done=f"round {number}/{self._count}")
        self._progress.reset(
            self._clients,
            total=max(1, clients),
            visible=True,
            description="clients",
            done=f"0/{clients}",
            rate="",
        )

    def chunk_done(self, clients: int, tokens: int) -> None:
        """So many more clients of the round are trained, on so many tokens."""
        self._trained += clients
        self._tokens += tokens
        rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
        self._progress.update(
            self._clients,
            completed=self._trained,
            done=f"{self._trained}/{self._sampled}",
            rate=f"{rate:,.0f} tokens/s",
        )
        share = min(1.0, self._trained / max(1, self._sampled))
        self._progress.update(self._rounds, completed=self._number - 1 + share)

    def round_done(self) -> None:
        """The round is over."""
        self._progress.update(self._rounds, completed=self._number)
        self._progress.update(self._clients, visible=False)
