"""Watchers put together: as log lines, as metrics, several at once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedpeft import logs
from fedpeft.engine import RoundReport
from fedpeft.errors import FedpeftError
from fedpeft.events import Summary, Watcher
from fedpeft.metrics import Score
from fedpeft.observe.prometheus import Metrics, check_port
from fedpeft.plan import Plan


class Several(Watcher):
    """Tells every event to each, in order."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = tuple(watchers)

    def planned(self, plan: Plan, folder: str) -> None:
        for one in self._watchers:
            one.planned(plan, folder)

    def stage(self, name: str, rounds: int) -> None:
        for one in self._watchers:
            one.stage(name, rounds)

    def round_began(self, number: int, clients: int, tokens: int) -> None:
        for one in self._watchers:
            one.round_began(number, clients, tokens)

    def chunk_done(self, clients: int, tokens: int) -> None:
        for one in self._watchers:
            one.chunk_done(clients, tokens)

    def round_done(self, report: RoundReport, score: Score | None) -> None:
        for one in self._watchers:
            one.round_done(report, score)

    def note(self, text: str) -> None:
        for one in self._watchers:
            one.note(text)

    def finished(self, summary: Summary) -> None:
        for one in self._watchers:
            one.finished(summary)


class LogLines(Watcher):
    """A line in the log for each event but chunks, with its round and, of exclusions, client."""

    def __init__(self, name: str = logs.ROUNDS) -> None:
        self._log = logging.getLogger(name)

    def planned(self, plan: Plan, folder: str) -> None:
        what = "%s: %d rounds over %d clients, engine %s on %s"
        self._log.info(what, plan.strategy, plan.rounds, plan.clients, plan.engine, plan.device)
        self._log.info("the run is recorded in %s", folder)

    def stage(self, name: str, rounds: int) -> None:
        self._log.info("training begins: %s, %d rounds", name, rounds)

    def round_began(self, number: int, clients: int, tokens: int) -> None:
        self._log.info("round %d begins: %d clients", number, clients, extra={"round": number})

    def round_done(self, report: RoundReport, score: Score | None) -> None:
        at = {"round": report.round}
        what = "round %d: %d replies, loss %.4f"
        self._log.info(what, report.round, report.replied, report.loss, extra=at)
        for client, reason in report.excluded.items():
            own = at | {"client": client}
            self._log.warning("round %d: %s excluded: %s", report.round, client, reason, extra=own)
        if score is not None:
            figures = (score.loss, score.accuracy)
            self._log.info(
                "round %d: test loss %.4f, accuracy %.4f", report.round, *figures, extra=at
            )

    def note(self, text: str) -> None:
        self._log.warning("%s", text)

    def finished(self, summary: Summary) -> None:
        for line in summary.privacy:
            self._log.info("privacy: %s", line)
        done = (summary.rounds, summary.excluded, summary.seconds)
        self._log.info("complete: %d rounds, %d excluded, %.1f s", *done)
        self._log.info("the adapter is in %s", summary.adapter or "(it has no global one)")


@contextmanager
def watching(config: Mapping[str, object], logger: str) -> Iterator[Watcher]:
    """Who watches a run in a server's process, until the end of the block.

    ``logs.bind(run=...)`` inside says whose lines follow, to the end of the block too.

    config: run config: ``log``, a file for structured logs (``fedpeft.logs``), and
    ``metrics-port``, where Prometheus scrapes on loopback; empty and 0 are neither. logger: the
    name of the one whose lines a person reads. Raises FedpeftError for settings that cannot be.
    """
    path, text = str(config.get("log") or ""), str(config.get("metrics-port") or "0")
    if not text.isdecimal():
        raise FedpeftError(f"metrics-port={text!r} must be a port of this machine, or 0 for none.")
    with contextlib.ExitStack() as stack:
        stack.enter_context(logs.scope())
        if path:
            stack.enter_context(logged(Path(path), "log"))
        watchers: list[Watcher] = [LogLines(logger)]
        if int(text):
            watchers.append(stack.enter_context(metrics(int(text), "metrics-port")))
        yield Several(watchers)


@contextmanager
def logged(path: Path, setting: str) -> Iterator[None]:
    """Structured logs are appended to ``path`` in the block. Raises FedpeftError."""
    try:
        end = logs.write_to(path)
    except OSError as error:
        raise FedpeftError(
            f"{setting}={str(path)!r} cannot be written ({error.strerror or error}): name another "
            f"file."
        ) from error
    try:
        yield
    finally:
        end()


@contextmanager
def metrics(port: int, setting: str) -> Iterator[Metrics]:
    """A watcher whose figures are served on loopback in the block. Raises FedpeftError."""
    check_port(port, setting)
    made = Metrics()
    made.registry.serve(port, setting)
    try:
        yield made
    finally:
        made.registry.close()
