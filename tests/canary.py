"""Searching everything that was written or sent for what should not be in it.

A canary is a text or bytes that was planted where it may be (a row of a site's data, a path, a
token, private memory). ``leaks`` looks for it as it is and in the forms that programs make of it,
also inside of zip and gzip files. Over the folder of a deployment:

    python -m tests.canary FOLDER CANARY [CANARY ...]

searches all its files but those of the sites themselves, ``sites/NAME/`` and ``logs/NAME.log``, and
ends with 1 where it finds one.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from flwr.app import ArrayRecord, Message, RecordDict

Place = tuple[str, bytes]
SHORTEST = 6
"""Bytes of a canary: shorter ones are found by chance."""


def forms(canary: str | bytes) -> set[bytes]:
    """A canary as it is, and escaped, encoded, in hexadecimal and base64 at any place."""
    raw = canary.encode() if isinstance(canary, str) else canary
    assert len(raw) >= SHORTEST, f"{raw!r} is too short for a canary"
    found = {raw, raw.hex().encode(), raw.hex().upper().encode()}
    for skip in range(3):
        text = base64.b64encode(bytes(skip) + raw)
        inner = text[4 if skip else 0 : -4]  # the ends depend on what stands beside
        if len(inner) >= 2 * SHORTEST:
            found |= {inner, inner.translate(bytes.maketrans(b"+/", b"-_"))}
    if isinstance(canary, str):
        found |= {json.dumps(canary)[1:-1].encode(), quote(canary, safe="").encode()}
        found |= {canary.encode("utf-16-le"), repr(canary)[1:-1].encode()}
    return found


def leaks(canaries: Mapping[str, str | bytes], places: Iterable[Place]) -> list[str]:
    """``PLACE: CANARY`` for each canary (name -> what was planted) that a place holds."""
    wanted = {name: forms(canary) for name, canary in canaries.items()}
    count, found = 0, []
    for place, data in places:
        count += 1
        for part, inner in unpacked(place, data):
            found += [
                f"{part}: {n}" for n, every in wanted.items() if any(f in inner for f in every)
            ]
    assert count > 0, "there was nothing to search"
    return found


def unpacked(place: str, data: bytes) -> Iterator[Place]:
    """The bytes, and what is in them where they are an archive."""
    yield place, data
    if data[:2] == b"\x1f\x8b":
        try:
            yield f"{place} (gzip)", gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            return
    elif data[:4] == b"PK\x03\x04" and zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield f"{place}/{name}", archive.read(name)


def files(folder: Path, skip: Callable[[str], bool] = lambda name: False) -> Iterator[Place]:
    """Every file below a folder by its relative name, and the name itself; ``skip`` leaves some."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not skip(name):
            yield name, name.encode() + b"\n" + path.read_bytes()


def record(content: RecordDict) -> bytes:
    """All names, texts, bytes and arrays of Flower's records."""
    parts: list[bytes] = []
    for key, value in content.items():
        parts.append(key.encode())
        for name, entry in value.items():
            parts.append(name.encode())
            if isinstance(value, ArrayRecord):
                parts.append(entry.data)
            else:
                parts.append(entry if isinstance(entry, bytes) else str(entry).encode())
    return b"\n".join(parts)


def messages(sent: Iterable[Message]) -> Iterator[Place]:
    """What Flower's messages carry: their records or their error, and their metadata."""
    for number, message in enumerate(sent):
        kind = message.metadata.message_type
        place = f"message {number} ({kind} to {message.metadata.dst_node_id})"
        own = repr(message.metadata).encode()
        if message.has_error():
            yield place, own + str(message.error.reason).encode()
        else:
            yield place, own + record(message.content)


def of_a_site(name: str) -> bool:
    """Whether a file of a deployment's folder is a site's own."""
    return name.startswith("sites/") or (name.startswith("logs/") and name != "logs/server.log")


def main() -> None:
    folder, *planted = sys.argv[1:]
    found = leaks({canary: canary for canary in planted}, files(Path(folder), of_a_site))
    print(*found, sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
