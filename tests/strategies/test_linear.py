"""The check that a strategy is linear catches those that only say so."""

from __future__ import annotations

import dataclasses

from fedpeft import tree
from fedpeft.strategies.fedavg import FedAvg, State
from fedpeft.strategy import Replies, weighted_mean
from tests.strategies.test_contract import gap_of_parts


@dataclasses.dataclass(frozen=True)
class Claims(FedAvg):  # type: ignore[misc]
    """Says that it is linear, as FedAvg is, and is not."""

    rule: str = ""

    def receive(self, state: State, replies: Replies) -> State:
        stacks = list(replies)
        mean = weighted_mean(stacks, "adapter")
        if self.rule == "squares":
            squares = (
                ({n: x.square() for n, x in r.trees["adapter"].items()}, r.scalars["weight"])
                for r in stacks
            )
            return State(tree.mean(squares))
        if self.rule == "count":
            return State(tree.scale(mean, 1 / sum(len(r) for r in stacks)))
        if self.rule == "largest":
            return State(tree.scale(mean, max(float(r.scalars["weight"].max()) for r in stacks)))
        return State(mean)


def test_a_wrong_claim_to_be_linear_is_caught() -> None:
    assert gap_of_parts(Claims("")) <= 1e-12
    for rule in ("squares", "count", "largest"):
        assert gap_of_parts(Claims(rule)) > 1e-3
