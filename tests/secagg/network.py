"""Clients, and a transport that loses and changes what a test asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from fedpeft.errors import FedpeftError
from fedpeft.secagg.envelope import Kind
from fedpeft.secagg.fixed import FixedPoint, Floats
from fedpeft.secagg.messages import Signatures
from fedpeft.secagg.participant import Participant
from fedpeft.secagg.primitives import SIGNATURE_BYTES, identity, sign
from fedpeft.secagg.session import Session, Stage
from fedpeft.secagg.shamir import Random
from fedpeft.secagg.simulate import masked_sum

Change = Callable[[Stage, str, bytes], bytes | None]
"""(stage, client, blob) -> the blob that arrives, or None: it is lost."""

ROUND = 7
NAME = "client-1"
"""Whom the tests of one client are about."""


def unchanged(stage: Stage, client: str, blob: bytes) -> bytes | None:
    return blob


def seeded(seed: int) -> Random:
    return np.random.default_rng(seed).bytes


@dataclass
class World:
    """n clients with keys, vectors and a fixed point of 30 coordinates and a weight."""

    clients: int
    bits: int = 32
    seed: int = 0
    secrets: dict[str, bytes] = field(default_factory=dict)
    identities: dict[str, bytes] = field(default_factory=dict)
    vectors: dict[str, Floats] = field(default_factory=dict)
    participants: dict[str, Participant] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.seed)
        names = [f"client-{k}" for k in range(self.clients)]
        self.secrets = {name: draw.bytes(32) for name in names}
        self.identities = {name: identity(secret) for name, secret in self.secrets.items()}
        self.fixed = FixedPoint(self.bits, 0.5, self.clients, 30, 3.0, (3.0,))
        self.vectors = {
            n: np.append(draw.uniform(-1.5, 1.5, 30), draw.uniform(0, 3)) for n in names
        }
        self.participants = {name: self.participant(name) for name in names}

    @property
    def names(self) -> list[str]:
        return sorted(self.secrets)

    def participant(self, name: str) -> Participant:
        random = seeded(1000 * self.seed + int(name.split("-")[1]))
        return Participant(name, self.secrets[name], self.identities, random=random)

    def session(self, round: int = ROUND, threshold: int | None = None) -> Session:
        return Session(round, self.identities, self.fixed, threshold, random=seeded(self.seed + 99))

    def exchange(self, session: Session, down: Change = unchanged, up: Change = unchanged) -> None:
        """One stage."""
        stage = session.stage
        for name, request in session.requests().items():
            arrived = down(stage, name, request)
            if arrived is None:
                continue
            try:
                answer = self.answer(name, arrived)
            except FedpeftError as error:
                self.refused[name] = str(error)
                continue
            sent = up(stage, name, answer)
            if sent is not None:
                session.receive(name, sent)
        session.close()

    def answer(self, name: str, request: bytes) -> bytes:
        return self.participants[name].answer(request, lambda: self.vectors[name])

    def run(self, session: Session, down: Change = unchanged, up: Change = unchanged) -> Session:
        """All stages."""
        while session.requests():
            self.exchange(session, down, up)
        return session

    def upto(self, session: Session, stage: Stage, down: Change = unchanged) -> dict[str, bytes]:
        """All stages before ``stage``; its requests."""
        while session.stage is not stage:
            self.exchange(session, down)
        return session.requests()

    def expected(self, survivors: Sequence[str]) -> Floats:
        return masked_sum((self.vectors[name] for name in survivors), self.fixed)

    def signed(self, name: str, body: bytes) -> bytes:
        return sign(self.secrets[name], body)


def losing(stages: Mapping[str, Stage]) -> Change:
    """Loses what each client sends from its stage on."""
    order = list(Stage)

    def change(stage: Stage, client: str, blob: bytes) -> bytes | None:
        lost = client in stages and order.index(stage) >= order.index(stages[client])
        return None if lost else blob

    return change


def body(signed: bytes) -> bytes:
    return signed[:-SIGNATURE_BYTES]


def only(stage: Stage, client: str, change: Callable[[bytes], bytes]) -> Change:
    """Changes one message."""

    def changed(at: Stage, name: str, blob: bytes) -> bytes | None:
        return change(blob) if (at, name) == (stage, client) else blob

    return changed


def roster_of(request: bytes) -> Signatures:
    return Signatures.from_bytes(request, Kind.ROSTER)


def at(stage: Stage, clients: int = 5) -> tuple[World, Session, bytes]:
    """A world whose clients are asked for ``stage``, and the request for client-1."""
    world = World(clients)
    session = world.session()
    return world, session, world.upto(session, stage)[NAME]


def refuses(world: World, request: bytes, message: str) -> None:
    """The request is refused, and changes nothing."""
    before = world.participants[NAME].state()
    with pytest.raises(FedpeftError, match=message):
        world.answer(NAME, request)
    assert world.participants[NAME].state() == before
