"""What a site's client keeps between rounds, on its disk: private memory, residuals, references.

One folder per run and client, named by a hash::

    STATE/1f0c.../manifest.json          {"sha256": of "content", "content": {"format", "run",
                                             "client", "first", "serial", "versions": [...]}}
    STATE/1f0c.../00000007.safetensors   the tensors of one version
    STATE/forgotten                      runs whose state was removed, one hash a line

A version is what the client keeps after one exchange of one round. It is on the device, and the
manifest with it, before the answer leaves. A server that resumes asks for a round again that the
site has trained already: the site starts from the newest version before that round, so that the
redone round is the same bit by bit, and versions of what is redone are dropped. As many are kept as
the server's checkpoints can ask for. What is damaged, missing or too old is refused: a client that
silently began anew would train something else than the server believes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from safetensors.torch import save as serialise
from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.record.files import failed_write, replace, sync_folder, write_synced
from fedpeft.tree import Tree

FORMAT = 1
RUNS = 8
"""Runs of which a site keeps the state; older ones are removed."""

RECENT = 4
"""Newest versions that are kept in any case."""

CHECKPOINTS = 16
"""Checkpoints of the server that a site keeps versions for, at most."""

_RUN = re.compile(r"[0-9a-f]{8,128}")
_MANIFEST, _FORGOTTEN, _LOCK = "manifest.json", "forgotten", "lock"
_REMEDY = "Nothing was answered; free some space, or mend the folder."

Moment = tuple[int, int]
"""Round and exchange."""


@dataclass(frozen=True)
class _Version:
    """at: when it was saved. serial: names its file. trees: name -> tensor's name -> its number."""

    at: Moment
    serial: int
    bytes: int
    sha256: str
    trees: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class _Manifest:
    """first: the first version there ever was; before it the client kept nothing."""

    first: Moment
    serial: int
    versions: tuple[_Version, ...]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other process answers for this site meanwhile; one that wants to waits.

    Raises FedpeftError where the folder cannot be written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (folder / _LOCK).open("wb")
    except OSError as error:
        raise failed_write(error, folder / _LOCK, _REMEDY) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Store:
    """What one client keeps of one run. folder: the site's state; used under ``locked``.

    run: as the server names it. Raises FedpeftError for one that is not hexadecimal.
    """

    def __init__(self, folder: Path, run: str, client: str) -> None:
        if not _RUN.fullmatch(run):
            raise FedpeftError(
                f"header field 'run' is {run[:40]!r}, and must be 8 to 128 hexadecimal digits: "
                f"install the same fedpeft on server and sites."
            )
        self._run, self._client = run, client
        self._all = folder
        self._name = hashlib.sha256(f"{run} {client}".encode()).hexdigest()[:32]
        self._own = folder / self._name

    def before(self, moment: Moment) -> dict[str, Tree]:
        """What the client kept when that exchange began. Raises FedpeftError, see the module."""
        return self._newest(lambda at: at < moment, moment)

    def after(self, round: int) -> dict[str, Tree]:
        """What the client kept after a round, or the newest before it."""
        return self._newest(lambda at: at[0] <= round, (round + 1, 0))

    def begun(self) -> bool:
        """Whether anything was ever saved. Raises FedpeftError where what was is damaged."""
        return self._read() is not None

    def discard_from(self, moment: Moment) -> None:
        """Forgets this exchange and later ones, which are about to be done again."""
        manifest = self._read()
        if manifest is not None and any(v.at >= moment for v in manifest.versions):
            kept = tuple(v for v in manifest.versions if v.at < moment)
            self._write(_Manifest(manifest.first, manifest.serial, kept), manifest)

    def save(
        self, moment: Moment, memory: Mapping[str, Tree], every: int = 1, keep: int = 2
    ) -> None:
        """Writes what the client keeps after an exchange, down to the device.

        every, keep: the server's ``output.checkpoint_every`` and ``output.keep``.
        """
        before = self._read()
        found = before or _Manifest(moment, 0, ())
        tensors, trees = _numbered(memory)
        data, serial = serialise(tensors), found.serial + 1
        path = self._own / _file(serial)
        try:
            if before is None:
                self._begin()
            path.unlink(missing_ok=True)  # of a save that was cut off
            write_synced(path, data)
            sync_folder(self._own)
        except OSError as error:
            raise failed_write(error, path, _REMEDY) from error
        new = _Version(moment, serial, len(data), hashlib.sha256(data).hexdigest(), trees)
        versions = [*(v for v in found.versions if v.at < moment), new]
        kept = needed([v.at for v in versions], every, keep)
        own = tuple(v for v in versions if v.at in kept)
        self._write(_Manifest(min(found.first, moment), serial, own), found)

    def _newest(self, earlier: Any, moment: Moment) -> dict[str, Tree]:
        manifest = self._read()
        if manifest is None or moment <= manifest.first:
            return {}
        found = [version for version in manifest.versions if earlier(version.at)]
        if not found:
            raise FedpeftError(
                f"the server asks client {self._client!r} for round {moment[0]}, and what it kept "
                f"before that is gone: rounds {[v.at[0] for v in manifest.versions]} are there. "
                f"Resume from a later checkpoint, or start the run again."
            )
        return self._load(max(found, key=lambda version: version.at))

    def _load(self, version: _Version) -> dict[str, Tree]:
        path = self._own / _file(version.serial)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise self._damaged(f"{path.name} cannot be read ({error.strerror})") from error
        if len(data) != version.bytes or hashlib.sha256(data).hexdigest() != version.sha256:
            raise self._damaged(f"{path.name} is not what was written")
        # Cloned into torch's own aligned memory: kernels may round differently on unaligned data.
        tensors = {name: tensor.clone() for name, tensor in load(data).items()}
        return {
            name: {tensor: tensors[number] for tensor, number in own.items()}
            for name, own in version.trees.items()
        }

    def _read(self) -> _Manifest | None:
        path = self._own / _MANIFEST
        try:
            document = json.loads(path.read_bytes())
            content = document["content"]
            if document["sha256"] != _digest(content):
                raise ValueError("its SHA-256 is not its own")
            if (content["format"], content["run"]) != (FORMAT, self._run):
                raise ValueError("it is of another format, or another run's")
            versions = tuple(_Version(**{**v, "at": _moment(v["at"])}) for v in content["versions"])
            return _Manifest(_moment(content["first"]), int(content["serial"]), versions)
        except FileNotFoundError as error:
            if any(self._own.glob("*.safetensors")):
                raise self._damaged(f"{_MANIFEST} is missing") from error
            if self._name in self._forgotten():
                raise FedpeftError(
                    f"what client {self._client!r} kept of this run was removed, as the site keeps "
                    f"the {RUNS} newest runs: start the run again."
                ) from error
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"{_MANIFEST} cannot be used") from error

    def _write(self, manifest: _Manifest, before: _Manifest) -> None:
        """Puts the manifest in the place of the one before, then removes what it names no more."""
        content = {"format": FORMAT, "run": self._run, "client": self._client, **asdict(manifest)}
        document = {"sha256": _digest(content), "content": content}
        replace(self._own / _MANIFEST, json.dumps(document).encode())
        kept = {version.serial for version in manifest.versions}
        for version in before.versions:
            if version.serial not in kept:
                with suppress(OSError):  # a file that nothing names does no harm
                    (self._own / _file(version.serial)).unlink()

    def _begin(self) -> None:
        """Makes the run's folder, and room for it. Raises OSError."""
        self._own.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_folder(self._all)
        others = [path.parent for path in self._all.glob(f"*/{_MANIFEST}")]
        others.sort(key=lambda path: ((path / _MANIFEST).stat().st_mtime_ns, path.name))
        stale = others[: max(0, len(others) + 1 - RUNS)]
        if stale:
            names = sorted({*self._forgotten(), *(path.name for path in stale)})
            replace(self._all / _FORGOTTEN, "".join(f"{name}\n" for name in names).encode())
        for path in stale:
            shutil.rmtree(path)

    def _forgotten(self) -> list[str]:
        try:
            return (self._all / _FORGOTTEN).read_text("ascii").split()
        except FileNotFoundError:
            return []

    def _damaged(self, what: str) -> FedpeftError:
        return FedpeftError(
            f"what client {self._client!r} kept of this run is damaged: {what}, in the site's "
            f"state {self._name}. Restore that folder, or start the run again."
        )


def needed(saved: Sequence[Moment], every: int, keep: int) -> set[Moment]:
    """Of versions, ascending, those that a server may still ask for.

    It resumes after one of its ``keep`` newest checkpoints, which are of every ``every``-th round,
    or, where it was interrupted, of the round before the one under way.
    """
    newest = saved[-1][0]
    every = max(1, every)
    last = newest - newest % every
    rounds = {newest, newest - 1, newest - 2}
    rounds |= {last - every * k for k in range(min(keep, CHECKPOINTS) + 1)}
    found = set(saved[-RECENT:])
    for number in rounds:
        found |= {max((at for at in saved if at[0] <= number), default=saved[-1])}
    return found


def _numbered(memory: Mapping[str, Tree]) -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
    """All tensors under numbers, and which is which."""
    tensors: dict[str, Tensor] = {}
    trees: dict[str, dict[str, str]] = {}
    for name, tree in memory.items():
        trees[name] = {}
        for own, tensor in tree.items():
            number = trees[name][own] = str(len(tensors))
            # A copy: safetensors wants contiguous tensors that do not share memory.
            plain = tensor.detach().cpu()
            tensors[number] = plain.clone(memory_format=torch.contiguous_format)
    return tensors, trees


def _file(serial: int) -> str:
    return f"{int(serial):08d}.safetensors"


def _moment(value: Any) -> Moment:
    round_, exchange = value
    return int(round_), int(exchange)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
