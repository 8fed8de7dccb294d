"""What a run tells whoever watches it; the command line shows it, a script may ignore it."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedpeft.comms.ledger import Bytes
from fedpeft.engine import RoundReport
from fedpeft.metrics import Score
from fedpeft.plan import Plan
from fedpeft.timed import FleetSummary


@dataclass(frozen=True)
class Outcome:
    """One row of the last table.

    name: ``untrained``, ``local``, the strategy, or ``centralised``. score: on the global test set
    (``local``: the mean over the clients' adapters). mean, worst: over the clients' scores on their
    own hold-outs, the mean and the mean of the worst tenth; accuracy for classification, loss for
    language modelling (worst = largest). down, up: bytes in all; empty where nothing is sent.
    """

    name: str
    score: Score
    mean: float
    worst: float
    down: Bytes = field(default_factory=dict)
    up: Bytes = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Summary:
    """The end of a run: the table's rows in order, rounds done, where the adapter is.

    dense: bytes of as many messages with all trainable numbers as float32, names not counted.
    privacy: the privacy statement, line by line; empty without privacy. fleet: what the run took by
    its fleet's clock; None without one.
    """

    task: str
    rows: tuple[Outcome, ...]
    rounds: int
    excluded: int
    dropped: int
    folder: str
    adapter: str
    seconds: float
    dense: int
    privacy: tuple[str, ...] = ()
    fleet: FleetSummary | None = None


class Watcher:
    """Does nothing at each event; subclasses show what they want. All methods are optional."""

    def planned(self, plan: Plan, folder: str) -> None:
        """The run is about to start (or to go on)."""

    def stage(self, name: str, rounds: int) -> None:
        """A training begins: the strategy's name, or a baseline's; it has so many rounds."""

    def round_began(self, number: int, clients: int, tokens: int) -> None:
        """A round begins with so many clients (as sampled) and about so many tokens."""

    def chunk_done(self, clients: int, tokens: int) -> None:
        """So many clients of the round are trained, on so many tokens."""

    def round_done(self, report: RoundReport, score: Score | None) -> None:
        """A round is over; ``score`` on the global test set where it was measured."""

    def note(self, text: str) -> None:
        """Something the user should know (a corrupt checkpoint skipped, a client excluded)."""

    def finished(self, summary: Summary) -> None:
        """The run is complete."""
