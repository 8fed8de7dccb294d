"""A faulty reply excludes its client, with a reason that names the fault; the others stay."""

from __future__ import annotations

import math

import pytest
import torch

from fedpeft.strategy import Messages
from fedpeft.validate import check_stack

LIKE = {"adapter": {"a": torch.zeros(2, 3), "b": torch.zeros(4)}}
CLIENTS = ("x", "y", "z")
WEIGHTS = {"x": 5.0, "y": 7.0, "z": 1.0}


def replies() -> Messages:
    trees = {"adapter": {"a": torch.ones(3, 2, 3), "b": torch.ones(3, 4)}}
    return Messages(CLIENTS, trees, {"weight": torch.tensor([5.0, 7.0, 1.0]).double()})


def test_sound_replies_pass_untouched() -> None:
    stack = replies()
    good, reasons = check_stack(stack, LIKE, WEIGHTS)
    assert good is stack and reasons == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value: float) -> None:
    stack = replies()
    stack.trees["adapter"]["b"][1, 2] = value
    good, reasons = check_stack(stack, LIKE, WEIGHTS)
    assert good.clients == ("x", "z")
    assert list(reasons) == ["y"] and "NaN or Inf in tensor 'b'" in reasons["y"]
    assert good.scalars["weight"].tolist() == [5.0, 1.0]


@pytest.mark.parametrize("claimed", [70.0, 0.0, -7.0, math.nan, math.inf])
def test_a_client_cannot_claim_another_weight(claimed: float) -> None:
    stack = replies()
    stack.scalars["weight"][1] = claimed
    good, reasons = check_stack(stack, LIKE, WEIGHTS)
    assert good.clients == ("x", "z")
    assert f"weight {claimed} claimed, but it is registered with 7.0" in reasons["y"]


def test_a_stranger_is_refused() -> None:
    _, reasons = check_stack(replies(), LIKE, {"x": 5.0, "y": 7.0})
    assert reasons == {"z": "it did not take part in this round"}


def broken(part: str) -> tuple[Messages, str]:
    stack = replies()
    tree = stack.trees["adapter"]
    if part == "missing tensor":
        del tree["b"]
        return stack, "tensor 'b' is missing from tree 'adapter'"
    if part == "unknown tensor":
        tree["canary"] = torch.ones(3, 1)
        return stack, "tensor 'canary' of tree 'adapter' was not asked for"
    if part == "shape":
        tree["a"] = torch.ones(3, 3, 2)
        return stack, "tensor 'a' has shape (3, 2), not (2, 3)"
    if part == "dtype":
        tree["a"] = tree["a"].double()
        return stack, "tensor 'a' has dtype torch.float64, not torch.float32"
    if part == "unknown tree":
        return Messages(CLIENTS, {**stack.trees, "more": {}}, stack.scalars), "tree 'more' was not"
    if part == "missing tree":
        return Messages(CLIENTS, {}, stack.scalars), "tree 'adapter' is missing from the reply"
    return Messages(CLIENTS, stack.trees), "the scalar 'weight' is missing"


@pytest.mark.parametrize(
    "part",
    [
        "missing tensor",
        "unknown tensor",
        "shape",
        "dtype",
        "unknown tree",
        "missing tree",
        "weight",
    ],
)
def test_a_stack_of_another_schema_is_refused_by_name(part: str) -> None:
    stack, said = broken(part)
    good, reasons = check_stack(stack, LIKE, WEIGHTS)
    assert len(good) == 0 and set(reasons) == set(CLIENTS)
    assert all(said in reason for reason in reasons.values())
