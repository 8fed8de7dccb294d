"""What a run will send, before it is run: its rounds with clients that do not train.

The run's own strategy, codecs and secure sums play every round, with the clients and dropouts that
the seed draws; only local training is left out, in whose place adapters move a little at random. So
every message has the length that it will have, unless lengths depend on what is learned.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fedpeft.codecs.settings import varies
from fedpeft.comms.ledger import Bytes, Ledger, messages
from fedpeft.config_comms import budget_of
from fedpeft.defence import Attackers, RobustRule
from fedpeft.engine import AbortedRoundError, Seam, play_round
from fedpeft.errors import FedpeftError
from fedpeft.postprocess import Chain
from fedpeft.prepare import Prepared
from fedpeft.still import Still
from fedpeft.timed import Timed


@dataclass(frozen=True)
class Forecast:
    """Bytes of all messages of a run.

    down, up: by kind. rounds: both ways, round by round. requests, replies: how many messages.
    dense: what so many messages with all trainable numbers as float32 would take, without names.
    exact: whether lengths are certain; else they depend on what clients learn, or on secret draws
    of who takes part, and are typical. times: seconds of each round by the fleet's clock, where the
    recipe has a fleet.
    """

    down: Bytes
    up: Bytes
    rounds: tuple[int, ...]
    requests: int
    replies: int
    dense: int
    exact: bool
    times: tuple[float, ...] = ()


class BytesSpentError(FedpeftError):
    """The next round would go beyond ``comms.budget``."""


@dataclass(frozen=True)
class Purse:
    """The bytes that a run may send: ``comms.budget``, and what each round will take of it."""

    budget: int
    rounds: tuple[int, ...]

    @staticmethod
    def of(prepared: Prepared) -> Purse | None:
        """None without a budget. Raises BytesSpentError where it does not pay for one round."""
        budget = budget_of(prepared.recipe.comms)
        if not budget:
            return None
        purse = Purse(budget, forecast(prepared).rounds)
        purse.check(1, 0)
        return purse

    def check(self, number: int, spent: int) -> None:
        """Raises BytesSpentError where round ``number`` does not fit in what is left."""
        need = self.rounds[min(number, len(self.rounds)) - 1] if self.rounds else 0
        if spent + need > self.budget:
            raise BytesSpentError(
                f"round {number}: it would send {need:,} bytes, and {self.budget - spent:,} of "
                f"comms.budget are left. "
                + (
                    "The adapter of the last round is kept."
                    if number > 1
                    else "Raise comms.budget, sample fewer clients, or set comms.up.codec and "
                    "comms.down.codec."
                )
            )


def forecast(prepared: Prepared) -> Forecast:
    """The bytes of the run's rounds; those that the quorum stops are not among them."""
    own = dataclasses.replace(prepared)  # nothing of what the run itself will remember
    recipe, strategy = own.recipe, own.strategy
    links = [x for x in own.post.links if not isinstance(x, RobustRule | Attackers)]
    seam, federation = Seam(Chain(tuple(links))), own.secured(Still(own))
    ledger, each, state = Ledger(), list[int](), strategy.init(own.problem)
    requests = replies = short = 0
    timed, times = Timed.of(own), list[float]()
    for number in range(1, recipe.rounds.count + 1):
        try:
            if timed is not None:
                names = timed.begin(state, number)
                state, report = timed.play(state, federation, number, names, seam.post)
            else:
                state, report = play_round(
                    strategy, state, federation, recipe.rounds, recipe.seed, number, seam
                )
            short = 0
        except AbortedRoundError as error:
            report, short = error.report, short + 1
            if short > recipe.rounds.aborts:
                break
        if timed is not None:
            times.append(timed.line["seconds"])
        ledger.add(report.down, report.up)
        each.append(sum(report.down.values()) + sum(report.up.values()))
        requests += messages(report.sent)
        replies += messages(report.came)
    dense = 4 * own.network.layout.size * (requests + replies)
    books = (ledger.down, ledger.up, tuple(each), requests, replies)
    return Forecast(*books, dense, _exact(own), tuple(times))


def _exact(prepared: Prepared) -> bool:
    recipe, terms = prepared.recipe, prepared.terms
    secret = terms is not None and terms.sampled == "poisson"
    masked = recipe.secure_aggregation.enabled and recipe.engine.kind == "flower"
    learned = "pruned" in prepared.strategy.asks()
    return not (learned or secret or masked or varies(recipe.comms.up) or varies(recipe.comms.down))
