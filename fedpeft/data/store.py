"""A population on disk, opened without reading it: ``data.source`` may name such a folder.

::

    store.json            what it is, how many of what, the fingerprint; see ``Head``
    tokens.npy            int32    the clients' examples, as in ``Examples``
    starts.npy            int64
    labels.npy            int64    classification only
    test-tokens.npy, ...           the same of the test set
    train.npy             int64    each client's example numbers, as in ``Clients``
    train-starts.npy      int64
    holdout.npy, holdout-starts.npy
    names.npy             uint8    the clients' names in UTF-8, ascending
    names-starts.npy      int64

The arrays are mapped into memory and read where a client is trained. Opening reads the offsets and
the names, checks them against their checksums and each other, and every file's size. The rest is
checked for numbers out of range as it is read; ``verify_store`` reads every byte.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from fedpeft.data.clients import Clients, Pieces, Population, Task
from fedpeft.data.examples import Examples, Limits
from fedpeft.errors import FedpeftError
from fedpeft.names import Names

KIND, VERSION, HEAD = "fedpeft store", 1, "store.json"
BLOCK = 1 << 20
"""Bytes that are read at a time."""

DTYPES = {
    "tokens": "<i4",
    "starts": "<i8",
    "labels": "<i8",
    "test-tokens": "<i4",
    "test-starts": "<i8",
    "test-labels": "<i8",
    "train": "<i8",
    "train-starts": "<i8",
    "holdout": "<i8",
    "holdout-starts": "<i8",
    "names": "|u1",
    "names-starts": "<i8",
}
_OFFSETS = {  # file -> what it points into, and whether empty pieces are allowed
    "starts": ("tokens", False),
    "test-starts": ("test-tokens", False),
    "train-starts": ("train", False),
    "holdout-starts": ("holdout", True),
    "names-starts": ("names", False),
}


@dataclass(frozen=True)
class Origin:
    """What a store was made from, so that nothing else is read into it.

    model: the name of the model whose tokenizer made the tokens, and tokenizer, the tokenizer's
    digest; empty for tokens of no tokenizer. settings: of the recipe, by section and key.
    """

    model: str = ""
    tokenizer: str = ""
    settings: Mapping[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Head:
    """What ``store.json`` says.

    pad: the pad token. vocabulary: all tokens are below it. longest: tokens of the clients'
    longest example. files: name -> {"count": numbers in it, "sha256": of its bytes behind the .npy
    header}.
    """

    task: Task
    labels: tuple[str, ...]
    pad: int
    vocabulary: int
    longest: int
    fingerprint: str
    model: str
    tokenizer: str
    settings: Mapping[str, Mapping[str, Any]] | None
    files: Mapping[str, Mapping[str, Any]]

    def count(self, name: str) -> int:
        """Numbers in a file; 0 where there is none."""
        return int(self.files[name]["count"]) if name in self.files else 0


def is_store(source: str) -> bool:
    """Whether ``source`` is the path of a folder that has a store's head."""
    return (Path(source).expanduser() / HEAD).is_file()


def open_store(folder: str | Path) -> Population:
    """The population of a store. Raises FedpeftError where it is not whole or not a store."""
    path = Path(folder).expanduser()
    head = read_head(path)
    for name in head.files:
        _check_size(path, head, name)
    for name in (*_OFFSETS, "names"):
        _check_digest(path, head, name)
    for name in _OFFSETS:
        _check_offsets(path, head, name)
    return read(path, head)


def read(path: Path, head: Head) -> Population:
    """The population of a store whose files are as ``head`` says."""
    files = {name: _mapped(path, name) for name in head.files if head.count(name)}
    arrays = {
        name: np.frombuffer(file, DTYPES[name], offset=len(npy_head(DTYPES[name], 0)))
        for name, file in files.items()
    }
    arrays.setdefault("holdout", np.empty(0, np.int64))
    clients = Clients(
        Names(arrays["names"], arrays["names-starts"]),
        Pieces(arrays["train"], arrays["train-starts"]),
        Pieces(arrays["holdout"], arrays["holdout-starts"]),
        below=head.count("starts") - 1,
    )
    examples, test = _examples(arrays, "", head), _examples(arrays, "test-", head)
    mapped = tuple(files.values())
    return Population(head.task, clients, examples, test, head.labels, head.fingerprint, mapped)


def verify_store(folder: str | Path) -> Head:
    """Reads every byte of a store. Raises FedpeftError that names the first damaged file."""
    path = Path(folder).expanduser()
    open_store(path)
    head = read_head(path)
    for name in head.files:
        _check_digest(path, head, name)
    return head


def read_head(path: Path) -> Head:
    """A store's head. Raises FedpeftError: no store, another version, damaged."""
    try:
        document = json.loads((path / HEAD).read_bytes())
        kind, version = document["kind"], document["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedpeftError(
            f"{path} is not a store ({HEAD}: {type(error).__name__}). Give a folder that "
            "`fedpeft store` wrote."
        ) from None
    if kind != KIND:
        raise FedpeftError(f"{path} is not a store: {HEAD} is of kind {kind!r}, not {KIND!r}.")
    if version != VERSION:
        raise FedpeftError(
            f"{path} is a store of version {version!r}, this fedpeft reads version {VERSION}. Use "
            "the fedpeft that wrote it, or write it again."
        )
    content = document.get("content")
    if document.get("sha256") != digest_of(content) or not isinstance(content, dict):
        raise damaged(path, f"{HEAD}: its SHA-256 is not its own")
    try:
        return _head(path, content)
    except FedpeftError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, f"{HEAD}: {type(error).__name__}: {error}") from None


def _head(path: Path, content: dict[str, Any]) -> Head:
    known = {field.name for field in fields(Head)}
    if content.keys() != known:
        raise damaged(path, f"{HEAD} differs in {sorted(content.keys() ^ known)}")
    head = Head(**{**content, "labels": tuple(content["labels"])})
    unlabelled = {"labels", "test-labels"} if head.task == "causal_lm" else set()
    wanted = DTYPES.keys() - unlabelled
    clients, examples, test = (head.count(f"{name}starts") - 1 for name in ("names-", "", "test-"))
    pairs = {"train-starts": clients + 1, "holdout-starts": clients + 1}
    if not unlabelled:
        pairs |= {"labels": examples, "test-labels": test}
    sound = head.task in get_args(Task) and head.files.keys() == wanted
    if not sound or min(clients, examples, test) < 1:
        raise damaged(path, f"{HEAD} names the files {sorted(head.files)} of task {head.task!r}")
    for name, count in pairs.items():
        if head.count(name) != count:
            raise damaged(path, f"{name}.npy has {head.count(name)} numbers, not {count}")
    return head


def digest_of(content: object) -> str:
    """The SHA-256 of a head's content."""
    text = json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def damaged(path: Path, what: str) -> FedpeftError:
    """The error for a store that is not whole."""
    return FedpeftError(
        f"data.source={str(path)!r}: the store is damaged, {what}. Copy it again from where it is "
        "whole, or write it again with `fedpeft store`."
    )


def npy_head(dtype: str, count: int) -> bytes:
    """The .npy header of a vector; as long for any count, so that a vector can grow in place."""
    out = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(out, described)
    return out.getvalue()


def _check_size(path: Path, head: Head, name: str) -> None:
    """The file has exactly the header and the length that the head says."""
    file, count = path / f"{name}.npy", head.count(name)
    wanted = npy_head(DTYPES[name], count)
    size = len(wanted) + count * np.dtype(DTYPES[name]).itemsize
    try:
        found = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(len(wanted))
    except OSError as error:
        raise damaged(path, f"{file.name} cannot be read ({error.strerror})") from None
    if found != size:
        raise damaged(path, f"{file.name} has {found} of {size} bytes")
    if start != wanted:
        raise damaged(path, f"{file.name} does not begin as a vector of {count} {DTYPES[name]}")


def _blocks(path: Path, head: Head, name: str) -> Iterator[bytes]:
    """The numbers of a file in pieces of BLOCK bytes, through a buffer: nothing stays mapped."""
    with (path / f"{name}.npy").open("rb") as stream:
        stream.seek(len(npy_head(DTYPES[name], head.count(name))))
        while block := stream.read(BLOCK):
            yield block


def _check_digest(path: Path, head: Head, name: str) -> None:
    digest = hashlib.sha256()
    for block in _blocks(path, head, name):
        digest.update(block)
    if digest.hexdigest() != head.files[name]["sha256"]:
        raise damaged(path, f"{name}.npy: its SHA-256 is not that of {HEAD}")


def _check_offsets(path: Path, head: Head, name: str) -> None:
    """Offsets ascend from 0 to the end of what they point into."""
    target, empty = _OFFSETS[name]
    ascends = np.greater_equal if empty else np.greater
    sound, begin, last = True, None, 0 if empty else -1
    for block in _blocks(path, head, name):
        numbers = np.frombuffer(block, DTYPES[name])
        begin = int(numbers[0]) if begin is None else begin
        sound &= bool(numbers[0] >= last) and bool(ascends(numbers[1:], numbers[:-1]).all())
        last = int(numbers[-1]) + int(not empty)
    if not sound or begin != 0 or last - int(not empty) != head.count(target):
        raise damaged(path, f"{name}.npy does not divide {target}.npy")


def _mapped(path: Path, name: str) -> mmap.mmap:
    with (path / f"{name}.npy").open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _examples(arrays: Mapping[str, np.ndarray], of: str, head: Head) -> Examples:
    with warnings.catch_warnings():  # torch cannot protect what it maps; nothing writes to examples
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        tensors = {
            part: torch.from_numpy(arrays[f"{of}{part}"])
            for part in ("tokens", "starts", "labels")
            if f"{of}{part}" in arrays
        }
    limits = Limits(head.vocabulary, len(head.labels), head.longest)
    return Examples(tensors["tokens"], tensors["starts"], tensors.get("labels"), head.pad, limits)
