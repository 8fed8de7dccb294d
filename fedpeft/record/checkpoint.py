"""Checkpoints: everything that a run needs to go on as if it had not stopped.

One folder per checkpoint::

    round-000012/
        tensors-0000.safetensors ...   all tensors, numbered; a new file every ``SHARD`` bytes
        manifest.json                  {"sha256": of "content", "content": {
                                           "version", "round", "state", "memory", "extra",
                                           "files": {name: {"bytes", "sha256"}}}}

A checkpoint is written beside its place, synced, and renamed: it is there whole or not at all.
Reading verifies every byte; what is damaged is skipped for the one before, and named. Client
names are data in the manifest, never file names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import load
from safetensors.torch import save as serialise
from torch import Tensor

from fedpeft.errors import CheckpointError, FedpeftError
from fedpeft.record import codec
from fedpeft.record.files import failed_write, sync_folder, write_synced

S = TypeVar("S")

VERSION = 2
SHARD = 32 * 2**20
_MANIFEST = "manifest.json"
_NAME = re.compile(r"round-(\d{6,})(?:\.(\d+))?")
_FILE = re.compile(r"tensors-\d{4,}\.safetensors", re.ASCII)
_STRANGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
_HIDDEN = ".writing-"


@dataclass(frozen=True)
class Checkpoint(Generic[S]):
    """A run after ``round`` rounds.

    state: the strategy's state, see ``codec`` for what it may hold. memory: what clients keep,
    client -> name -> tree; clients may have any names, and a tree that several share is written
    once. extra: further plain values of the engine's (ledgers, counters), under string keys.
    Tensors come back on the CPU, bit for bit.
    """

    round: int
    state: S
    memory: Mapping[str, Mapping[str, Mapping[str, Tensor]]]
    extra: Mapping[str, Any]


def save(folder: Path, content: Checkpoint[Any], keep: int) -> Path:
    """Writes a checkpoint into ``folder`` and then removes all but the newest ``keep``.

    Checkpoints of this or later rounds are removed too: they belong to a run that went on from an
    earlier one. Raises FedpeftError where writing fails, e.g. on a full disk; what was there before
    stays as it was, and nothing half-written is left.
    """
    if keep < 1:
        raise FedpeftError(f"output.keep={keep} must be at least 1")
    tensors, manifest = _encode(content)
    target = folder / _free_name(folder, content.round)
    temporary = folder / f"{_HIDDEN}{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{_HIDDEN}*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        _write_files(temporary, tensors, manifest)
        os.rename(temporary, target)
        sync_folder(folder)
    except OSError as error:
        raise failed_write(error, target, _remedy(folder)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(folder, target, content.round, keep)
    return target


def latest(folder: Path, state: type[S]) -> tuple[Checkpoint[S], list[str]]:
    """The newest checkpoint that is whole, and a warning for each newer one that is not.

    state: the class of the strategy's state. Raises CheckpointError that names what was found.
    """
    problems: list[str] = []
    for _, _, path in reversed(_found(folder)):
        try:
            return _read(path, state), [f"skipped checkpoint {p}" for p in problems]
        except CheckpointError as error:
            problems.append(f"{path.name}: {error}")
    what = "; ".join(problems) if problems else "there is none"
    raise CheckpointError(
        f"no readable checkpoint in {folder}: {what}. Start the run again with "
        "output.overwrite=true or in another output.folder."
    )


def _encode(content: Checkpoint[Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, state = codec.encode(content.state)
    trees: list[dict[str, Tensor]] = []
    place: dict[int, int] = {}
    memory: dict[str, dict[str, int]] = {}
    for client, own in content.memory.items():
        for tree in own.values():
            if id(tree) not in place:
                place[id(tree)] = len(trees)
                trees.append(dict(tree))
        memory[client] = {name: place[id(tree)] for name, tree in own.items()}
    return tensors, {
        "version": VERSION,
        "round": content.round,
        "state": state,
        "memory": codec.pack({"trees": trees, "clients": memory}, "memory", tensors),
        "extra": codec.pack(dict(content.extra), "extra", tensors),
    }


def _write_files(folder: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    files = {}
    for number, shard in enumerate(_shards(tensors)):
        name = f"tensors-{number:04d}.safetensors"
        data = serialise(shard)
        write_synced(folder / name, data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content = {**manifest, "files": files}
    digest = hashlib.sha256(_dump(content)).hexdigest()
    write_synced(folder / _MANIFEST, _dump({"sha256": digest, "content": content}))
    sync_folder(folder)


def _shards(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > SHARD:
            yield shard
            shard, size = {}, 0
        # A copy: safetensors wants contiguous tensors that do not share memory.
        shard[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
    if shard:
        yield shard


def _dump(content: object) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def _read(path: Path, state: type[S]) -> Checkpoint[S]:
    content = _read_manifest(path)
    try:
        return _unpacked(path, content, state)
    except FedpeftError:
        raise
    except _STRANGE as error:
        raise CheckpointError(f"{_MANIFEST} describes no checkpoint: {error!r:.80}") from None


def _unpacked(path: Path, content: dict[str, Any], state: type[S]) -> Checkpoint[S]:
    tensors: dict[str, Tensor] = {}
    for name, expected in content["files"].items():
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"{name[:40]!r} is no file of a checkpoint")
        data = _bytes(path / name)
        if len(data) != expected["bytes"]:
            raise CheckpointError(f"{name} has {len(data)} of {expected['bytes']} bytes")
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{name} is corrupt: its SHA-256 is not the manifest's")
        # Cloned into torch's own aligned memory: kernels may round differently on unaligned data.
        tensors.update({name: tensor.clone() for name, tensor in load(data).items()})
    memory = codec.unpack(content["memory"], tensors)
    trees = memory["trees"]
    return Checkpoint(
        content["round"],
        codec.decode(state, tensors, content["state"]),
        {c: {n: trees[i] for n, i in own.items()} for c, own in memory["clients"].items()},
        codec.unpack(content["extra"], tensors),
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    data = _bytes(path / _MANIFEST)
    try:
        document = json.loads(data)
        content: dict[str, Any] = document["content"]
        digest = hashlib.sha256(_dump(content)).hexdigest()
    except _STRANGE as error:
        raise CheckpointError(f"{_MANIFEST} is corrupt: {error!r:.80}") from None
    if data != _dump({"sha256": digest, "content": content}):
        raise CheckpointError(f"{_MANIFEST} is corrupt: its SHA-256 is not its own")
    if not isinstance(content, dict) or content.get("version") != VERSION:
        version = content.get("version") if isinstance(content, dict) else None
        raise CheckpointError(
            f"has format {version!r}, this fedpeft reads format {VERSION}: use the "
            "fedpeft that wrote it"
        )
    return content


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from None


def _found(folder: Path) -> list[tuple[int, int, Path]]:
    """Checkpoints by round; of one round, by attempt."""
    own = (p for p in folder.glob("round-*") if not p.is_symlink())  # no way out of the folder
    names = [(p, _NAME.fullmatch(p.name)) for p in own]
    return sorted((int(m[1]), int(m[2] or 0), p) for p, m in names if m)


def _free_name(folder: Path, round: int) -> str:
    attempts = [attempt for number, attempt, _ in _found(folder) if number == round]
    return f"round-{round:06d}" + (f".{max(attempts) + 1}" if attempts else "")


def _prune(folder: Path, newest: Path, round: int, keep: int) -> None:
    others = [(number, path) for number, _, path in _found(folder) if path != newest]
    earlier = [path for number, path in others if number < round]
    stale = [path for number, path in others if number >= round]
    for path in stale + earlier[: max(0, len(earlier) - (keep - 1))]:
        # Renamed first, so that nothing half-removed looks like a checkpoint. What cannot be
        # removed now is removed by the next save.
        hidden = path.with_name(_HIDDEN + path.name)
        with contextlib.suppress(OSError):
            os.rename(path, hidden)
            shutil.rmtree(hidden)


def _remedy(folder: Path) -> str:
    rounds = sorted({number for number, _, _ in _found(folder)})
    if not rounds:
        return "There is no earlier checkpoint: free some space and start the run again."
    return (
        f"Nothing is lost: the checkpoint of round {rounds[-1]} is intact. Free some space and go "
        f"on with `fedpeft resume {folder.parent}`."
    )
