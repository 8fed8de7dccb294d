"""The messages of a round, as bytes: five requests of the server, and a client's answer to each.

| stage | request | answer |
|---|---|---|
| advertise | Setup: the round's parameters | Advert: two public keys, a commitment |
| share | Roster: all adverts | Shares: sealed shares of seed and mask key for everybody |
| mask | Inbox: the shares for this client | Masked: the masked vector |
| confirm | Survivors: who sent a vector, who did not | Confirm: a signature on the two lists |
| unmask | Confirmed: the signatures | Reveal: shares of survivors' seeds, of dropouts' mask keys |

Every message says its kind, its round and its context: the digest of the Setup, and from the Roster
on that of the Roster, which holds everybody's fresh keys. Answers are signed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedpeft.errors import FedpeftError
from fedpeft.secagg.codec import MAX_CLIENTS
from fedpeft.secagg.envelope import (
    DIGEST_BYTES,
    HEAD_BYTES,
    Kind,
    Place,
    ascending,
    read_head,
    read_names,
    write_head,
    write_names,
)
from fedpeft.secagg.fixed import FixedPoint
from fedpeft.secagg.primitives import (
    KEY_BYTES,
    NONCE_BYTES,
    SIGNATURE_BYTES,
    TAG_BYTES,
    digest,
)
from fedpeft.secagg.shamir import SHARE_BYTES

MIN_CLIENTS = 3
"""A sum over two clients tells each of them what the other sent."""

SEALED_BYTES = NONCE_BYTES + 2 * SHARE_BYTES + TAG_BYTES


def default_threshold(clients: int) -> int:
    """Two thirds of the clients, rounded up, and at least three.

    A malicious server with fewer than a third of the clients on its side cannot then have two
    different lists of survivors confirmed: 2 t > n + c.
    """
    return max(MIN_CLIENTS, -(-2 * clients // 3))


@dataclass(frozen=True)
class Setup:
    """The round's parameters.

    round: a number that grows with every round that a client takes part in; a round that is begun
    again takes a new one. nonce: 32 random bytes. clients: sorted names. threshold: the fewest that
    are summed, and that together can undo a mask. A share's point is its holder's place in
    ``clients``, from one.

    Raises FedpeftError unless there are 3 to 1000 clients, no more than ``fixed`` is set up for,
    and ``threshold`` is at least 3, more than half of them and not more than all.
    """

    round: int
    nonce: bytes
    clients: tuple[str, ...]
    threshold: int
    fixed: FixedPoint

    def __post_init__(self) -> None:
        n = len(self.clients)
        if not MIN_CLIENTS <= n <= MAX_CLIENTS:
            raise FedpeftError(
                f"{n} clients cannot aggregate securely: {MIN_CLIENTS} to {MAX_CLIENTS} can; with "
                f"fewer, the sum tells each what the others sent"
            )
        if "" in self.clients or list(self.clients) != sorted(set(self.clients)):
            raise FedpeftError("the clients' names must be sorted, distinct and not empty")
        if n > self.fixed.clients:
            raise FedpeftError(
                f"the round has {n} clients, and fixed point is set up for {self.fixed.clients}: "
                f"their sum may overflow; set FixedPoint(clients={n})"
            )
        if not (max(MIN_CLIENTS, n // 2 + 1) <= self.threshold <= n):
            raise FedpeftError(
                f"threshold is {self.threshold} of {n} clients; it must be at least {MIN_CLIENTS}, "
                f"more than half and at most all of them; {default_threshold(n)} is the default"
            )
        if not 0 <= self.round < 2**64:
            raise FedpeftError(f"round is {self.round}; it must be a whole number from 0")

    def place(self) -> Place:
        """Where answers to this message belong."""
        return Place(self.round, digest("setup", self.to_bytes()))

    def point(self, client: str) -> int:
        """Where a client's shares are taken."""
        return self.clients.index(client) + 1

    def to_bytes(self) -> bytes:
        """The message."""
        writer = write_head(Kind.SETUP, Place(self.round, self.nonce)).u32(self.threshold)
        write_names(writer, self.clients)
        fixed = self.fixed
        writer.u8(fixed.bits).f64(fixed.clip).u32(fixed.clients).u64(fixed.length)
        writer.f64(fixed.weight_max).u32(len(fixed.extras))
        for bound in fixed.extras:
            writer.f64(bound)
        return writer.bytes()

    @staticmethod
    def from_bytes(data: bytes) -> Setup:
        """The message. Raises FedpeftError for what ``to_bytes`` cannot have made."""
        reader, place, _ = read_head(data, Kind.SETUP)
        threshold, clients = reader.u32(), read_names(reader)
        bits, clip, most, length = reader.u8(), reader.f64(), reader.u32(), reader.u64()
        weight_max = reader.f64()
        extras = tuple(reader.f64() for _ in range(reader.count()))
        reader.end()
        fixed = FixedPoint(bits, clip, most, length, weight_max, extras)
        return Setup(place.round, place.context, clients, threshold, fixed)


@dataclass(frozen=True)
class Advert:
    """A client's public X25519 keys, for shares and for masks, and a commitment to its seed."""

    place: Place
    sender: str
    share_key: bytes
    mask_key: bytes
    commitment: bytes

    def to_bytes(self) -> bytes:
        """The message, without its signature."""
        writer = write_head(Kind.ADVERT, self.place, self.sender)
        return writer.raw(self.share_key).raw(self.mask_key).raw(self.commitment).bytes()

    @staticmethod
    def from_bytes(data: bytes) -> Advert:
        """The message. Raises ProtocolError for what ``to_bytes`` cannot have made."""
        reader, place, sender = read_head(data, Kind.ADVERT)
        keys = reader.raw(KEY_BYTES), reader.raw(KEY_BYTES), reader.raw(DIGEST_BYTES)
        reader.end()
        return Advert(place, sender, *keys)


@dataclass(frozen=True)
class Signatures:
    """Signed answers of several clients for all: the Roster (adverts) or Confirmed (confirms)."""

    kind: Kind
    place: Place
    signed: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """The message."""
        writer = write_head(self.kind, self.place).u32(len(self.signed))
        for each in self.signed:
            writer.blob(each)
        return writer.bytes()

    @staticmethod
    def from_bytes(data: bytes, kind: Kind) -> Signatures:
        """The message. Raises ProtocolError for what ``to_bytes`` cannot have made."""
        reader, place, _ = read_head(data, kind)
        signed = tuple(reader.blob() for _ in range(reader.count()))
        reader.end()
        return Signatures(kind, place, signed)


@dataclass(frozen=True)
class Parcel:
    """Shares of one client's seed and mask key for one other: sealed, and the digest of each."""

    peer: str
    sealed: bytes
    seed_digest: bytes
    key_digest: bytes


@dataclass(frozen=True)
class Parcels:
    """Shares or an Inbox.

    Shares are of one ``sender``, with a parcel per receiver. An Inbox has a parcel per dealer, and
    ``sender`` is its receiver.
    """

    kind: Kind
    place: Place
    sender: str
    parcels: tuple[Parcel, ...]

    def to_bytes(self) -> bytes:
        """The message; that of a client without its signature."""
        writer = write_head(self.kind, self.place, self.sender).u32(len(self.parcels))
        for parcel in self.parcels:
            writer.name(parcel.peer).raw(parcel.sealed)
            writer.raw(parcel.seed_digest).raw(parcel.key_digest)
        return writer.bytes()

    @staticmethod
    def from_bytes(data: bytes, kind: Kind) -> Parcels:
        """The message. Raises ProtocolError for what ``to_bytes`` cannot have made."""
        reader, place, sender = read_head(data, kind)
        parcels = tuple(
            Parcel(
                reader.name(),
                reader.raw(SEALED_BYTES),
                reader.raw(DIGEST_BYTES),
                reader.raw(DIGEST_BYTES),
            )
            for _ in range(reader.count())
        )
        ascending(tuple(parcel.peer for parcel in parcels), reader)
        reader.end()
        return Parcels(kind, place, sender, parcels)


@dataclass(frozen=True)
class Masked:
    """A masked vector, raw, and the digest of whom its masks are shared with."""

    place: Place
    sender: str
    partners: bytes
    vector: bytes

    def to_bytes(self) -> bytes:
        """The message, without its signature."""
        return (
            write_head(Kind.MASKED, self.place, self.sender)
            .raw(self.partners + self.vector)
            .bytes()
        )

    @staticmethod
    def from_bytes(data: bytes, fixed: FixedPoint) -> Masked:
        """The message. Raises ProtocolError for what ``to_bytes`` cannot have made."""
        size = fixed.size * fixed.dtype.itemsize
        reader, place, sender = read_head(data, Kind.MASKED, Masked.limit(fixed))
        partners, vector = reader.raw(DIGEST_BYTES), reader.raw(size)
        reader.end()
        return Masked(place, sender, partners, vector)

    @staticmethod
    def limit(fixed: FixedPoint) -> int:
        """The most bytes of the signed message."""
        head = HEAD_BYTES + DIGEST_BYTES + SIGNATURE_BYTES
        return head + fixed.size * fixed.dtype.itemsize


@dataclass(frozen=True)
class Survivors:
    """Who sent a masked vector, and who shared keys but sent none."""

    place: Place
    survivors: tuple[str, ...]
    dropouts: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """The message."""
        writer = write_head(Kind.SURVIVORS, self.place)
        write_names(writer, self.survivors)
        write_names(writer, self.dropouts)
        return writer.bytes()

    @staticmethod
    def from_bytes(data: bytes) -> Survivors:
        """The message. Raises ProtocolError for what ``to_bytes`` cannot have made."""
        reader, place, _ = read_head(data, Kind.SURVIVORS)
        lists = read_names(reader), read_names(reader)
        reader.end()
        return Survivors(place, *lists)


@dataclass(frozen=True)
class Confirm:
    """What a client signs: that it was shown these lists, by the digest of the Survivors."""

    place: Place
    sender: str
    lists: bytes

    def to_bytes(self) -> bytes:
        """The message, without its signature."""
        return write_head(Kind.CONFIRM, self.place, self.sender).raw(self.lists).bytes()

    @staticmethod
    def from_bytes(data: bytes) -> Confirm:
        """The message. Raises ProtocolError for what ``to_bytes`` cannot have made."""
        reader, place, sender = read_head(data, Kind.CONFIRM)
        lists = reader.raw(DIGEST_BYTES)
        reader.end()
        return Confirm(place, sender, lists)


@dataclass(frozen=True)
class Reveal:
    """Shares, in the order of the lists: of the survivors' seeds, of the dropouts' mask keys."""

    place: Place
    sender: str
    seeds: tuple[bytes, ...]
    keys: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """The message, without its signature."""
        writer = write_head(Kind.REVEAL, self.place, self.sender)
        for shares in (self.seeds, self.keys):
            writer.u32(len(shares)).raw(b"".join(shares))
        return writer.bytes()

    @staticmethod
    def from_bytes(data: bytes) -> Reveal:
        """The message. Raises ProtocolError for what ``to_bytes`` cannot have made."""
        reader, place, sender = read_head(data, Kind.REVEAL)
        seeds = tuple(reader.raw(SHARE_BYTES) for _ in range(reader.count()))
        keys = tuple(reader.raw(SHARE_BYTES) for _ in range(reader.count()))
        reader.end()
        return Reveal(place, sender, seeds, keys)


def names_digest(names: Sequence[str]) -> bytes:
    """One digest of a list of names."""
    return digest("names", *(name.encode() for name in names))
