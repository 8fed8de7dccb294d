"""Metrics in Prometheus' text format, for a scrape on loopback and on nothing else.

Whoever has an account on the machine can read them: clients are in them by name, their data are
not. Needs the extra ``fedpeft[metrics]``. Counters begin at zero with the process, as Prometheus
expects; gauges of budgets are those of the whole run, read from its folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpeft.config import Recipe
from fedpeft.config_load import parse_recipe
from fedpeft.engine import RoundReport
from fedpeft.errors import FedpeftError
from fedpeft.events import Summary, Watcher
from fedpeft.metrics import Score
from fedpeft.observe.progress import Spent, ledger_of, progress, spent
from fedpeft.observe.reasons import reason_class
from fedpeft.plan import Plan
from fedpeft.record.folder import RunFolder

HOST = "127.0.0.1"

NAMED = 1000
"""Clients up to which exclusions are counted for each; beyond, ``client`` is empty."""

ROUND_SECONDS = (1, 5, 15, 60, 300, 900, 3600, 14400)


def check_port(port: int, setting: str) -> None:
    """Raises FedpeftError for what is no port, and where prometheus-client is not installed."""
    if not 0 < port < 65536:
        raise FedpeftError(f"{setting}={port} must be a port of this machine, from 1 to 65535.")
    if importlib.util.find_spec("prometheus_client") is None:
        raise FedpeftError(
            f"{setting}={port} needs prometheus-client, which is not installed: pip install "
            f"'fedpeft[metrics]', or leave {setting} out."
        )


class _Registry:
    """Metrics of one process, and the server that answers with them."""

    def __init__(self) -> None:
        self._library: Any = importlib.import_module("prometheus_client")
        self._registry: Any = self._library.CollectorRegistry()
        self._server: Any = None

    def counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Any:
        return self._library.Counter(f"fedpeft_{name}", text, labels, registry=self._registry)

    def gauge(self, name: str, text: str) -> Any:
        return self._library.Gauge(f"fedpeft_{name}", text, registry=self._registry)

    def histogram(
        self, name: str, text: str, bins: tuple[float, ...], labels: tuple[str, ...] = ()
    ) -> Any:
        made = self._library.Histogram
        return made(f"fedpeft_{name}", text, labels, buckets=bins, registry=self._registry)

    def text(self) -> str:
        """What a scrape gets."""
        found: bytes = self._library.generate_latest(self._registry)
        return found.decode()

    def serve(self, port: int, setting: str = "metrics-port") -> None:
        """Answers scrapes on loopback, in a thread, until ``close``. Raises FedpeftError."""
        try:
            start = self._library.start_http_server
            self._server, self._thread = start(port, HOST, self._registry)
        except OSError as error:
            raise FedpeftError(
                f"{setting}={port}: {HOST}:{port} cannot be served "
                f"({error.strerror or error}): choose another port."
            ) from error

    def close(self) -> None:
        """Answers no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None


class Metrics(Watcher):
    """A run's own rounds, not those of its baselines. See docs/observability.md for the names."""

    def __init__(self) -> None:
        self.registry = made = _Registry()
        self._strategy, self._named, self._is_own = "", True, True
        self._planned = made.gauge("rounds_planned", "Rounds of the recipe.")
        self._round = made.gauge("round", "The last complete round.")
        self._rounds = made.counter("rounds", "Complete rounds.")
        self._sampled = made.counter("sampled", "Clients asked, over all rounds.")
        self._replies = made.counter("replies", "Valid replies.")
        labels = ("client", "reason")
        self._excluded = made.counter("exclusions", "Replies missing or refused.", labels)
        self._dropped = made.counter("dropouts", "Dropouts that were simulated.")
        labels = ("direction", "kind")
        self._bytes = made.counter("bytes", "Bytes of messages; down is to clients.", labels)
        self._seconds = made.histogram("round_seconds", "Time of a round.", ROUND_SECONDS)
        self._loss = made.gauge("train_loss", "Mean training loss of the last round, nats.")
        self._test_loss = made.gauge("test_loss", "Loss on the test set, nats.")
        self._accuracy = made.gauge("test_accuracy", "Accuracy on the test set.")
        self._ended = made.gauge("run_ended", "1 once the run is complete.")
        self._budget = made.gauge("bytes_budget", "comms.budget in bytes; +Inf without one.")
        self._left = made.gauge("bytes_budget_left", "What is left of it.")
        self._epsilon = made.gauge("epsilon_spent", "Largest epsilon of any client so far.")
        self._most = made.gauge("epsilon_budget", "privacy.epsilon; +Inf without one.")
        for unknown in (self._loss, self._test_loss, self._accuracy):
            unknown.set(math.nan)

    def planned(self, plan: Plan, folder: str) -> None:
        self._strategy, self._named = plan.strategy, plan.clients <= NAMED
        self._planned.set(plan.rounds)
        run = RunFolder.open(Path(folder))
        recipe = parse_recipe(run.recipe(), folder)
        before = progress(run.path, recipe)
        self._round.set(before.rounds)
        self._budget.set(before.budget or math.inf)
        sent = sum((*before.down.values(), *before.up.values()))
        self._left.set(before.budget - sent if before.budget else math.inf)
        self._most.set(recipe.privacy.epsilon or math.inf)
        self._epsilon.set_function(_epsilon(lambda: ledger_of(run.path), recipe))

    def stage(self, name: str, rounds: int) -> None:
        self._is_own = name == self._strategy

    def round_done(self, report: RoundReport, score: Score | None) -> None:
        if not self._is_own:
            return
        self._round.set(report.round)
        self._rounds.inc()
        self._sampled.inc(len(report.sampled))
        self._replies.inc(report.replied)
        self._dropped.inc(len(report.dropped))
        for client, why in report.excluded.items():
            self._excluded.labels(client if self._named else "", reason_class(why)).inc()
        for direction, books in (("down", report.down), ("up", report.up)):
            for kind, size in books.items():
                self._bytes.labels(direction, kind).inc(size)
                self._left.dec(size)
        self._seconds.observe(report.seconds)
        self._loss.set(report.loss)
        if score is not None:
            self._test_loss.set(score.loss)
            self._accuracy.set(score.accuracy)

    def finished(self, summary: Summary) -> None:
        self._ended.set(1)


def _epsilon(where: Callable[[], Path], recipe: Recipe) -> Callable[[], float]:
    """What the ledger holds at the time of a scrape, priced once for every state of the file.

    where: says where it is by then. NaN without a ledger, and where it cannot be read: a scrape
    must not fail for one figure.
    """
    known: dict[int, Spent | None] = {}

    def price() -> float:
        ledger = where()
        try:
            size = ledger.stat().st_size
            if size not in known:
                known.clear()
                known[size] = spent(ledger, recipe)
        except (OSError, FedpeftError):
            return math.nan
        found = known.get(size)
        return math.nan if found is None else found.epsilon

    return price
