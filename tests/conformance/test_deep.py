"""The deep stage on the real engine: what it compares is real, and it finds rows that mix."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from fedpeft.cohort.lanes import FoldLane
from fedpeft.conformance import check, deep
from fedpeft.conformance.finding import Property, examine
from fedpeft.strategies.fedavg import FedAvg
from tests.strategies.planted_clients import Clients, Frozen, Private

BOTH = pytest.mark.parametrize("of", deep.PROPERTIES, ids=lambda of: of.__name__)


@BOTH
@pytest.mark.parametrize("bug", ["centred over the cohort", "anchors from outside"])
def test_rows_that_mix_are_found(bug: str, of: Property) -> None:
    wrong = Clients(bug) if bug.startswith("centred") else Private(bug)
    assert examine(wrong, of).verdict == "broken"


@pytest.mark.parametrize("right", [Clients(), Private(), Frozen()], ids=lambda s: type(s).__name__)
def test_right_ones_agree(right: FedAvg) -> None:
    assert [line.verdict for line in check(right, deep.PROPERTIES)] == ["holds", "holds"]


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_clients_move_and_the_frozen_base_is_all_of_the_model_else(
    task: Literal["classification", "causal_lm"],
) -> None:
    federation = deep.Federation(task, FoldLane, pools=False)
    problem = federation.problem
    assert set(problem.scaling.values()) == {2.0}
    base, strategy = federation.frozen(), FedAvg()
    sent = strategy.send(strategy.init(problem), 1, problem.clients)
    reply = federation.train(strategy, 1, sent, 4)
    for name, value in reply.trees["adapter"].items():
        moved = (value - sent.trees["adapter"][name]).flatten(1).norm(dim=1)
        assert bool((moved > 1e-4).sum() >= 3), (name, moved)
    assert federation.frozen() == base
    named = dict(federation.network.model.named_parameters())
    with torch.no_grad():
        next(x for n, x in named.items() if n not in problem.initial).view(-1)[0] += 1e-3
    assert federation.frozen() != base


def test_the_decoder_adapts_conv1d() -> None:
    network = deep.Federation("causal_lm", FoldLane, pools=False).network
    (layer,) = network.scaling
    module = network.model.get_submodule(layer)
    assert isinstance(module.base_layer, Conv1D)
    assert module.fan_in_fan_out
