"""``fedpeft-manifest.json`` of a folder of weights: SHA-256 and size of every file beside it.

``seal`` writes it, ``verify`` holds the folder to it, and ``read_file`` gives the bytes of one file
as they were verified, so that nothing can be exchanged in between. A folder without a manifest is
somebody else's (peft's, a hub's); its files are still plain files of bounded size, no links.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from fedpeft.errors import FedpeftError

MANIFEST = "fedpeft-manifest.json"
VERSION = 1
MAX_JSON = 4 * 2**20
"""Bytes of a JSON file that is read whole."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}", re.ASCII)
_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
_CHUNK = 2**20


def seal(folder: Path) -> None:
    """Writes the manifest of what is in a folder now, in the place of an older one.

    Folders in it (X-LoRA's experts) are named only: nothing in them is read with this one.
    """
    listed = {
        path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST and path.is_file()
    }
    beside = sorted(path.name for path in folder.iterdir() if path.is_dir())
    content = {"version": VERSION, "files": listed, "folders": beside}
    text = json.dumps(content, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def verify(folder: Path, what: str) -> bool:
    """Holds a folder to its manifest, byte by byte; False where it has none.

    what: the argument that names the folder. Raises FedpeftError, with file and fault, for a file
    that is missing, changed, or not listed, for links, and for a manifest that is none.
    """
    if not os.path.lexists(folder / MANIFEST):
        return False
    listed = _listed(folder, what)
    beside = read_json(folder, MANIFEST, what).get("folders", [])
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and path.name in beside:
            continue
        if path.name not in {*listed, MANIFEST}:
            raise _fault(what, folder, path.name, f"is not in {MANIFEST}")
    for name, (size, digest) in listed.items():
        path = plain_file(folder, name, what)
        if path.stat().st_size != size:
            raise _fault(what, folder, name, f"has {path.stat().st_size} bytes, not {size}")
        if _digest(path) != digest:
            raise _fault(what, folder, name, f"was changed: its SHA-256 is not that of {MANIFEST}")
    return True


def read_file(folder: Path, name: str, limit: int, what: str) -> bytes:
    """The bytes of a file of at most ``limit`` bytes, held to the manifest where there is one.

    Raises FedpeftError as ``verify`` does.
    """
    path = plain_file(folder, name, what)
    size = path.stat().st_size
    if size > limit:
        raise _fault(what, folder, name, f"has {size} bytes, and at most {limit} are read")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if name != MANIFEST and os.path.lexists(folder / MANIFEST):
        known = _listed(folder, what).get(name)
        if known != (len(data), hashlib.sha256(data).hexdigest()):
            raise _fault(what, folder, name, f"is not the file that {MANIFEST} lists")
    return data


def read_json(folder: Path, name: str, what: str) -> dict[str, Any]:
    """The object in a JSON file. Raises FedpeftError, also for one that is none."""
    try:
        found = json.loads(read_file(folder, name, MAX_JSON, what))
    except FedpeftError:
        raise
    except (ValueError, RecursionError) as error:
        raise _fault(what, folder, name, f"is no JSON: {str(error)[:80]}") from None
    if not isinstance(found, dict):
        raise _fault(what, folder, name, "must be a JSON object")
    return found


def plain_file(folder: Path, name: str, what: str) -> Path:
    """A file's path. Raises FedpeftError where it is missing, a link, or no regular file."""
    path = folder / name
    try:
        mode = path.lstat().st_mode
    except OSError:
        raise _fault(what, folder, name, "is missing") from None
    if stat.S_ISLNK(mode):
        raise _fault(what, folder, name, "is a link, and links are not followed: copy the file")
    if not stat.S_ISREG(mode):
        raise _fault(what, folder, name, "is no regular file")
    return path


def _listed(folder: Path, what: str) -> dict[str, tuple[int, str]]:
    """Name -> bytes and SHA-256, checked."""
    found = read_json(folder, MANIFEST, what)
    files = found.get("files")
    if found.get("version") != VERSION or not isinstance(files, dict):
        version = repr(found.get("version"))[:20]
        raise _fault(what, folder, MANIFEST, f"has version {version}, or no files: it must be 1")
    listed = {}
    for name, entry in files.items():
        match entry:
            case {"bytes": int(size), "sha256": str(digest)} if (
                _NAME.fullmatch(name) and _HEX.fullmatch(digest) and size >= 0
            ):
                listed[name] = (size, digest)
            case _:
                raise _fault(
                    what,
                    folder,
                    MANIFEST,
                    f"files: {name[:60]!r} must be a plain file name with its bytes and sha256",
                )
    return listed


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _fault(what: str, folder: Path, name: str, why: str) -> FedpeftError:
    return FedpeftError(
        f"{what}={str(folder)!r}: {name[:80]!r} {why}. Take the folder again from where it was "
        f"written."
    )
