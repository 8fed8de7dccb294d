"""The server's half of secure aggregation: one round, five exchanges of bytes.

    session = Session(round, identities, fixed)
    while requests := session.requests():  # client -> bytes
        for client, answer in transport(requests):
            session.receive(client, answer)
        session.close()
    session.total()

A client that does not answer is a dropout. An answer that may not be used excludes its client, by
name and reason, and the round goes on down to ``threshold`` clients.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.secagg.codec import ProtocolError
from fedpeft.secagg.envelope import SMALL, Kind, Place
from fedpeft.secagg.fixed import FixedPoint, Floats
from fedpeft.secagg.messages import (
    Advert,
    Confirm,
    Masked,
    Parcel,
    Parcels,
    Reveal,
    Setup,
    Signatures,
    Survivors,
    default_threshold,
    names_digest,
)
from fedpeft.secagg.primitives import KEY_BYTES, agree, digest, verified
from fedpeft.secagg.shamir import Random
from fedpeft.secagg.unmasking import Unmasking


class Stage(enum.Enum):
    """What clients are asked for."""

    ADVERTISE = "advertise"
    SHARE = "share"
    MASK = "mask"
    CONFIRM = "confirm"
    UNMASK = "unmask"
    DONE = "done"


@dataclass(frozen=True)
class Total:
    """The sum ``[size]`` over the survivors' vectors, and who they are."""

    values: Floats
    survivors: tuple[str, ...]


@final
class Session:
    """One round of secure aggregation, seen from the server.

    round: higher than that of any round before; one that is begun again takes a new number.
    identities: the round's clients and their public Ed25519 keys. fixed: how vectors become
    integers. threshold: the fewest clients that are summed; two thirds unless given.
    random: a source of randomness other than ``os.urandom`` is for tests only.

    Attributes: stage, and excluded: client -> why it is out.

    Memory is one vector and O(clients^2) shares. Raises FedpeftError for parameters that the
    protocol cannot work with (see Setup).
    """

    def __init__(
        self,
        round: int,
        identities: Mapping[str, bytes],
        fixed: FixedPoint,
        threshold: int | None = None,
        random: Random = os.urandom,
    ) -> None:
        clients = tuple(sorted(identities))
        least = default_threshold(len(clients)) if threshold is None else threshold
        self._setup = Setup(round, random(KEY_BYTES), clients, least, fixed)
        self._identities = dict(identities)
        self._place = self._setup.place()
        self._throwaway = random(KEY_BYTES)
        self._adverts: dict[str, Advert] = {}
        self._parcels: dict[str, dict[str, Parcel]] = {}
        self._sum = np.zeros(fixed.size, fixed.dtype)
        self._reveals: dict[str, Reveal] = {}
        self._unmasking: Unmasking | None = None
        self._total: Total | None = None
        self._requests = dict.fromkeys(clients, self._setup.to_bytes())
        self._answered: dict[str, bytes] = {}  # this stage's signed answers; empty for vectors
        self.stage = Stage.ADVERTISE
        self.excluded: dict[str, str] = {}

    def requests(self) -> dict[str, bytes]:
        """What to send to whom in this stage; nothing once the round is done."""
        return dict(self._requests)

    def receive(self, client: str, answer: bytes) -> None:
        """Takes a client's answer in this stage; a second one is ignored.

        An answer that may not be used excludes its client, also one that was not asked for; nothing
        is raised.
        """
        where = f"stage {self.stage.value}"
        if client in self._answered:
            return
        if client not in self._requests or client in self.excluded:
            self.excluded.setdefault(client, f"{where}: it answered and was not asked")
            return
        try:
            limit = Masked.limit(self._setup.fixed) if self.stage is Stage.MASK else SMALL
            if len(answer) > limit:
                raise ProtocolError(f"an answer of {len(answer)} bytes; at most {limit} are taken")
            self._take(client, verified(self._identities[client], answer, client))
        except FedpeftError as error:
            self.excluded[client] = f"{where}: {error}"
        else:
            self._answered[client] = b"" if self.stage is Stage.MASK else answer

    def close(self) -> None:
        """Ends the stage: who has not answered is out.

        Raises QuorumError where fewer than ``threshold`` are left, and FedpeftError where the sum
        cannot be unmasked; the round's sum is lost then.
        """
        if self.stage is Stage.DONE:
            return
        left = tuple(name for name in self._requests if name in self._answered)
        for name in self._requests:
            if name not in self._answered:
                self.excluded.setdefault(name, f"stage {self.stage.value}: no answer")
        if len(left) < self._setup.threshold:
            raise QuorumError(
                f"stage {self.stage.value} of secure aggregation: {len(left)} of "
                f"{len(self._setup.clients)} clients are left, and the threshold is "
                f"{self._setup.threshold}; the round's sum is lost. Out: {self.excluded}"
            )
        following = list(Stage)[list(Stage).index(self.stage) + 1]
        self._requests = self._next(left)
        self._answered = {}
        self.stage = following

    def total(self) -> Total:
        """The sum. Raises FedpeftError before the last stage is closed."""
        if self._total is None:
            raise FedpeftError(f"there is no sum: the round is in stage {self.stage.value}")
        return self._total

    def _next(self, left: tuple[str, ...]) -> dict[str, bytes]:
        """The next stage's requests to the clients that answered in this one."""
        signed = tuple(self._answered[name] for name in left)
        if self.stage is Stage.ADVERTISE:
            roster = Signatures(Kind.ROSTER, self._place, signed).to_bytes()
            self._place = Place(self._setup.round, digest("roster", roster))
            return dict.fromkeys(left, roster)
        if self.stage is Stage.SHARE:
            return {name: self._inbox(name, left) for name in left}
        if self.stage is Stage.MASK:
            dropouts = tuple(name for name in self._requests if name not in left)
            lists = Survivors(self._place, left, dropouts)
            context = self._place.context
            self._unmasking = Unmasking(self._setup, context, self._adverts, self._parcels, lists)
            return dict.fromkeys(left, lists.to_bytes())
        if self.stage is Stage.CONFIRM:
            confirmed = Signatures(Kind.CONFIRMED, self._place, signed)
            return dict.fromkeys(left, confirmed.to_bytes())
        unmasking = self._known()
        unmasking.remove_masks(self._sum, {name: self._reveals[name] for name in left})
        survivors = unmasking.lists.survivors
        self._total = Total(self._setup.fixed.decode(self._sum, len(survivors)), survivors)
        return {}

    def _inbox(self, receiver: str, dealers: tuple[str, ...]) -> bytes:
        """What everybody sealed for one client."""
        parcels = tuple(replace(self._parcels[name][receiver], peer=name) for name in dealers)
        return Parcels(Kind.INBOX, self._place, receiver, parcels).to_bytes()

    def _known(self) -> Unmasking:
        assert self._unmasking is not None  # set when the stage ``mask`` was closed
        return self._unmasking

    def _take(self, client: str, body: bytes) -> None:
        """Checks an answer whose signature is right, and keeps what is needed of it."""
        if self.stage is Stage.ADVERTISE:
            advert = Advert.from_bytes(body)
            self._check(client, advert.sender, advert.place)
            self._take_advert(advert)
        elif self.stage is Stage.SHARE:
            shares = Parcels.from_bytes(body, Kind.SHARES)
            self._check(client, shares.sender, shares.place)
            parcels = {parcel.peer: parcel for parcel in shares.parcels}
            if list(parcels) != list(self._requests):
                raise ProtocolError("it did not seal shares for everybody on the roster")
            self._parcels[client] = parcels
        elif self.stage is Stage.MASK:
            masked = Masked.from_bytes(body, self._setup.fixed)
            self._check(client, masked.sender, masked.place)
            if masked.partners != names_digest(tuple(self._requests)):
                raise ProtocolError("it masked for other partners than those who shared keys")
            self._sum += np.frombuffer(masked.vector, self._setup.fixed.dtype)
        elif self.stage is Stage.CONFIRM:
            confirm = Confirm.from_bytes(body)
            self._check(client, confirm.sender, confirm.place)
            if confirm.lists != digest("lists", self._known().lists.to_bytes()):
                raise ProtocolError("it confirmed other lists of survivors and dropouts")
        else:
            reveal = Reveal.from_bytes(body)
            self._check(client, reveal.sender, reveal.place)
            self._known().check(reveal)
            self._reveals[client] = reveal

    def _check(self, client: str, sender: str, place: Place) -> None:
        if sender != client:
            raise ProtocolError(f"the answer is signed by {client!r} in the name of {sender!r}")
        self._place.check(place, "the answer")

    def _take_advert(self, advert: Advert) -> None:
        """Refuses keys that its peers would refuse, which would end the round for all."""
        keys = {advert.share_key, advert.mask_key}
        for key in keys:
            agree(self._throwaway, key, advert.sender)
        taken = {k for other in self._adverts.values() for k in (other.share_key, other.mask_key)}
        if len(keys) < 2 or keys & taken:
            raise ProtocolError("it advertised a key twice, or another client's; keys are fresh")
        self._adverts[advert.sender] = advert
