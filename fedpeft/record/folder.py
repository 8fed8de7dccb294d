"""The run folder: everything that a run leaves, and the mark that it is one.

::

    run.json           the mark: {"kind": "fedpeft run", "schema": 1, "run": its identity, random,
                       "deployed": whether its clients are a deployment's sites}
    recipe.yaml        the resolved recipe, complete
    begun.yaml         the same as the run began with it, for a resume to compare
    environment.json   versions and hardware
    data.json          {"fingerprint": SHA-256 of the tokenised, partitioned data}
    metrics.jsonl      see metrics_log
    privacy.jsonl      of private runs, the ledger: see fedpeft.privacy.ledger
    privacy.json       of private runs, the statement; its figures are those of the end
    checkpoints/       see checkpoint
    adapter/           the final adapter, in peft's format
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from fedpeft.errors import FedpeftError, suggest
from fedpeft.record import environment
from fedpeft.record.files import failed_write, replace
from fedpeft.record.metrics_log import MetricsLog

SCHEMA = 1
_MARK = "run.json"
_KIND = "fedpeft run"
_RECIPE, _BEGUN = "recipe.yaml", "begun.yaml"
_FREE = ("name", "engine", "output")  # sections that change no result


@dataclass(frozen=True)
class RunFolder:
    """One run's folder; made by ``create`` (a new run) or ``open`` (an existing one)."""

    path: Path

    @staticmethod
    def create(path: Path, overwrite: bool = False, deployed: bool = False) -> RunFolder:
        """A new run's folder, at a place that does not exist or is an empty folder.

        With ``overwrite``, a run folder there is emptied first, unless a run is at work in it;
        anything else is never touched. Raises FedpeftError.
        """
        RunFolder.check(path, overwrite)
        try:
            path.mkdir(parents=True, exist_ok=True)
            with RunFolder(path).lock():
                _empty(path)
        except OSError as error:
            raise failed_write(error, path, "Choose another output.folder.") from error
        mark = {"kind": _KIND, "schema": SCHEMA, "run": secrets.token_hex(8), "deployed": deployed}
        _write_json(path / _MARK, mark)
        return RunFolder(path)

    @staticmethod
    def check(path: Path, overwrite: bool = False) -> None:
        """Raises FedpeftError where ``create`` would refuse; touches nothing."""
        if path.exists() and not path.is_dir():
            raise FedpeftError(f"output.folder={path} is a file. Choose another output.folder.")
        if not path.exists() or not any(path.iterdir()):
            return
        if _mark(path) is None:
            raise FedpeftError(
                f"output.folder={path} exists and is not a run folder: fedpeft does not overwrite "
                "what it did not write. Choose another output.folder, or move what is there."
            )
        if not overwrite:
            raise FedpeftError(
                f"output.folder={path} holds a run already. Choose another output.folder, replace "
                f"the run with output.overwrite=true, or go on with it: `fedpeft resume {path}`."
            )

    @staticmethod
    def holds(path: Path) -> bool:
        """Whether a run is in the folder."""
        return _mark(path) is not None

    @staticmethod
    def open(path: Path) -> RunFolder:
        """An existing run's folder. Raises FedpeftError where it is none."""
        if not path.is_dir():
            beside = path.parent.iterdir() if path.parent.is_dir() else []
            runs = [p.name for p in beside if (p / _MARK).is_file()]
            if not runs:
                raise FedpeftError(
                    f"{path} is not a folder, and there is no run beside it. Give the folder that "
                    "`fedpeft run` wrote (its output.folder)."
                )
            raise FedpeftError(f"{path} is not a folder. {suggest(path.name, runs)}")
        mark = _mark(path)
        if mark is None:
            raise FedpeftError(
                f"{path} is not a run folder: it has no {_MARK} of fedpeft. Give the folder that "
                "`fedpeft run` wrote (its output.folder)."
            )
        if mark["schema"] != SCHEMA:
            raise FedpeftError(
                f"{path} is a run folder of schema {mark['schema']!r}, this fedpeft reads schema "
                f"{SCHEMA}. Use the fedpeft that wrote it."
            )
        return RunFolder(path)

    @property
    def identity(self) -> str:
        """The run's own, 16 hexadecimal digits, for good; empty where an older fedpeft began it."""
        return str((_mark(self.path) or {}).get("run", ""))

    @property
    def deployed(self) -> bool:
        """Whether the run's clients are sites of a deployment."""
        return (_mark(self.path) or {}).get("deployed") is True

    @property
    def ledger(self) -> Path:
        """Where the privacy ledger lies, unless it outlives the run."""
        return self.path / "privacy.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Where the final adapter lies."""
        return self.path / "adapter"

    @property
    def metrics(self) -> MetricsLog:
        """The run's metrics."""
        return MetricsLog(self.path / "metrics.jsonl")

    def describe(self, recipe: str, fingerprint: str) -> None:
        """Records the resolved recipe (YAML), the environment and the data's fingerprint."""
        replace(self.path / _RECIPE, recipe.encode())
        replace(self.path / _BEGUN, recipe.encode())
        _write_json(self.path / "environment.json", environment.describe())
        _write_json(self.path / "data.json", {"fingerprint": fingerprint})

    def recipe(self) -> str:
        """The recorded recipe (YAML).

        Raises FedpeftError where the run did not get that far, and, with a list of the changes,
        where the file has been changed since in what changes the result.
        """
        changes = self.changes()
        if changes:
            listed = "; ".join(f"{key}: {was!r} -> {now!r}" for key, (was, now) in changes.items())
            allow = " ".join(f"--allow-change {key}" for key in changes)
            raise FedpeftError(
                f"{self.path / _RECIPE} is not the recipe that the run began with: {listed}. "
                f"Restore it, or mean the change: `fedpeft resume {self.path} {allow}`."
            )
        return self._recorded(_RECIPE)

    def allow(self, keys: Sequence[str]) -> None:
        """Takes changes of these keys of the recipe as meant, from now on.

        Raises FedpeftError for a key that has not changed.
        """
        changes = self.changes()
        for key in keys:
            if key not in changes:
                raise FedpeftError(
                    f"--allow-change {key}: this key of {self.path / _RECIPE} has not changed "
                    f"since the run began. Changed: {', '.join(changes) or '(none)'}."
                )
        if keys and not changes.keys() - set(keys):
            replace(self.path / _BEGUN, self._recorded(_RECIPE).encode())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """The folder for this run alone. Raises FedpeftError where another run has it.

        The kernel holds the lock and lets it go with the process, however that ends.
        """
        handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FedpeftError(
                    f"output.folder={self.path}: another run is at work in it. Wait for its end, "
                    "or choose another output.folder."
                ) from None
            yield
        finally:
            os.close(handle)

    def changes(self, recipe: str | None = None) -> dict[str, tuple[object, object]]:
        """Key -> its value when the run began, and in ``recipe``; of what changes the result.

        recipe: YAML; without one, what the folder holds now. Folders of earlier versions do not say
        what the run began with.
        """
        if not (self.path / _BEGUN).is_file():
            return {}
        was = _flat(self._recorded(_BEGUN))
        now = _flat(self._recorded(_RECIPE) if recipe is None else recipe)
        keys = sorted(key for key in {*was, *now} if key.split(".")[0] not in _FREE)
        return {k: (was.get(k), now.get(k)) for k in keys if was.get(k) != now.get(k)}

    def check_data(self, fingerprint: str) -> None:
        """Raises FedpeftError unless the data are those that the run began with."""
        before = json.loads(self._recorded("data.json"))["fingerprint"]
        if fingerprint != before:
            raise FedpeftError(
                f"{self.path}: the data have changed since the run began (fingerprint "
                f"{fingerprint}, was {before}). Restore them, or start a new run."
            )

    def _recorded(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise FedpeftError(
                f"{self.path} has no {name}: the run stopped before its first round. Start it "
                "again with output.overwrite=true."
            ) from None


def _flat(text: str) -> dict[str, object]:
    """The values of a recipe by dotted key."""
    found: dict[str, object] = {}
    todo = [("", yaml.safe_load(text))]
    while todo:
        key, value = todo.pop()
        if isinstance(value, dict) and (value or not key):
            todo.extend((f"{key}.{name}".lstrip("."), below) for name, below in value.items())
        else:
            found[key] = value
    return found


def _empty(path: Path) -> None:
    """Deletes what is in a run folder; the mark last, so that a broken-off deletion can go on."""
    for entry in sorted(path.iterdir(), key=lambda p: p.name == _MARK):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _mark(path: Path) -> dict[str, Any] | None:
    try:
        mark = json.loads((path / _MARK).read_bytes())
    except (OSError, ValueError):
        return None
    ours = isinstance(mark, dict) and mark.get("kind") == _KIND and "schema" in mark
    return mark if ours else None


def _write_json(path: Path, content: object) -> None:
    replace(path, json.dumps(content, indent=2).encode("ascii") + b"\n")
