"""Writes a store: of a population in memory, or client by client of one that never is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fedpeft.data.clients import Population, Task
from fedpeft.data.examples import Examples
from fedpeft.data.fingerprint import sealed
from fedpeft.data.store import DTYPES, HEAD, KIND, VERSION, Head, Origin, digest_of, npy_head, read
from fedpeft.errors import FedpeftError

BLOCK = 1 << 20
"""Numbers that are copied at a time."""


class _Column:
    """A .npy vector that grows at its end."""

    def __init__(self, folder: Path, name: str) -> None:
        self.count = 0
        self._dtype = DTYPES[name]
        self._digest = hashlib.sha256()
        self._file = (folder / f"{name}.npy").open("xb")
        self._file.write(npy_head(self._dtype, 0))

    def append(self, numbers: np.ndarray) -> None:
        data = np.ascontiguousarray(numbers, self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.count += len(numbers)

    def finish(self) -> dict[str, Any]:
        """Completes the file; what the head says of it."""
        self._file.seek(0)
        self._file.write(npy_head(self._dtype, self.count))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return {"count": self.count, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._file.close()


@dataclass
class _Seen:
    """What the head says of all examples; nothing passes that would be refused when it is read."""

    classes: int | None
    vocabulary: int
    longest: int = 0

    def check(self, tokens: np.ndarray, lengths: np.ndarray, labels: np.ndarray | None) -> None:
        if lengths.min() < 1 or tokens.min() < 0:
            raise FedpeftError("an example has no token, or a negative one: tokens are at least 0.")
        if (labels is None) != (self.classes is None):
            raise FedpeftError(
                f"examples {'without' if labels is None else 'with'} labels: a store has labels "
                "for classification, and none for causal language modelling."
            )
        if labels is not None and not 0 <= labels.min() <= labels.max() < (self.classes or 0):
            raise FedpeftError(
                f"labels from {labels.min()} to {labels.max()}: with {self.classes} class names "
                f"they are from 0 to {(self.classes or 0) - 1}."
            )
        self.vocabulary = max(self.vocabulary, int(tokens.max()) + 1)


class StoreWriter:
    """A store under way; holds nothing of the clients that were added but buffers.

    It is written beside its place and gets its name when the ``with`` block ends well. Raises
    FedpeftError where something is there already, and where writing fails. labels: class names,
    empty for causal language modelling. pad: the pad token.

        with StoreWriter(folder, "classification", ("no", "yes"), pad=0) as store:
            store.test(examples)
            for name in sorted(...):
                store.add(name, train, holdout)
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        labels: tuple[str, ...],
        pad: int,
        origin: Origin | None = None,
    ) -> None:
        self._folder = folder
        self._part = folder.with_name(f".writing-{folder.name}")
        of = origin or Origin()
        self._head = Head(
            task, labels, pad, 0, 0, "", of.model, of.tokenizer, of.settings, files={}
        )
        self._seen = _Seen(len(labels) if task == "classification" else None, pad + 1)
        self._last = ""
        self._columns: dict[str, _Column] = {}

    def __enter__(self) -> StoreWriter:
        if self._folder.exists() and (not self._folder.is_dir() or any(self._folder.iterdir())):
            raise FedpeftError(
                f"{self._folder} is there already: give a new or empty folder for the store."
            )
        try:
            with self._writing():
                self._begin()
        except FedpeftError:
            self._clear()
            raise
        return self

    def _begin(self) -> None:
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)
        for name in DTYPES:
            if self._head.task == "classification" or not name.endswith("labels"):
                self._columns[name] = _Column(self._part, name)
        for name, column in self._columns.items():
            if name.endswith("starts"):
                column.append(np.zeros(1, np.int64))

    def _clear(self) -> None:
        for column in self._columns.values():
            column.close()
        shutil.rmtree(self._part, ignore_errors=True)

    def test(self, examples: Examples) -> None:
        """Adds examples to the global test set."""
        with self._writing():
            self._examples("test-", examples)

    def add(self, name: str, train: Examples, holdout: Examples | None = None) -> None:
        """Adds a client with its training examples (at least one) and its own test examples.

        Names come in ascending order. Raises FedpeftError otherwise.
        """
        if name <= self._last or not len(train):
            raise FedpeftError(
                f"client {name!r} after {self._last!r} with {len(train)} training examples: "
                "clients come in ascending order of their names, each with at least one."
            )
        self._last = name
        with self._writing():
            for which, own in (("train", train), ("holdout", holdout)):
                first = self._columns["starts"].count - 1
                if own is not None:
                    self._examples("", own)
                    self._columns[which].append(np.arange(first, first + len(own)))
                self._columns[f"{which}-starts"].append(np.array([self._columns[which].count]))
            self._columns["names"].append(np.frombuffer(name.encode(), np.uint8))
            self._columns["names-starts"].append(np.array([self._columns["names"].count]))

    def copy(self, population: Population) -> None:
        """Adds a whole population with its test set, its example numbers as they are."""
        clients = population.clients
        vectors = {
            "train": clients.train.values,
            "train-starts": clients.train.starts[1:],
            "holdout": clients.holdout.values,
            "holdout-starts": clients.holdout.starts[1:],
            "names": clients.names.text,
            "names-starts": clients.names.starts[1:],
        }
        with self._writing():
            for of, examples in (("", population.examples), ("test-", population.test)):
                for start in range(0, len(examples), BLOCK):
                    self._examples(of, examples, start, min(start + BLOCK, len(examples)))
            for name, vector in vectors.items():
                for start in range(0, len(vector), BLOCK):
                    self._columns[name].append(vector[start : start + BLOCK])

    def _examples(self, of: str, own: Examples, start: int = 0, end: int | None = None) -> None:
        """Appends the examples from ``start`` to ``end``."""
        stop = len(own) if end is None else end
        starts = own.starts.numpy()[start : stop + 1]
        tokens = own.tokens.numpy()[starts[0] : starts[-1]]
        labels = None if own.labels is None else own.labels.numpy()[start:stop]
        if stop == start:
            return
        self._seen.check(tokens, np.diff(starts), labels)
        if not of:
            self._seen.longest = max(self._seen.longest, int(np.diff(starts).max()))
        base = self._columns[f"{of}tokens"].count - starts[0]
        self._columns[f"{of}tokens"].append(tokens)
        self._columns[f"{of}starts"].append(starts[1:] + base)
        if labels is not None:
            self._columns[f"{of}labels"].append(labels)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with self._writing():
                    self._finish()
        finally:
            self._clear()

    def _finish(self) -> None:
        for name in ("names", "test-tokens"):
            if not self._columns[name].count:
                raise FedpeftError(
                    f"the store {self._folder} would have no {name.split('-')[0]}: add at least "
                    "one client and one test example."
                )
        files = {name: column.finish() for name, column in self._columns.items()}
        head = replace(
            self._head, vocabulary=self._seen.vocabulary, longest=self._seen.longest, files=files
        )
        content = asdict(head)
        content["fingerprint"] = sealed(read(self._part, head)).fingerprint
        document = {
            "kind": KIND,
            "version": VERSION,
            "content": content,
            "sha256": digest_of(content),
        }
        with (self._part / HEAD).open("x") as out:
            json.dump(document, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        os.replace(self._part, self._folder)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FedpeftError(
                f"cannot write the store {self._folder}: {error.strerror or error}. Free some "
                "space, or choose another folder."
            ) from error


def write_store(population: Population, folder: str | Path, origin: Origin | None = None) -> None:
    """Writes a population; ``open_store`` gives an equal one, of the same fingerprint."""
    path = Path(folder).expanduser()
    pad = population.examples.pad
    with StoreWriter(path, population.task, population.labels, pad, origin) as store:
        store.copy(population)
