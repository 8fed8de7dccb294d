"""The run folder: everything that a run leaves, and the mark that it is one.

::

    run.json           the mark: {"kind": "fedpeft run", "schema": 1, "run": its identity, random,
                       "deployed": whether its clients are a deployment's sites}
    recipe.yaml        the resolved recipe, complete
    environment.json   versions and hardware
    data.json          {"fingerprint": SHA-256 of the tokenised, partitioned data}
    metrics.jsonl      see metrics_log
    privacy.jsonl      of private runs, the ledger: see fedpeft.privacy.ledger
    privacy.json       of private runs, the statement; its figures are those of the end
    checkpoints/       see checkpoint
    adapter/           the final adapter, in peft's format
"""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.errors import FedpeftError, suggest
from fedpeft.record import environment
from fedpeft.record.files import failed_write, replace
from fedpeft.record.metrics_log import MetricsLog

SCHEMA = 1
_MARK = "run.json"
_KIND = "fedpeft run"


@dataclass(frozen=True)
class RunFolder:
    """One run's folder; made by ``create`` (a new run) or ``open`` (an existing one)."""

    path: Path

    @staticmethod
    def create(path: Path, overwrite: bool = False, deployed: bool = False) -> RunFolder:
        """A new run's folder, at a place that does not exist or is an empty folder.

        With ``overwrite``, a run folder there is emptied first; anything else is never touched.
        Raises FedpeftError.
        """
        RunFolder.check(path, overwrite)
        try:
            path.mkdir(parents=True, exist_ok=True)
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
        replace(self.path / "recipe.yaml", recipe.encode())
        _write_json(self.path / "environment.json", environment.describe())
        _write_json(self.path / "data.json", {"fingerprint": fingerprint})

    def recipe(self) -> str:
        """The recorded recipe (YAML). Raises FedpeftError where the run did not get that far."""
        return self._recorded("recipe.yaml")

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
