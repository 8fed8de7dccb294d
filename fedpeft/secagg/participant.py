"""A client's half of secure aggregation: one answer per request, nothing twice.

What a request asks for is given at most once in a round, in the order of the stages; a request that
is refused leaves everything as it was. Refusals are ProtocolError or FedpeftError that name who
sent what is wrong, and hold nothing of the vector.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import final

from fedpeft.errors import FedpeftError
from fedpeft.secagg import masking
from fedpeft.secagg.codec import MAX_NAME_BYTES, ProtocolError, Reader, Writer
from fedpeft.secagg.envelope import SMALL, Kind, Place, kind_of
from fedpeft.secagg.fixed import Floats, Words
from fedpeft.secagg.messages import (
    MIN_CLIENTS,
    Advert,
    Confirm,
    Masked,
    Parcel,
    Parcels,
    Reveal,
    Setup,
    Signatures,
    Survivors,
    names_digest,
)
from fedpeft.secagg.primitives import (
    KEY_BYTES,
    agree,
    derive,
    digest,
    identity,
    mask,
    public_key,
    seal,
    sign,
    unseal,
    verified,
)
from fedpeft.secagg.shamir import SHARE_BYTES, Random, split


@dataclass(frozen=True)
class _Round:
    """What a client keeps between the stages: its secrets and the requests that it answered."""

    share_secret: bytes
    mask_secret: bytes
    seed: bytes
    setup: bytes
    roster: bytes = b""
    inbox: bytes = b""
    lists: bytes = b""

    def expects(self) -> Kind:
        """The next request."""
        answered = (self.roster, self.inbox, self.lists)
        later = (Kind.ROSTER, Kind.INBOX, Kind.SURVIVORS)
        return next((k for k, has in zip(later, answered, strict=True) if not has), Kind.CONFIRMED)


@final
class Participant:
    """One client, for all rounds that it takes part in.

    name: as in ``identities``. secret: its Ed25519 secret, 32 bytes. identities: the public Ed25519
    key of every client, by name; **not from the server that aggregates**, which could put clients
    of its own in their place. least: the fewest clients in any sum that this client takes part in.
    random: the source of keys and shares; another one than ``os.urandom`` is for tests only.

    Keep ``state()`` before an answer is sent: a client that is set back to an older state could
    answer twice.
    """

    def __init__(
        self,
        name: str,
        secret: bytes,
        identities: Mapping[str, bytes],
        least: int = MIN_CLIENTS,
        random: Random = os.urandom,
    ) -> None:
        if identities.get(name) != identity(secret):
            raise FedpeftError(
                f"client {name!r}: its public key in the list of identities is missing or not that "
                f"of its secret key; list the key that primitives.new_identity gave with the secret"
            )
        self._name = name
        self._secret = secret
        self._identities = dict(identities)
        self._least = least
        self._random = random
        self._last = -1
        self._round: _Round | None = None

    def answer(self, request: bytes, vector: Callable[[], Floats]) -> bytes:
        """The signed answer to a request.

        vector: gives what is summed, ``[size]``: ``weight * update`` and the extras (see
        FixedPoint); called in the stage ``mask`` only. Raises ProtocolError for a request that is
        refused, and FedpeftError for a vector that cannot be encoded.
        """
        kind = kind_of(request)
        if kind == Kind.SETUP:
            body, state = self._advertise(request)
        elif self._round is None:
            raise ProtocolError("no round is under way here: it is over, or was never set up")
        elif kind != self._round.expects():
            raise ProtocolError(
                f"a request of kind {kind} came where {self._round.expects().name} is due; each is "
                f"answered once in a round, in order"
            )
        elif kind == Kind.ROSTER:
            body, state = self._share(request, self._round)
        elif kind == Kind.INBOX:
            body, state = self._mask(request, self._round, vector)
        elif kind == Kind.SURVIVORS:
            body, state = self._confirm(request, self._round)
        else:
            body, state = self._unmask(request, self._round), None
        signed = sign(self._secret, body)
        self._round = state
        return signed

    def state(self) -> bytes:
        """All that the next stage needs, secrets included; nothing secret after ``unmask``."""
        writer = Writer().u64(self._last + 1).name(self._name).u8(self._round is not None)
        if (own := self._round) is not None:
            writer.raw(own.share_secret + own.mask_secret + own.seed)
            for blob in (own.setup, own.roster, own.inbox, own.lists):
                writer.blob(blob)
        body = writer.bytes()
        return body + hashlib.sha256(body).digest()

    def restore(self, state: bytes) -> None:
        """Takes up where ``state()`` was taken.

        Raises ProtocolError if it is damaged, another client's, or of an older round than this
        object's last.
        """
        what = f"client {self._name!r}: its saved state"
        body, check = state[:-32], state[-32:]
        reader = Reader(body, what, 64 + MAX_NAME_BYTES + 4 * SMALL)
        if hashlib.sha256(body).digest() != check:
            raise reader.fault("is damaged; remove it to sit this round out")
        last = reader.u64() - 1
        if reader.name() != self._name or last < self._last:
            raise reader.fault("is another client's, or older than what it has done since")
        found = None
        if reader.u8():
            secrets = reader.raw(KEY_BYTES), reader.raw(KEY_BYTES), reader.raw(KEY_BYTES)
            found = _Round(*secrets, reader.blob(), reader.blob(), reader.blob(), reader.blob())
        reader.end()
        self._last, self._round = last, found

    def _advertise(self, request: bytes) -> tuple[bytes, _Round]:
        setup = Setup.from_bytes(request)
        if setup.round <= self._last:
            raise ProtocolError(
                f"round {setup.round} is refused: this client took part in round {self._last}, and "
                f"a round is never repeated; begin it again under a higher number"
            )
        unknown = [name for name in setup.clients if name not in self._identities]
        if unknown or self._name not in setup.clients:
            raise ProtocolError(
                f"round {setup.round} is refused: this client is not in it, or has no identity for "
                f"{unknown[:3]}; bring its list of identities up to date"
            )
        if setup.threshold < self._least:
            raise ProtocolError(
                f"round {setup.round} is refused: it may sum as few as {setup.threshold} clients, "
                f"and this client takes part from {self._least}"
            )
        secrets = self._random(KEY_BYTES), self._random(KEY_BYTES), self._random(KEY_BYTES)
        own = _Round(*secrets, setup=request)
        place = setup.place()
        advert = Advert(
            place,
            self._name,
            public_key(own.share_secret),
            public_key(own.mask_secret),
            masking.commitment(own.seed, place.context, self._name),
        )
        self._last = setup.round
        return advert.to_bytes(), own

    def _share(self, request: bytes, own: _Round) -> tuple[bytes, _Round]:
        setup = Setup.from_bytes(own.setup)
        adverts = self._adverts(request, setup)
        if len(adverts) < setup.threshold:
            raise ProtocolError(
                f"{len(adverts)} clients advertised keys; the threshold is {setup.threshold}"
            )
        mine = adverts.get(self._name)
        if mine is None or mine.commitment != masking.commitment(
            own.seed, setup.place().context, self._name
        ):
            raise ProtocolError("the roster does not hold the keys that this client advertised")
        keys = [key for advert in adverts.values() for key in (advert.share_key, advert.mask_key)]
        if len(set(keys)) < len(keys):
            raise ProtocolError("the roster holds a key twice; every client needs fresh keys")
        points = [setup.point(name) for name in adverts]
        seeds = split(own.seed, setup.threshold, points, self._random)
        secrets = split(own.mask_secret, setup.threshold, points, self._random)
        place = Place(setup.round, digest("roster", request))
        parcels = tuple(
            self._parcel(own, place.context, adverts[name], seed, key)
            for name, seed, key in zip(adverts, seeds, secrets, strict=True)
        )
        shares = Parcels(Kind.SHARES, place, self._name, parcels)
        return shares.to_bytes(), replace(own, roster=request)

    def _adverts(self, roster: bytes, setup: Setup) -> dict[str, Advert]:
        """The adverts of a roster, by sender in order; every signature is checked."""
        found: dict[str, Advert] = {}
        message = Signatures.from_bytes(roster, Kind.ROSTER)
        setup.place().check(message.place, "the roster")
        for signed in message.signed:
            advert = Advert.from_bytes(signed[:-64])
            sender = advert.sender
            if sender not in setup.clients or (found and sender <= next(reversed(found))):
                raise ProtocolError(
                    f"client {sender!r}: it is not in the round, or in the roster twice"
                )
            verified(self._identities[sender], signed, sender)
            setup.place().check(advert.place, f"client {sender!r}: its advert")
            found[sender] = advert
        return found

    def _parcel(
        self, own: _Round, transcript: bytes, peer: Advert, seed: bytes, key: bytes
    ) -> Parcel:
        context = masking.seal_context(transcript, self._name, peer.sender)
        sealing = derive(agree(own.share_secret, peer.share_key, peer.sender), "seal", context)
        said = (transcript, self._name, peer.sender)
        return Parcel(
            peer.sender,
            seal(sealing, seed + key, context, self._random),
            masking.share_digest("seed", *said, seed),
            masking.share_digest("key", *said, key),
        )

    def _mask(
        self, request: bytes, own: _Round, vector: Callable[[], Floats]
    ) -> tuple[bytes, _Round]:
        setup = Setup.from_bytes(own.setup)
        adverts = self._adverts(own.roster, setup)
        partners = tuple(self._open(request, own, adverts))
        if self._name not in partners or len(partners) < setup.threshold:
            raise ProtocolError(
                f"{len(partners)} clients shared keys, or this one is left out; the threshold is "
                f"{setup.threshold}"
            )
        transcript = digest("roster", own.roster)
        total: Words = setup.fixed.encode(vector())
        if total.ndim != 1:
            raise FedpeftError(f"a client's vector has shape {total.shape}; it must be one row")
        total += mask(masking.self_mask_key(own.seed, transcript), setup.fixed)
        for peer in partners:
            if peer == self._name:
                continue
            key = masking.pair_mask_key(own.mask_secret, self._name, adverts[peer])
            if masking.adds(self._name, peer):
                total += mask(key, setup.fixed)
            else:
                total -= mask(key, setup.fixed)
        place = Place(setup.round, transcript)
        masked = Masked(place, self._name, names_digest(partners), total.tobytes())
        return masked.to_bytes(), replace(own, inbox=request)

    def _open(
        self, inbox: bytes, own: _Round, adverts: Mapping[str, Advert]
    ) -> dict[str, tuple[bytes, bytes]]:
        """The shares that this client holds, of seed and mask key, by who dealt them."""
        message = Parcels.from_bytes(inbox, Kind.INBOX)
        transcript = digest("roster", own.roster)
        round = Setup.from_bytes(own.setup).round
        Place(round, transcript).check(message.place, "the inbox")
        found = {}
        for parcel in message.parcels:
            dealer = parcel.peer
            if dealer not in adverts:
                raise ProtocolError(f"client {dealer!r}: it sealed shares but advertised no keys")
            context = masking.seal_context(transcript, dealer, self._name)
            shared = agree(own.share_secret, adverts[dealer].share_key, dealer)
            plain = unseal(derive(shared, "seal", context), parcel.sealed, context, dealer)
            shares = plain[:SHARE_BYTES], plain[SHARE_BYTES:]
            said = (transcript, dealer, self._name)
            digests = (
                masking.share_digest("seed", *said, shares[0]),
                masking.share_digest("key", *said, shares[1]),
            )
            if digests != (parcel.seed_digest, parcel.key_digest):
                raise ProtocolError(
                    f"client {dealer!r}: the shares that it sealed are not those it announced"
                )
            found[dealer] = shares
        return found

    def _confirm(self, request: bytes, own: _Round) -> tuple[bytes, _Round]:
        setup = Setup.from_bytes(own.setup)
        place = Place(setup.round, digest("roster", own.roster))
        lists = Survivors.from_bytes(request)
        place.check(lists.place, "the list of survivors")
        survivors, dropouts = set(lists.survivors), set(lists.dropouts)
        partners = {parcel.peer for parcel in Parcels.from_bytes(own.inbox, Kind.INBOX).parcels}
        if both := sorted(survivors & dropouts):
            raise ProtocolError(
                f"client {both[0]!r} is listed both as survivor and as dropout: both shares of one "
                f"client would unmask its vector"
            )
        if odd := sorted((survivors | dropouts) ^ partners):
            raise ProtocolError(
                f"client {odd[0]!r}: survivors and dropouts must be those who shared keys, all of "
                f"them and no others"
            )
        if self._name not in survivors:
            raise ProtocolError("this client sent its vector, and is not listed as survivor")
        if len(survivors) < setup.threshold:
            raise ProtocolError(
                f"{len(survivors)} clients survive; the threshold is {setup.threshold}"
            )
        confirm = Confirm(place, self._name, digest("lists", request))
        return confirm.to_bytes(), replace(own, lists=request)

    def _unmask(self, request: bytes, own: _Round) -> bytes:
        setup = Setup.from_bytes(own.setup)
        place = Place(setup.round, digest("roster", own.roster))
        lists = Survivors.from_bytes(own.lists)
        message = Signatures.from_bytes(request, Kind.CONFIRMED)
        place.check(message.place, "the list of confirmations")
        confirmed = set()
        for signed in message.signed:
            confirm = Confirm.from_bytes(signed[:-64])
            sender = confirm.sender
            if sender not in lists.survivors or sender in confirmed:
                raise ProtocolError(f"client {sender!r}: it is no survivor, or confirmed twice")
            verified(self._identities[sender], signed, sender)
            place.check(confirm.place, f"client {sender!r}: its confirmation")
            if confirm.lists != digest("lists", own.lists):
                raise ProtocolError(
                    f"client {sender!r} was shown other lists of survivors: the server does not "
                    f"tell everybody the same"
                )
            confirmed.add(sender)
        if len(confirmed) < setup.threshold:
            raise ProtocolError(
                f"{len(confirmed)} survivors confirmed the lists; the threshold is "
                f"{setup.threshold}"
            )
        held = self._open(own.inbox, own, self._adverts(own.roster, setup))
        seeds = tuple(held[name][0] for name in lists.survivors)
        keys = tuple(held[name][1] for name in lists.dropouts)
        return Reveal(place, self._name, seeds, keys).to_bytes()
