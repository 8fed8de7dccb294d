"""A store gives back the population that was written, and nothing that is not whole."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.data import store as store_module
from fedpeft.data.clients import Population
from fedpeft.data.examples import flatten
from fedpeft.data.fingerprint import sealed
from fedpeft.data.store import (
    DTYPES,
    HEAD,
    Head,
    digest_of,
    is_store,
    npy_head,
    open_store,
    read_head,
    verify_store,
)
from fedpeft.data.store_writer import write_store
from tests.tiny import tiny_population

OFFSETS = ["starts", "test-starts", "train-starts", "holdout-starts", "names-starts"]


@pytest.fixture(scope="module")
def population() -> Population:
    made = tiny_population((5, 9, 3, 12), held=2)
    return sealed(replace(made, test=tiny_population((4,), seed=1).examples))


@pytest.fixture(scope="module")
def written(population: Population, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "whole"
    write_store(population, folder)
    return folder


@pytest.fixture
def store(written: Path, tmp_path: Path) -> Path:
    """A store to damage."""
    return Path(shutil.copytree(written, tmp_path / "store"))


def flip(file: Path, at: int, to: int | None = None) -> None:
    data = bytearray(file.read_bytes())
    data[at] = data[at] ^ 1 if to is None else to
    file.write_bytes(data)


def rewrite(store: Path, name: str, numbers: list[int]) -> None:
    """Replaces a file's numbers, and all that the head says of them: a store made up with care."""
    data = np.array(numbers, DTYPES[name]).tobytes()
    (store / f"{name}.npy").write_bytes(npy_head(DTYPES[name], len(numbers)) + data)
    file = {"count": len(numbers), "sha256": hashlib.sha256(data).hexdigest()}
    change(store, lambda content: content["files"].update({name: file}))


def change(store: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((store / HEAD).read_text())
    edit(document["content"])
    document["sha256"] = digest_of(document["content"])
    (store / HEAD).write_text(json.dumps(document))


def test_the_round_trip_gives_an_equal_population(population: Population, written: Path) -> None:
    found = open_store(written)
    assert (found.task, found.labels) == (population.task, population.labels)
    assert found.fingerprint == population.fingerprint == sealed(found).fingerprint
    for ours, theirs in zip(found.clients, population.clients, strict=True):
        assert ours.name == theirs.name
        assert ours.train.tolist() == theirs.train.tolist()
        assert ours.holdout.tolist() == theirs.holdout.tolist()
    assert found.examples.longest == population.examples.longest
    index = torch.tensor([[0, 5, -1], [9, 1, 2]])
    ours, theirs = found.examples.batch(index), population.examples.batch(index)
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.labels, theirs.labels)
    assert verify_store(written).vocabulary == int(population.examples.tokens.max()) + 1


def test_the_test_set_does_not_count_among_the_longest(
    population: Population, tmp_path: Path
) -> None:
    """Else a run from the store would plan other chunks than the run from memory."""
    write_store(replace(population, test=flatten([[1] * 30], [0], 0)), tmp_path / "s")
    assert open_store(tmp_path / "s").examples.longest == population.examples.longest < 30


def test_a_language_model_has_no_labels(population: Population, tmp_path: Path) -> None:
    bare = replace(population.examples, labels=None)
    made = sealed(replace(population, task="causal_lm", examples=bare, test=bare, labels=()))
    write_store(made, tmp_path / "s")
    found = open_store(tmp_path / "s")
    assert found.examples.labels is None and found.fingerprint == made.fingerprint
    assert not (tmp_path / "s" / "labels.npy").exists()


def test_opening_reads_offsets_and_names_alone(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    plain = store_module._blocks

    def watched(path: Path, head: Head, name: str) -> Iterator[bytes]:
        seen.append(name)
        return plain(path, head, name)

    monkeypatch.setattr(store_module, "_blocks", watched)
    found = open_store(store)
    assert set(seen) == {*OFFSETS, "names"}
    first, client = int(found.examples.tokens[0]), found.clients[0].train
    for name, number in (("tokens", first + 1), ("train", 36)):
        with (store / f"{name}.npy").open("r+b") as file:
            file.seek(len(npy_head(DTYPES[name], 0)))
            file.write(np.array([number], DTYPES[name]).tobytes())
    assert int(found.examples.tokens[0]) == first + 1  # not a copy
    assert client[0] == 36


@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted in /proc")
def test_released_pages_are_not_resident_and_come_back(tmp_path: Path) -> None:
    row = list(range(4000))
    more = flatten([row] * 50, [0] * 50, 0)
    write_store(replace(tiny_population((3,)), examples=more, test=more), tmp_path / "s")
    found = open_store(tmp_path / "s")

    def resident() -> int:
        size, here = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            words = line.split()
            here = words[-1] == str(tmp_path / "s" / "tokens.npy") if "-" in words[0] else here
            size += int(words[1]) if here and words[0] == "Rss:" else 0
        return size

    assert found.examples.tokens.sum() == 50 * sum(row)
    assert resident() >= 50 * 4 * len(row) // 1024
    found.release()
    assert resident() == 0
    assert found.examples.batch(torch.tensor([[49]])).tokens.tolist() == [row]


def test_files_are_never_written(store: Path) -> None:
    before = {file.name: file.read_bytes() for file in store.iterdir()}
    found = open_store(store)
    with pytest.raises(ValueError, match="read-only"):
        found.clients[0].train[0] = 7
    found.examples.batch(torch.tensor([[0, 1]])).tokens.fill_(3)
    assert {file.name: file.read_bytes() for file in store.iterdir()} == before


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_a_truncated_file_is_refused(store: Path, name: str, refuses: Any) -> None:
    file = store / f"{name}.npy"
    data = file.read_bytes()
    for cut in (data[:-1], data[: len(data) // 2], b"", data + b"x"):
        file.write_bytes(cut)
        with refuses("the store is damaged", f"{name}.npy has {len(cut)} of {len(data)} bytes"):
            open_store(store)
    file.unlink()
    with refuses("the store is damaged", f"{name}.npy cannot be read", "fedpeft store"):
        open_store(store)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_a_flipped_bit_is_found(store: Path, name: str, refuses: Any) -> None:
    """In offsets and names at once; in the rest by verify_store, or where it is out of range."""
    flip(store / f"{name}.npy", -1)
    with refuses("the store is damaged", f"{name}.npy: its SHA-256"):
        verify_store(store)
    if name in OFFSETS or name == "names":
        with refuses("the store is damaged", name):
            open_store(store)
    flip(store / f"{name}.npy", -1)
    flip(store / f"{name}.npy", 20)
    with refuses("the store is damaged", f"{name}.npy does not begin"):
        open_store(store)


@pytest.mark.parametrize("name", ["tokens", "labels"])
@pytest.mark.parametrize("top", [0x7F, 0xFF])
def test_numbers_out_of_range_are_refused_as_they_are_read(
    store: Path, name: str, top: int, refuses: Any
) -> None:
    flip(store / f"{name}.npy", -1, top)
    found = open_store(store)
    last = len(found.examples) - 1
    found.examples.batch(torch.tensor([[0, -1]]))
    with refuses(name[:-1], "not below", "corrupt"):
        found.examples.batch(torch.tensor([[0, last]]))


def test_a_foreign_folder(tmp_path: Path, refuses: Any) -> None:
    assert not is_store(str(tmp_path))
    with refuses("is not a store", "FileNotFoundError", "fedpeft store"):
        open_store(tmp_path)
    for text, error in (("{}", "KeyError"), ("[]", "TypeError"), ("\0", "JSONDecodeError")):
        (tmp_path / HEAD).write_text(text)
        with refuses("is not a store", error):
            open_store(tmp_path)
    (tmp_path / HEAD).write_text('{"kind": "shop", "version": 1}')
    with refuses("is of kind 'shop', not 'fedpeft store'"):
        open_store(tmp_path)


def test_another_version(store: Path, refuses: Any) -> None:
    document = json.loads((store / HEAD).read_text())
    (store / HEAD).write_text(json.dumps({**document, "version": 2}))
    with refuses("a store of version 2, this fedpeft reads version 1"):
        open_store(store)


def test_a_flipped_head(store: Path, refuses: Any) -> None:
    document = json.loads((store / HEAD).read_text())
    for edit in ({"pad": 1}, {"fingerprint": "0"}, {"labels": ["x"]}):
        changed = {**document, "content": {**document["content"], **edit}}
        (store / HEAD).write_text(json.dumps(changed))
        with refuses("damaged", "store.json: its SHA-256 is not its own"):
            open_store(store)


@pytest.mark.parametrize(
    "edit",
    [
        {"task": "regression"},
        {"files": {}},
        {"files": 3},
        {"labels": None},
        {"more": 1},
        {"task": "causal_lm"},
    ],
    ids=str,
)
def test_a_head_that_makes_no_sense(store: Path, edit: dict[str, Any], refuses: Any) -> None:
    change(store, lambda content: content.update(edit))
    with refuses("the store is damaged", "store.json"):
        open_store(store)


@pytest.mark.parametrize(
    ("name", "numbers", "reason"),
    [
        ("train-starts", [0, 5, 3, 17, 29], "does not divide train.npy"),
        ("train-starts", [0, 5, 5, 17, 29], "does not divide"),  # a client without data
        ("train-starts", [1, 5, 14, 17, 29], "does not divide"),
        ("train-starts", [0, 5, 14, 17, 28], "does not divide"),
        ("train-starts", [0, 5, 1 << 62, 17, 29], "does not divide"),
        ("train-starts", [0, 5, -(1 << 63), 17, 29], "does not divide"),
        ("train-starts", [0, 5, 14, 29], "train-starts.npy has 4 numbers, not 5"),
        ("holdout-starts", [0, 2, 2, 1, 8], "does not divide holdout.npy"),
        ("labels", [0, 1], "labels.npy has 2 numbers, not 37"),
    ],
)
def test_offsets_that_do_not_fit(
    store: Path, name: str, numbers: list[int], reason: str, refuses: Any
) -> None:
    rewrite(store, name, numbers)
    with refuses("the store is damaged", reason):
        open_store(store)


def test_offsets_are_checked_across_blocks(
    store: Path, monkeypatch: pytest.MonkeyPatch, refuses: Any
) -> None:
    monkeypatch.setattr("fedpeft.data.store.BLOCK", 8)
    open_store(store)
    rewrite(store, "train-starts", [0, 5, 5, 17, 29])
    with refuses("does not divide"):
        open_store(store)
    rewrite(store, "holdout-starts", [0, 2, 2, 4, 8])
    rewrite(store, "train-starts", [0, 5, 14, 17, 29])
    assert open_store(store).clients[1].holdout.tolist() == []


def test_the_head_says_what_is_there(written: Path) -> None:
    head = read_head(written)
    assert (head.count("starts"), head.count("names-starts"), head.count("no")) == (38, 5, 0)
    assert head.settings is None and head.model == ""
