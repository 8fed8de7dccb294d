"""Secure aggregation over Flower: the server's half, played over a grid.

Each exchange of a round is a session of ``fedpeft.secagg`` with its own number. Numbers rise for
good, also when a server starts again: they are the time in nanoseconds, or one more than the last.
A server whose clock was set back is refused by its clients until it has caught up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from fedpeft.comms.ledger import Bytes, Entry, message_bytes
from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.federation import Failure, Federation, Partial
from fedpeft.flower.federation import FlowerFederation
from fedpeft.flower.identity import simulated_identities
from fedpeft.flower.secure_client import BLOB
from fedpeft.flower.summed import Rules
from fedpeft.metrics import Score
from fedpeft.prepare import Prepared
from fedpeft.secagg.session import Session, Stage
from fedpeft.strategy import Message, Messages
from fedpeft.tree import Tree

log = logging.getLogger(__name__)

SECURE = "train.secure"
"""Flower's message type of all stages."""


def secured_in_simulation(prepared: Prepared, federation: FlowerFederation) -> Federation:
    """The federation, with simulated keys under secure aggregation if the recipe asks for it."""
    if not prepared.recipe.secure_aggregation.enabled:
        return federation
    keys = simulated_identities(prepared.recipe.seed, tuple(prepared.problem.clients))
    return SecureFlowerFederation(prepared, federation, keys)


class SecureFlowerFederation:
    """Clients on Flower's nodes, of whom the server learns sums; see ``fedpeft.federation``.

    identities: every client's public Ed25519 key, by which the server excludes forged answers; the
    clients have their own list. Raises FedpeftError where one is missing.
    """

    def __init__(
        self, prepared: Prepared, inner: FlowerFederation, identities: Mapping[str, bytes]
    ) -> None:
        unknown = sorted(set(prepared.problem.clients) - set(identities))
        if unknown:
            raise FedpeftError(
                f"{len(unknown)} clients have no public key in the list of identities, "
                f"{unknown[0]!r} first: list the key of every client."
            )
        self._inner = inner
        self._identities = identities
        self._rules = Rules(prepared)
        self._number = 0

    def clients(self) -> Mapping[str, int]:
        """As of ``inner``."""
        return self._inner.clients()

    def run(self, round: int, *stacks: Messages) -> Iterator[Messages | Failure | Partial]:
        """One Partial with the sum, as a mean, of all whose vectors arrived; else failures of all.

        Bytes up are those of all answers, refused ones included: ``masked`` for vectors, ``secagg``
        for the other stages. Those of the protocol's requests are in no book.
        """
        asked = [name for stack in stacks for name in stack.clients]
        least = self._rules.least(len(asked))
        if len(asked) < least:
            why = f"no secure sum: a round of {len(asked)} clients, {least} are needed"
            yield from (Failure(name, why) for name in asked)
            return
        sizes = self._inner.clients()
        fixed = self._rules.fixed_point(stacks[0], [sizes[name] for name in asked])
        self._number = max(self._number + 1, time.time_ns())
        keys = {name: self._identities[name] for name in asked}
        play = _Play(self._inner, Session(self._number, keys, fixed, least), round, stacks)
        try:
            play.all_stages()
        except FedpeftError as error:
            reasons, why = play.reasons(), f"no secure sum: {_short(error)}"
            yield from (Failure(name, reasons.get(name, why)) for name in asked)
            return
        total = play.session.total()
        excluded = {n: why for n, why in play.reasons().items() if n not in total.survivors}
        mean = self._rules.summed(stacks[0]).mean(total.values)
        up = tuple(Entry((name,), each) for name, each in play.up.items())
        yield Partial(mean, len(total.survivors), up, excluded)

    def evaluate(self, round: int, *stacks: Messages) -> Iterator[dict[str, Score] | Failure]:
        """As of ``inner``: scores are not summed."""
        return self._inner.evaluate(round, *stacks)

    def memory(self) -> dict[str, dict[str, Tree]]:
        """As of ``inner``."""
        return self._inner.memory()

    def restore(self, memory: Mapping[str, Mapping[str, Tree]]) -> None:
        """As of ``inner``."""
        self._inner.restore(memory)


class _Play:
    """One exchange's session over the grid. up: client -> bytes of its answers, by kind."""

    def __init__(
        self, inner: FlowerFederation, session: Session, round: int, stacks: Sequence[Messages]
    ) -> None:
        self.session = session
        self.up: dict[str, Bytes] = {}
        self._inner = inner
        self._round = round
        self._stacks = stacks
        self._faults: dict[str, str] = {}

    def all_stages(self) -> None:
        """Plays the session to its end. Raises FedpeftError where there is no sum."""
        self._inner.begin(self._round)
        while self.session.stage is not Stage.DONE:
            where = f"stage {self.session.stage.value}"
            for client, outcome in self._inner.ask(SECURE, self._round, self._requests()):
                answer = (
                    outcome.reason if isinstance(outcome, Failure) else self._blob(client, outcome)
                )
                if isinstance(answer, bytes):
                    self.session.receive(client, answer)
                else:
                    self._faults[client] = f"{where}: {answer}"
                    log.warning("round %d: %s, %s", self._round, client, self._faults[client])
            self.session.close()

    def reasons(self) -> dict[str, str]:
        """Client -> why it fell silent or was excluded, in whichever stage."""
        return {**self.session.excluded, **self._faults}

    def _requests(self) -> list[Messages]:
        """This stage's messages; with ``mask`` goes what the clients train on."""
        blobs = self.session.requests()
        if self.session.stage is not Stage.MASK:
            return [Messages(tuple(blobs), blobs={BLOB: tuple(blobs.values())})]
        found = []
        for stack in self._stacks:
            here = stack.rows([k for k, name in enumerate(stack.clients) if name in blobs])
            own = tuple(blobs[name] for name in here.clients)
            found.append(replace(here, blobs={**here.blobs, BLOB: own}))
        return [stack for stack in found if len(stack)]

    def _blob(self, client: str, reply: Message) -> bytes | str:
        """The answer in a reply, which is counted; or what is wrong with it."""
        kind = "masked" if self.session.stage is Stage.MASK else "secagg"
        own = self.up.setdefault(client, {})
        own[kind] = own.get(kind, 0) + sum(message_bytes(reply).values())
        if reply.trees or reply.scalars or set(reply.blobs) != {BLOB}:
            return f"the reply must hold the blob {BLOB!r} and nothing else"
        return reply.blobs[BLOB]


def _short(error: FedpeftError) -> str:
    """The reason without the list of all clients, each of which has its own."""
    text = str(error)
    return text.partition("; the round's sum")[0] if isinstance(error, QuorumError) else text
