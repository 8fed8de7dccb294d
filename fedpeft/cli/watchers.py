"""Who watches a run for a person: at a terminal, reading a log, or only for the last table."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from fedpeft.cli import loading, tables, units
from fedpeft.cli.bars import Bars
from fedpeft.config_load import load_recipe
from fedpeft.engine import RoundReport
from fedpeft.events import Summary, Watcher
from fedpeft.metrics import Score
from fedpeft.plan import Plan

NAMED = 3
"""Excluded clients that a round names; the others are counted."""


class Quiet(Watcher):
    """Prints the last table, nothing before it and nothing after."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.folder: str | None = None

    def planned(self, plan: Plan, folder: str) -> None:
        self.folder = folder

    def finished(self, summary: Summary) -> None:
        self._console.print(tables.result(summary))


class Progress(Watcher):
    """Progress bars on a terminal and nothing else; ``notes`` are kept for whoever prints them."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self.notes: list[str] = []

    def stage(self, name: str, rounds: int) -> None:
        self._bars.stage(name, rounds)

    def round_began(self, number: int, clients: int, tokens: int) -> None:
        self._bars.round_began(number, clients)

    def chunk_done(self, clients: int, tokens: int) -> None:
        self._bars.chunk_done(clients, tokens)

    def round_done(self, report: RoundReport, score: Score | None) -> None:
        self._bars.round_done()

    def note(self, text: str) -> None:
        self.notes.append(text)


class Lines(Watcher):
    """A line per round, warnings, and the last table; on a terminal also progress bars."""

    def __init__(self, console: Console, bars: Bars) -> None:
        self._console = console
        self._bars = bars
        self._labels = 0
        self._headed = False
        self._name, self._rounds = "", 0
        self.folder: str | None = None

    def planned(self, plan: Plan, folder: str) -> None:
        self.folder = folder
        self._labels = plan.labels
        trained = sum(plan.trainable.values())
        at_once = tables.at_once(plan)
        many = f", {plan.workers} workers" if plan.workers > 1 else ""
        many += f", {at_once} clients at once" if at_once > 1 else ""
        rounds = f"{plan.rounds} rounds over {plan.clients} clients"
        self._say(f"{plan.strategy}: {rounds}", "bold")
        self._say(f"training {trained:,} parameters on a frozen base of {plan.frozen:,}")
        self._say(f"engine {plan.engine} on {plan.device}{many}; run folder {folder}")
        self._console.print()

    def stage(self, name: str, rounds: int) -> None:
        self._name, self._rounds = name.rpartition(".")[2], rounds
        self._bars.stage(self._name, rounds)

    def round_began(self, number: int, clients: int, tokens: int) -> None:
        self._bars.round_began(number, clients)

    def chunk_done(self, clients: int, tokens: int) -> None:
        self._bars.chunk_done(clients, tokens)

    def round_done(self, report: RoundReport, score: Score | None) -> None:
        self._bars.round_done()
        if not self._headed:
            measure = "accuracy" if self._labels else "perplexity"
            head = ["", "round", "train loss", measure, "replies", "down", "up", "seconds"]
            self._row(head, "bold")
            self._headed = True
        row = [
            self._name,
            f"{report.round}/{self._rounds}",
            units.figure(report.loss),
            "" if score is None else self._measured(score),
            f"{report.replied}/{len(report.sampled)}",
            units.total(report.down),
            units.total(report.up),
            f"{report.seconds:,.1f}",
        ]
        self._row(row)
        named = list(report.excluded.items())
        for client, why in named[:NAMED]:
            self._say(f"{client} excluded: {why}", "yellow", indent=2)
        if len(named) > NAMED:
            self._say(f"and {len(named) - NAMED} more excluded", "yellow", indent=2)

    def note(self, text: str) -> None:
        self._say(f"note: {text}", "yellow")

    def finished(self, summary: Summary) -> None:
        self._bars.stop()
        self._console.print()
        self._console.print(tables.result(summary))
        self._console.print()
        counts = {"excluded": summary.excluded, "dropped out": summary.dropped}
        missing = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        lost = f"; replies missing: {missing}" if missing else ""
        many = "1 round" if summary.rounds == 1 else f"{summary.rounds} rounds"
        self._say(f"{many}; {units.clock(summary.seconds)} in all{lost}")
        sent = next(
            (sum((*row.down.values(), *row.up.values())) for row in summary.rows if row.up), 0
        )
        if sent:
            self._say(f"sent, both ways: {units.size(sent)}, {units.shares(summary.dense, sent)}")
        for line in [] if summary.fleet is None else tables.fleet(summary.fleet):
            self._say(line)
        for line in summary.privacy:
            self._say(line, "bold red" if line.startswith("VOID") else "", indent=2)
        if summary.adapter:
            recipe = load_recipe(str(Path(summary.folder) / "recipe.yaml"))
            code = loading.lines(recipe, self._labels, summary.adapter)
            self._say(f"adapter in {summary.adapter}{', to load it:' if code else ''}")
            for line in code:
                self._console.print(Text(f"  {line}", "cyan"), soft_wrap=True)

    def _measured(self, score: Score) -> str:
        return units.percent(score.accuracy) if self._labels else units.figure(score.perplexity, 2)

    def _row(self, cells: list[str], style: str = "") -> None:
        widths = (8, 10, 10, 8, 10, 10, 7)
        rest = [f"{cell:>{width}}" for cell, width in zip(cells[1:], widths, strict=True)]
        self._say(f"{cells[0][:11]:<11}{' '.join(rest)}", style)

    def _say(self, text: str, style: str = "", indent: int = 0) -> None:
        if self._console.is_terminal:
            self._console.print(Padding(Text(text, style), (0, 0, 0, indent)))
        else:
            self._console.print(Text(" " * indent + text), soft_wrap=True)
