"""Replies of all clients at once; what messages do otherwise is tested with strategies."""

from __future__ import annotations

import pytest
import torch

from fedpeft.message import Messages, gather


def replies(*weights: float) -> list[Messages]:
    """Stacks of two clients and of one; the tensor of client k is full of k."""
    own = torch.arange(3.0)[:, None].expand(3, 2)
    weight = torch.tensor(weights, dtype=torch.float64)
    return list(Messages(("a", "b", "c"), {"adapter": {"w": own}}, {"weight": weight}).split(2))


def test_gathered_replies_are_one_stack_with_weights_of_sum_one() -> None:
    own, p = gather(iter(replies(1.0, 3.0, 4.0)), "adapter")
    assert own["w"].tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert p.tolist() == [0.125, 0.375, 0.5] and p.dtype == torch.float64


def test_replies_without_weight_have_no_shares() -> None:
    with pytest.raises(ValueError, match="total weight 0.0"):
        gather(iter(replies(0.0, 0.0, 0.0)), "adapter")
