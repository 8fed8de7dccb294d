"""Bytes of messages: a strict binary encoding in which every message has exactly one form.

Little-endian numbers, names with their length, lists with their count. A reader checks every length
against what is left before it takes anything, and refuses bytes that are left over.
"""

from __future__ import annotations

import struct
from typing import Final

from fedpeft.errors import FedpeftError

MAX_CLIENTS: Final = 1000
"""Everybody shares a mask with everybody: beyond this the protocol is too slow to be of use."""

MAX_NAME_BYTES: Final = 128


class ProtocolError(FedpeftError):
    """A message that its receiver refuses: malformed, forged, out of turn or against the rules."""


class Writer:
    """Appends values to a message."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def raw(self, value: bytes) -> Writer:
        """Bytes whose length the reader knows."""
        self._parts.append(value)
        return self

    def u8(self, value: int) -> Writer:
        """A whole number of one byte."""
        return self.raw(struct.pack("<B", value))

    def u32(self, value: int) -> Writer:
        """A whole number of four bytes."""
        return self.raw(struct.pack("<I", value))

    def u64(self, value: int) -> Writer:
        """A whole number of eight bytes."""
        return self.raw(struct.pack("<Q", value))

    def f64(self, value: float) -> Writer:
        """A float64."""
        return self.raw(struct.pack("<d", value))

    def name(self, value: str) -> Writer:
        """A name, with its length. Raises FedpeftError for one that a reader would refuse."""
        text = value.encode()
        if len(text) > MAX_NAME_BYTES or not value.isprintable():
            raise FedpeftError(
                f"client {value[:40]!r}: its name has {len(text)} bytes; a name is printable text "
                f"of at most {MAX_NAME_BYTES} bytes"
            )
        return self.u8(len(text)).raw(text)

    def blob(self, value: bytes) -> Writer:
        """Bytes, with their length."""
        return self.u32(len(value)).raw(value)

    def bytes(self) -> bytes:
        """The message."""
        return b"".join(self._parts)


class Reader:
    """Takes values from a message; every fault is a ProtocolError that names the message."""

    def __init__(self, data: bytes, what: str, limit: int) -> None:
        self._data = data
        self._at = 0
        self._what = what
        if len(data) > limit:
            raise self.fault(f"{len(data)} bytes, and at most {limit} are allowed")

    def fault(self, why: str) -> ProtocolError:
        """The error to raise."""
        return ProtocolError(f"{self._what}: {why}")

    @property
    def left(self) -> int:
        """Bytes that are not taken yet."""
        return len(self._data) - self._at

    def raw(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        if size > self.left:
            raise self.fault(f"ends too early: {size} bytes expected, {self.left} left")
        self._at += size
        return self._data[self._at - size : self._at]

    def u8(self) -> int:
        """A whole number of one byte."""
        return self.raw(1)[0]

    def u32(self) -> int:
        """A whole number of four bytes."""
        return int.from_bytes(self.raw(4), "little")

    def u64(self) -> int:
        """A whole number of eight bytes."""
        return int.from_bytes(self.raw(8), "little")

    def f64(self) -> float:
        """A float64."""
        value: float = struct.unpack("<d", self.raw(8))[0]
        return value

    def name(self) -> str:
        """A name: printable text of at most MAX_NAME_BYTES bytes."""
        text = self.raw(self.u8())
        try:
            value = text.decode()
        except UnicodeDecodeError as error:
            raise self.fault("a name in it is not UTF-8") from error
        if len(text) > MAX_NAME_BYTES or not value.isprintable():
            raise self.fault("a name in it is too long or not printable")
        return value

    def count(self) -> int:
        """How many entries a list has: at most MAX_CLIENTS."""
        value = self.u32()
        if value > MAX_CLIENTS:
            raise self.fault(f"a list of {value}, and at most {MAX_CLIENTS} are allowed")
        return value

    def blob(self) -> bytes:
        """Bytes with their length."""
        return self.raw(self.u32())

    def end(self) -> None:
        """Refuses what is left over."""
        if self.left:
            raise self.fault(f"{self.left} bytes are left over")
