"""Clients in flat arrays are the clients that went in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedpeft.data.clients import ClientData, Clients


def client(name: str, train: list[int], holdout: list[int]) -> ClientData:
    return ClientData(name, np.array(train, np.int64), np.array(holdout, np.int64))


GIVEN = [client("b", [4, 1], []), client("a", [0], [3, 2]), client("c", [5], [])]


def plain(found: ClientData) -> tuple[str, list[int], list[int]]:
    return found.name, found.train.tolist(), found.holdout.tolist()


def test_clients_come_by_name_with_their_data() -> None:
    clients = Clients.of(GIVEN)
    wanted = [("a", [0], [3, 2]), ("b", [4, 1], []), ("c", [5], [])]
    assert [plain(c) for c in clients] == wanted
    assert [plain(clients[i]) for i in (-1, -3)] == [wanted[2], wanted[0]]
    assert [plain(c) for c in clients[1:]] == wanted[1:]
    assert plain(clients.find("b")) == wanted[1]
    assert clients.roster == {"a": 1, "b": 2, "c": 1}
    assert clients[0].train.dtype == np.int64


def test_an_unknown_client(refuses: Any) -> None:
    with refuses("client 'd' is not registered", "3 names", "from 'a' to 'c'"):
        Clients.of(GIVEN).find("d")


def test_a_name_twice() -> None:
    with pytest.raises(ValueError, match="distinct"):
        Clients.of([GIVEN[0], GIVEN[0]])


def test_numbers_from_a_file_are_checked_as_they_are_read(refuses: Any) -> None:
    made = Clients.of([client("a", [0, 9], []), client("b", [1], [-1]), client("c", [8], [])])
    checked = Clients(made.names, made.train, made.holdout, below=9)
    assert checked[2].train.tolist() == [8]
    for name, number in (("a", "9"), ("b", "-1")):
        with refuses(f"client {name!r}", number, "from 0 to 8", "store is corrupt"):
            checked.find(name)
