"""Changes of the base on the wire: what is missing, the smaller way; the stale are refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.folding import Book, follow
from fedpeft.strategy import Messages
from fedpeft.tree import Tree, numel
from tests.strategies.toy import make

LAYER = "base_model.model.bert.layer.0.query"
OUT, IN, RANK = 20, 30, 2


def update(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return {LAYER: (torch.randn(OUT, RANK, generator=draw), torch.randn(RANK, IN, generator=draw))}


def dense(versions: int) -> Tensor:
    changes = [update(v)[LAYER] for v in range(1, versions + 1)]
    return torch.stack([up @ down for up, down in changes]).sum(0)


def book(versions: int) -> Book:
    found = Book()
    for v in range(1, versions + 1):
        found = found.changed(update(v))
    return found


def sent(at: Book, *clients: str) -> Messages:
    trees, scalars = at.news(clients)
    return Messages.broadcast(clients, trees, scalars)


def size(trees: dict[str, Tree]) -> int:
    return sum(numel(tree) for tree in trees.values())


def test_a_client_is_sent_the_factors_that_it_missed_or_the_dense_change_if_smaller() -> None:
    factors = RANK * (OUT + IN)
    for missed in range(10):
        at = Book(**{**vars(book(9)), "held": {"c": 9 - missed}})
        trees, scalars = at.news(["c"])
        assert scalars == {"fold_since": 9 - missed, "fold_version": 9}
        assert size(trees) == min(missed * factors, OUT * IN)
        assert set(trees) == (
            {f"fold.{v}" for v in range(10 - missed, 10)} if missed <= 6 else {"fold"}
        )
    assert set(book(9).recent) == {4, 5, 6, 7, 8, 9}, "older ones are never sent again"


def test_clients_of_one_version_are_one_group() -> None:
    at = book(2).received(["b", "d"]).changed(update(3)).received(["d"])
    assert at.groups(["a", "b", "c", "d"]) == [("d",), ("b",), ("a", "c")]
    assert at.held == {"b": 2, "d": 3}
    with pytest.raises(ValueError, match="unpack"):
        at.news(["a", "b"])


def test_an_empty_update_is_no_version() -> None:
    at = book(1)
    assert at.changed({LAYER: (torch.zeros(OUT, 0), torch.zeros(0, IN))}) is at


@pytest.mark.parametrize("steps", [(0, 1, 2, 3), (0, 3), (0, 1, 9), (0, 9)])
def test_however_a_client_comes_to_a_version_its_base_is_the_same(steps: tuple[int, ...]) -> None:
    """By factors one after another, several at once, or dense."""
    toy = make(1)
    for before, after in itertools.pairwise(steps):
        at = Book(**{**vars(book(after)), "held": {"client-0": before}})
        base = follow(sent(at, "client-0"), toy.cohort(["client-0"]))
    assert torch.equal(base[LAYER], book(steps[-1]).total[LAYER])
    assert torch.allclose(base[LAYER], dense(steps[-1]), atol=1e-5)


def test_a_repeated_message_changes_nothing() -> None:
    toy = make(1)
    message = sent(book(2), "client-0")
    one = follow(message, toy.cohort(["client-0"]))
    again = follow(message, toy.cohort(["client-0"]))
    assert torch.equal(one[LAYER], again[LAYER])


def test_a_stale_client_is_refused_and_so_is_one_of_another_run() -> None:
    toy = make(2)
    at = Book(**{**vars(book(3)), "held": {"client-0": 2}})
    with pytest.raises(FedpeftError, match=r"client-0' keeps version 0 of 'base'.*after version 2"):
        follow(sent(at, "client-0"), toy.cohort(["client-0"]))
    follow(sent(book(3), "client-1"), toy.cohort(["client-1"]))
    with pytest.raises(FedpeftError, match=r"keep version 3.*server is at 1: .*another run"):
        follow(sent(book(1), "client-1"), toy.cohort(["client-1"]))


def test_clients_of_one_process_share_one_copy() -> None:
    """A client that lags behind is brought from the process's version, not from its own."""
    toy = make(3)
    first = follow(sent(book(1), "client-0", "client-1"), toy.cohort(["client-0", "client-1"]))
    at = Book(**{**vars(book(2)), "held": {"client-0": 1}})
    second = follow(sent(at, "client-0"), toy.cohort(["client-0"]))
    at = Book(**{**vars(book(2)), "held": {"client-1": 1}})
    third = follow(sent(at, "client-1"), toy.cohort(["client-1"]))
    assert third[LAYER].data_ptr() == second[LAYER].data_ptr() != first[LAYER].data_ptr()
    assert torch.equal(third[LAYER], book(2).total[LAYER])
