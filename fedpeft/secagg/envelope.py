"""What all messages have in common: kind, round and context, and lists of names."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fedpeft.secagg.codec import MAX_CLIENTS, MAX_NAME_BYTES, ProtocolError, Reader, Writer

DIGEST_BYTES = 32
HEAD_BYTES = 64 + MAX_NAME_BYTES
_ENTRY_BYTES = 512 + MAX_NAME_BYTES
_MAGIC = b"FSA\x01"  # the last byte is the version

SMALL = HEAD_BYTES + MAX_CLIENTS * _ENTRY_BYTES
"""The most bytes of a message without a vector."""


class Kind(enum.IntEnum):
    """What a message is."""

    SETUP = 1
    ADVERT = 2
    ROSTER = 3
    SHARES = 4
    INBOX = 5
    MASKED = 6
    SURVIVORS = 7
    CONFIRM = 8
    CONFIRMED = 9
    REVEAL = 10


_TO_ALL = (Kind.SETUP, Kind.ROSTER, Kind.SURVIVORS, Kind.CONFIRMED)


@dataclass(frozen=True)
class Place:
    """Where a message belongs: its round, and the digest that binds it to what went before."""

    round: int
    context: bytes

    def check(self, found: Place, what: str) -> None:
        """Raises ProtocolError unless a message that was found belongs here."""
        if found.round != self.round:
            raise ProtocolError(
                f"{what} is of round {found.round}, and this is round {self.round}; a message of "
                f"another round is never used"
            )
        if found.context != self.context:
            raise ProtocolError(
                f"{what} is of another session of round {self.round}, or its sender was shown "
                f"other parameters or keys; it is never used"
            )


def write_head(kind: Kind, place: Place, sender: str = "") -> Writer:
    """A message that has begun; what the server sends to all names no client."""
    head = Writer().raw(_MAGIC).u8(kind).u64(place.round).raw(place.context)
    return head.name(sender)


def kind_of(data: bytes) -> int:
    """The kind that a message claims to be. Raises ProtocolError for what is no message."""
    reader = Reader(data, "message", len(data))
    if reader.raw(len(_MAGIC)) != _MAGIC:
        raise reader.fault("it is none of secure aggregation, version 1; update fedpeft")
    return reader.u8()


def read_head(data: bytes, kind: Kind, limit: int = SMALL) -> tuple[Reader, Place, str]:
    """What follows a message's head, its place and its sender.

    Raises ProtocolError for more than ``limit`` bytes, for a message of another kind, and for a
    name where none belongs or none where one does.
    """
    reader = Reader(data, f"{kind.name.lower()} message", limit)
    if kind_of(data) != kind:
        raise reader.fault(f"it is of kind {kind_of(data)}, and {int(kind)} is expected now")
    reader.raw(len(_MAGIC) + 1)
    place, name = Place(reader.u64(), reader.raw(DIGEST_BYTES)), reader.name()
    if (name == "") != (kind in _TO_ALL):
        raise reader.fault(f"it names {name!r} as the client that it is from or to")
    return reader, place, name


def write_names(writer: Writer, names: Sequence[str]) -> None:
    """A list of names."""
    writer.u32(len(names))
    for name in names:
        writer.name(name)


def read_names(reader: Reader) -> tuple[str, ...]:
    """A list of names, sorted and distinct."""
    return ascending(tuple(reader.name() for _ in range(reader.count())), reader)


def ascending(names: tuple[str, ...], reader: Reader) -> tuple[str, ...]:
    """The names. Raises ProtocolError unless they are sorted and distinct."""
    if any(a >= b for a, b in itertools.pairwise(names)):
        raise reader.fault("names in it are not sorted and distinct")
    return names
