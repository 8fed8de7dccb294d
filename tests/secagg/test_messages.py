"""Every message has one form: what ``to_bytes`` made comes back, anything else is refused."""

from __future__ import annotations

import pytest

from fedpeft.errors import FedpeftError
from fedpeft.secagg.codec import MAX_CLIENTS, ProtocolError, Reader, Writer
from fedpeft.secagg.envelope import SMALL, Kind, Place, kind_of
from fedpeft.secagg.fixed import FixedPoint
from fedpeft.secagg.messages import (
    SEALED_BYTES,
    Advert,
    Confirm,
    Masked,
    Parcel,
    Parcels,
    Reveal,
    Setup,
    Signatures,
    Survivors,
)

FIXED = FixedPoint(64, 0.5, 9, 4, 2.0, (1.0, 0.25))
PLACE = Place(3, bytes(range(32)))
PARCELS = tuple(Parcel(n, n.encode() * SEALED_BYTES, b"s" * 32, b"k" * 32) for n in "ab")
MESSAGES = {
    "setup": Setup(3, bytes(range(32)), ("a", "b", "ü"), 3, FIXED),
    "advert": Advert(PLACE, "a", b"1" * 32, b"2" * 32, b"3" * 32),
    "roster": Signatures(Kind.ROSTER, PLACE, (b"one", b"", b"three")),
    "shares": Parcels(Kind.SHARES, PLACE, "a", PARCELS),
    "inbox": Parcels(Kind.INBOX, PLACE, "a", PARCELS),
    "masked": Masked(PLACE, "a", b"p" * 32, b"v" * 48),
    "survivors": Survivors(PLACE, ("a", "b"), ("c",)),
    "confirm": Confirm(PLACE, "a", b"l" * 32),
    "confirmed": Signatures(Kind.CONFIRMED, PLACE, (b"one",)),
    "reveal": Reveal(PLACE, "a", (b"s" * 66, b"t" * 66), (b"k" * 66,)),
}


def read(name: str, data: bytes) -> object:
    kind = Kind[name.upper()]
    if kind in (Kind.ROSTER, Kind.CONFIRMED):
        return Signatures.from_bytes(data, kind)
    if kind in (Kind.SHARES, Kind.INBOX):
        return Parcels.from_bytes(data, kind)
    if kind is Kind.MASKED:
        return Masked.from_bytes(data, FIXED)
    return type(MESSAGES[name]).from_bytes(data)


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_come_back(name: str) -> None:
    data = MESSAGES[name].to_bytes()
    assert read(name, data) == MESSAGES[name]
    assert kind_of(data) == Kind[name.upper()]


@pytest.mark.parametrize("name", MESSAGES)
def test_every_other_form_is_refused_or_another_message(name: str) -> None:
    """Each prefix and each continuation is refused; a changed byte never reads as the same."""
    data = MESSAGES[name].to_bytes()
    for end in range(len(data)):
        with pytest.raises(ProtocolError):
            read(name, data[:end])
    for more in (b"\x00", data):
        with pytest.raises(ProtocolError, match=r"left over|at most"):
            read(name, data + more)
    for k in range(len(data)):
        for bit in (1, 128):
            changed = data[:k] + bytes([data[k] ^ bit]) + data[k + 1 :]
            try:
                found = read(name, changed)
            except FedpeftError:
                continue
            assert found != MESSAGES[name] and found.to_bytes() == changed


@pytest.mark.parametrize("name", MESSAGES)
def test_another_kind_or_version_is_refused(name: str) -> None:
    data = MESSAGES[name].to_bytes()
    with pytest.raises(ProtocolError, match="it is of kind 77, and"):
        read(name, data[:4] + b"\x4d" + data[5:])
    for magic in (b"FSA\x02", b"PK\x03\x04", b"\x93NUM"):
        with pytest.raises(ProtocolError, match="none of secure aggregation, version 1"):
            read(name, magic + data[4:])


def test_a_name_is_where_it_belongs_and_nowhere_else() -> None:
    for name, message in MESSAGES.items():
        data = message.to_bytes()
        assert data[45] == (0 if name in ("setup", "roster", "survivors", "confirmed") else 1)
        changed = data[:45] + (b"\x00" + data[47:] if data[45] else b"\x01z" + data[46:])
        with pytest.raises(ProtocolError, match="as the client that it is from or to"):
            read(name, changed)


def test_sizes_are_checked_before_anything_is_read() -> None:
    with pytest.raises(ProtocolError, match=f"at most {SMALL} are allowed"):
        Advert.from_bytes(bytes(SMALL + 1))
    huge = Writer().u32(2**32 - 1).bytes()
    with pytest.raises(ProtocolError, match=f"at most {MAX_CLIENTS} are allowed"):
        Reader(huge, "list", 10).count()
    with pytest.raises(ProtocolError, match="4294967295 bytes expected, 0 left"):
        Reader(huge, "blob", 10).blob()


def test_the_largest_round_fits_the_limits() -> None:
    names = tuple(f"{k:0128d}" for k in range(MAX_CLIENTS))
    fixed = FixedPoint(64, 1.0, MAX_CLIENTS, 1)
    Setup.from_bytes(Setup(2**64 - 1, bytes(32), names, MAX_CLIENTS, fixed).to_bytes())
    parcels = tuple(Parcel(n, bytes(SEALED_BYTES), bytes(32), bytes(32)) for n in names)
    Parcels.from_bytes(Parcels(Kind.INBOX, PLACE, names[0], parcels).to_bytes(), Kind.INBOX)
    advert = Advert(PLACE, names[0], bytes(32), bytes(32), bytes(32)).to_bytes() + bytes(64)
    roster = Signatures(Kind.ROSTER, PLACE, (advert,) * MAX_CLIENTS)
    assert Signatures.from_bytes(roster.to_bytes(), Kind.ROSTER) == roster
    Survivors.from_bytes(Survivors(PLACE, names, names).to_bytes())
    shares = (bytes(66),) * MAX_CLIENTS
    Reveal.from_bytes(Reveal(PLACE, names[0], shares, shares).to_bytes())


@pytest.mark.parametrize("names", [("b", "a"), ("a", "a")])
def test_lists_are_sorted_and_distinct(names: tuple[str, ...]) -> None:
    with pytest.raises(ProtocolError, match="not sorted and distinct"):
        Survivors.from_bytes(Survivors(PLACE, names, ()).to_bytes())
    with pytest.raises(FedpeftError, match="sorted, distinct and not empty"):
        Setup(1, bytes(32), (*names, "c"), 3, FIXED)


@pytest.mark.parametrize("name", ["x" * 129, "ü" * 65, "line\nbreak", "\x00"])
def test_names_that_could_not_be_read_are_not_written(name: str) -> None:
    with pytest.raises(FedpeftError, match="a name is printable text of at most 128 bytes"):
        Writer().name(name)


@pytest.mark.parametrize("text", [b"\xff", b"\x00", b"\n"])
def test_names_that_are_no_names_are_not_read(text: bytes) -> None:
    with pytest.raises(ProtocolError, match="a name in it"):
        Reader(bytes([len(text)]) + text, "list", 10).name()


@pytest.mark.parametrize("round", [-1, 2**64])
def test_rounds_are_whole_numbers_of_eight_bytes(round: int) -> None:
    with pytest.raises(FedpeftError, match="round is"):
        Setup(round, bytes(32), ("a", "b", "c"), 3, FIXED)


def test_more_clients_than_the_protocol_takes_are_refused() -> None:
    names = tuple(f"{k:05d}" for k in range(MAX_CLIENTS + 1))
    with pytest.raises(FedpeftError, match="1001 clients cannot aggregate securely"):
        Setup(1, bytes(32), names, 700, FixedPoint(64, 1.0, 2000, 4))
