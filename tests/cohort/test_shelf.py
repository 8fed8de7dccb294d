"""What clients keep: one copy for all, versions by client, through a checkpoint and back."""

from __future__ import annotations

import pytest
import torch

from fedpeft.cohort.shelf import Shelf
from fedpeft.errors import FedpeftError

ONE, TWO = {"x": torch.ones(3)}, {"x": torch.full((3,), 2.0)}


def filled() -> Shelf:
    shelf = Shelf()
    shelf.keep(["a", "b", "c"], "base", 1, ONE)
    shelf.keep(["a", "b"], "base", 2, TWO)
    shelf.keep(["c"], "basis", 7, ONE)
    return shelf


def test_the_newest_is_there_for_whoever_has_come_far_enough() -> None:
    shelf = filled()
    for clients, since in ((["a", "b"], 2), (["a", "c"], 1), ([], 0), (["nobody"], 0)):
        version, value = shelf.kept(clients, "base", since)
        assert version == 2 and torch.equal(value["x"], TWO["x"])
    assert shelf.kept(["a"], "other", 0) == (0, {})
    for client, own in (("c", 1), ("nobody", 0)):
        with pytest.raises(FedpeftError, match=rf"'{client}' keeps version {own} of 'base'"):
            shelf.kept(["a", client], "base", 2)


def test_a_value_for_a_version_that_is_here_is_not_looked_at() -> None:
    shelf = filled()
    shelf.keep(["c"], "base", 2, {"x": torch.zeros(3)})
    assert torch.equal(shelf.kept(["c"], "base", 2)[1]["x"], TWO["x"])


def test_memory_and_back() -> None:
    memory = filled().memory()
    assert set(memory) == {"a", "b", "c"} and set(memory["c"]) == {"kept.base", "kept.basis"}
    assert memory["a"]["kept.base"] is memory["b"]["kept.base"]
    assert set(memory["c"]["kept.base"]) == {"kept version"}, "an older version's tree is gone"
    again = Shelf.of({client: {**own, "private": ONE} for client, own in memory.items()})
    assert again.kept(["a"], "base", 2)[0] == 2 and again.kept(["c"], "basis", 7)[0] == 7
    assert torch.equal(again.kept(["c"], "base", 1)[1]["x"], TWO["x"])
    with pytest.raises(FedpeftError, match="keeps version 1"):
        again.kept(["c"], "base", 2)
