"""Replies are counted the same whether they come one by one or averaged in parts."""

from __future__ import annotations

import math

import pytest
import torch

from fedpeft import tree
from fedpeft.comms.ledger import stack_bytes, totals
from fedpeft.errors import ReplyError
from fedpeft.federation import Failure, Partial
from fedpeft.intake import Intake, average
from fedpeft.strategy import Messages, weighted_mean

WEIGHTS = {f"c{k}": 1.0 + k for k in range(6)}


def replies(names: list[str], nan: str = "") -> Messages:
    draw = torch.Generator().manual_seed(sum(map(ord, "".join(names))))
    k = len(names)
    x = torch.randn(k, 2, 3, generator=draw)
    if nan in names:
        x[names.index(nan), 0, 0] = math.nan
    own = {"a.lora_A": x, "a.modules_to_save.b": torch.randn(k, 4, generator=draw)}
    numbers = {
        "weight": torch.tensor([WEIGHTS[n] for n in names], dtype=torch.float64),
        "loss": torch.rand(k, generator=draw, dtype=torch.float64),
    }
    return Messages(tuple(names), {"adapter": own, "empty": {}}, numbers)


def intake() -> Intake:
    return Intake(dict.fromkeys(WEIGHTS, replies(["c0"])[0].trees), WEIGHTS)


def test_an_average_is_the_mean_by_weight_with_the_total_weight() -> None:
    stacks = [replies(["c0", "c1"]), replies(["c2"])]
    found = average(stacks, "shard 0")
    assert found.clients == ("shard 0",) and found.trees["empty"] == {}
    wanted = weighted_mean(stacks, "adapter")
    assert all(torch.equal(found.trees["adapter"][n][0], v) for n, v in wanted.items())
    assert found.scalars["weight"].tolist() == [6.0]
    losses = torch.cat([s.scalars["loss"] for s in stacks])
    assert float(found.scalars["loss"]) == pytest.approx(
        float((losses * torch.tensor([1, 2, 3])).sum() / 6)
    )
    assert found.trees["adapter"]["a.lora_A"].dtype == torch.float32


def test_the_average_of_nothing_has_no_row_and_blobs_have_none() -> None:
    assert len(average([], "none")) == 0
    one = replies(["c0"])
    with_blob = Messages(one.clients, one.trees, one.scalars, {"code": (b"x",)})
    with pytest.raises(ReplyError, match=r"blob 'code'.*linear=True"):
        average([with_blob], "none")
    other = Messages(("c1",), one.trees, {"weight": one.scalars["weight"]})
    with pytest.raises(ValueError, match="differ in names"):
        average([one, other], "none")


def test_parts_give_the_books_of_the_whole() -> None:
    parts = [
        [replies(["c0", "c3"], nan="c3"), Failure("c5", "OSError: gone")],
        [replies(["c1", "c2"], nan="")],
        [replies(["c4"], nan="c4")],
    ]
    whole, coordinator = intake(), intake()
    good = list(whole.stream([item for part in parts for item in part]))
    partials = [intake().partial(part, f"shard {i}") for i, part in enumerate(parts)]
    rows = list(coordinator.stream(partials))
    assert [len(row) for row in rows] == [1, 1] and [p.clients for p in partials] == [1, 2, 0]
    assert coordinator.excluded == whole.excluded and set(whole.excluded) == {"c3", "c4", "c5"}
    assert (
        totals(coordinator.entries)
        == totals(whole.entries)
        == {kind: size * 5 for kind, size in stack_bytes(replies(["c0"])).items()}
    )
    assert coordinator.replied == whole.replied == 3
    assert coordinator.weight_sum == whole.weight_sum
    assert coordinator.loss_sum == pytest.approx(whole.loss_sum, rel=1e-12)
    left, right = weighted_mean(rows, "adapter"), weighted_mean(good, "adapter")
    assert tree.norm(tree.sub(left, right)) <= 1e-6 * tree.norm(right)


def test_a_partial_is_taken_beside_stacks_and_failures() -> None:
    own = intake()
    part = intake().partial([replies(["c1", "c2"])], "shard 0")
    assert isinstance(part, Partial)
    found = list(own.stream([replies(["c0"]), part, Failure("c3", "late")]))
    assert [m.clients for m in found] == [("c0",), ("shard 0",)]
    assert own.replied == 3 and own.weight_sum == 6.0 and own.excluded == {"c3": "late"}
