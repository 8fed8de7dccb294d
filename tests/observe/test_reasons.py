"""Every reason for which a client is excluded falls into a class, and what it names does not."""

from __future__ import annotations

import pytest
import torch

from fedpeft.message import Messages
from fedpeft.observe.reasons import CLASSES, OTHER, reason_class
from fedpeft.validate import check_stack

LIKE = {"adapter": {"x": torch.zeros(2)}}


def refused(value: torch.Tensor, **scalars: float) -> str:
    told = {name: torch.tensor([number]) for name, number in scalars.items()}
    stack = Messages(("a",), {"adapter": {"x": value}}, told)
    _, reasons = check_stack(stack, LIKE, {"a": 3.0})
    return reasons["a"]


def test_reasons_of_the_check_of_replies() -> None:
    good, bad = torch.zeros(1, 2), torch.full((1, 2), torch.nan)
    found = {
        reason_class(refused(bad, weight=3.0)),
        reason_class(refused(good)),
        reason_class(refused(good, weight=4.0)),
        reason_class(refused(torch.zeros(1, 3), weight=3.0)),
        reason_class(refused(good.double(), weight=3.0)),
    }
    assert found == {"not finite", "wrong weight", "wrong tensors"}


@pytest.mark.parametrize(
    ("reason", "wanted"),
    [
        ("its node is not connected", "not connected"),
        ("no reply within 60 seconds", "no reply"),
        ("NaN or Inf in what was trained: it cannot be encoded", "not finite"),
        ("FedpeftError: client 'a' has spent its privacy budget", "privacy budget"),
        ("BudgetError: client 'a' has spent epsilon=9", "privacy budget"),
        ("no secure sum: 2 answered", "secure sum"),
        ("the reply is of round 3, asked was 4", "wrong header"),
        ("FedpeftError: the server asks for base 'x', this node has 'y'", "wrong header"),
        ("the sender's fedpeft 9.9 is newer than this one", "wrong header"),
        ("PayloadError: damaged", "unreadable"),
        ("record 'x' is missing", "unreadable"),
        ("RuntimeError (the traceback is in the node's log)", "client failed"),
        ("FedpeftError: whatever it is", "client failed"),
        ("\x1b[2J", OTHER),
        ("", OTHER),
    ],
)
def test_reasons_of_nodes(reason: str, wanted: str) -> None:
    assert reason_class(reason) == wanted


def test_a_client_cannot_make_a_class() -> None:
    assert {reason_class(f"Kind{n}Error: {n}") for n in range(50)} <= set(CLASSES)
