"""Writing client by client gives what writing at once gives, and leaves nothing half-written."""

from __future__ import annotations

import errno
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.data import store_writer
from fedpeft.data.clients import Population
from fedpeft.data.examples import Examples, flatten
from fedpeft.data.fingerprint import sealed
from fedpeft.data.store import open_store
from fedpeft.data.store_writer import StoreWriter, write_store
from fedpeft.data.tokens import take
from tests.tiny import tiny_population


def one(labels: list[int] | None = None, rows: list[list[int]] | None = None) -> Examples:
    return flatten(rows or [[1, 2]], labels if labels is not None else [0], 0)


def begun(folder: Path, **given: Any) -> StoreWriter:
    return StoreWriter(folder, **{"task": "classification", "labels": ("x",), "pad": 0, **given})


def test_client_by_client_is_the_same_store(tmp_path: Path) -> None:
    """``tiny_population`` numbers its examples client by client, as the writer does."""
    population = sealed(tiny_population((5, 9, 3, 12)))
    write_store(population, tmp_path / "whole")
    with begun(tmp_path / "grown", labels=population.labels) as store:
        store.test(population.test)
        for client in population.clients:
            own = (take(population.examples, part) for part in (client.train, client.holdout))
            store.add(client.name, *own)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "grown" / file.name).read_bytes(), file.name
    assert open_store(tmp_path / "grown").fingerprint == population.fingerprint


def test_clients_without_holdout(tmp_path: Path) -> None:
    with begun(tmp_path / "s") as store:
        store.add("a", one([0, 0], [[1], [2, 3]]))
        store.add("b", one())
        store.test(one())
    clients = open_store(tmp_path / "s").clients
    assert [(c.name, c.train.tolist(), c.holdout.tolist()) for c in clients] == [
        ("a", [0, 1], []),
        ("b", [2], []),
    ]


@pytest.mark.parametrize("block", [1, 3])
def test_large_arrays_are_copied_in_pieces(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    population = sealed(tiny_population((5, 9)))
    monkeypatch.setattr(store_writer, "BLOCK", block)
    write_store(population, tmp_path / "s")
    assert open_store(tmp_path / "s").fingerprint == population.fingerprint
    write_store(open_store(tmp_path / "s"), tmp_path / "t")
    assert open_store(tmp_path / "t").fingerprint == population.fingerprint


def test_what_would_not_be_read_is_not_written(tmp_path: Path, refuses: Any) -> None:
    with refuses("client 'a' after 'b'", "ascending"), begun(tmp_path / "s") as store:
        store.add("b", one())
        store.add("a", one())
    with refuses("0 training examples", "at least one"), begun(tmp_path / "s") as store:
        store.add("b", take(one(), np.empty(0, np.int64)))
    with refuses("labels from 0 to 1", "from 0 to 0"), begun(tmp_path / "s") as store:
        store.add("b", one([0, 1], [[1], [1]]))
    with refuses("without labels"), begun(tmp_path / "s") as store:
        store.add("b", replace(one(), labels=None))
    with refuses("with labels"), begun(tmp_path / "s", task="causal_lm", labels=()) as store:
        store.add("b", one())
    with refuses("negative"), begun(tmp_path / "s") as store:
        store.add("b", one(rows=[[1, -1]]))
    empty = Examples(torch.tensor([1], dtype=torch.int32), torch.tensor([0, 0, 1]), None, 0)
    with refuses("no token"), begun(tmp_path / "s", task="causal_lm", labels=()) as store:
        store.test(empty)
    with refuses("no names"), begun(tmp_path / "s") as store:
        store.test(one())
    with refuses("no test"), begun(tmp_path / "s") as store:
        store.add("b", one())
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_touched(tmp_path: Path, refuses: Any) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine").write_text("x")
    with refuses("is there already", "new or empty folder"):
        write_store(tiny_population((3,)), tmp_path / "s")
    with refuses("is there already"):
        write_store(tiny_population((3,)), tmp_path / "s" / "mine")
    assert [p.name for p in tmp_path.rglob("*")] == ["s", "mine"]
    (tmp_path / "s" / "mine").unlink()
    write_store(tiny_population((3,)), tmp_path / "s")
    assert len(open_store(tmp_path / "s").clients) == 1


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), begun(tmp_path / "s") as store:
        store.add("a", one())
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Any) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for verb in ("append", "finish"):
        with monkeypatch.context() as patch:
            patch.setattr(store_writer._Column, verb, full)
            with refuses("cannot write the store", "No space left", "another folder"):
                write_store(tiny_population((3,)), tmp_path / "s")
        assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_clients(tmp_path: Path) -> None:
    """Of a thousand clients more, less is kept than one object each."""

    def held(clients: int) -> int:
        tracemalloc.start()
        with begun(tmp_path / str(clients)) as store:
            store.test(one())
            for number in range(clients):
                store.add(f"c{number:06}", one(), one())
            size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size

    held(10)
    assert held(1100) - held(100) < 50_000


def test_the_population_is_the_type_that_runs_take(tmp_path: Path) -> None:
    write_store(tiny_population((3,)), tmp_path / "s")
    assert isinstance(open_store(str(tmp_path / "s")), Population)
