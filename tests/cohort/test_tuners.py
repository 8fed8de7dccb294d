"""Every adapter kind of the installed peft federates: in the lane that the table says, exactly.

The table is ``tests/tuners.py``. A kind that a newer peft brings fails the count: add a row there
with a small configuration and the lane that carries it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from fedpeft.cohort.choose import TOLERANCE, choose_lane, gap
from fedpeft.cohort.federation import CohortFederation, Settings
from fedpeft.cohort.lanes import FoldLane, Lane, LoopLane, VmapLane
from fedpeft.config import Local, Rounds
from fedpeft.data.clients import ClientData, Clients, Population, Task
from fedpeft.data.examples import Batch
from fedpeft.engine import play_round
from fedpeft.metrics import client_sums
from fedpeft.model import Network, adapter_kinds, attach, build_network, save_adapter, set_mode
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategy import Problem
from fedpeft.tree import Tree
from tests.tuners import CLASSES, ROWS, SAMPLING, Row, base, examples, network, save_experts

LANES: dict[str, type[Lane]] = {lane.name: lane for lane in (FoldLane, VmapLane, LoopLane)}
NAMES = [*ROWS, "xlora"]
KINDS = 45
"""Adapter kinds of peft 0.21.2."""

pytestmark = [
    # what peft says about settings that are meant: PiSSA and OLoRA change base weights, Llama has
    # no biases, a tied embedding may be saved twice, VeLoRA is experimental
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # peft asks transformers by a name that it renamed
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    return ROWS | {"xlora": save_experts(tmp_path_factory.mktemp("experts"))}


def test_every_kind_of_peft_has_a_row() -> None:
    rows = {row.adapter["kind"] for row in ROWS.values()} | {"xlora"}
    missing, gone = adapter_kinds().keys() - rows, rows - adapter_kinds().keys()
    assert not missing and not gone and len(rows) == KINDS, (
        f"peft {peft.__version__} has {len(adapter_kinds())} kinds, {KINDS} are known here. Give "
        f"{sorted(missing)} rows in tests/tuners.py (a small configuration, and the lane that "
        f"choose_lane logs for it), take out {sorted(gone)}, and set KINDS."
    )


def padded(task: Task, clients: int = 3) -> Batch:
    """Three clients with 3, 2 and 1 rows of unequal lengths, or so many with one row each."""
    if clients == 3:
        return examples(task).batch(torch.tensor([[0, 1, 2], [4, 5, -1], [11, -1, -1]]))
    return examples(task).batch(torch.arange(clients)[:, None])


def moved(net: Network, clients: int) -> Tree:
    """A different adapter for every client."""
    stream = torch.Generator().manual_seed(1)
    return {
        name: value + 0.05 * torch.randn((clients, *value.shape), generator=stream)
        for name, value in net.initial.items()
    }


def gradients(net: Network, lane: Lane, batch: Batch, values: Tree, training: bool) -> Tree:
    set_mode(net.model, training, base_dropout=False)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sums, counts = client_sums(net.task, lane.logits(leaves, batch), batch)
    found = torch.autograd.grad(
        (sums / counts).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    for leaf, value in zip(leaves.values(), values.values(), strict=True):
        assert torch.equal(leaf, value)  # nothing is written into clients' tensors
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_expected_lane_gives_the_loops_gradients(
    name: str, rows: dict[str, Row], caplog: pytest.LogCaptureFixture
) -> None:
    row = rows[name]
    net = network(row)
    with caplog.at_level(logging.INFO, logger="fedpeft"):
        lane = choose_lane(net, examples(row.task))
    assert lane.name == row.lane, caplog.text
    assert sum(record.name == "fedpeft.cohort.choose" for record in caplog.records) == 1
    for clients in (3, 5):  # five clients of one row each are how gradients per example come about
        batch, values = padded(row.task, clients), moved(net, clients)
        training = name not in SAMPLING
        wanted = gradients(net, LoopLane(net.model), batch, values, training)
        assert sum(float(g.norm()) for g in wanted.values()) > 1e-6
        found = gradients(net, lane, batch, values, training)
        assert gap(found, wanted) < TOLERANCE


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n in SAMPLING or ROWS.get(n, Row({}, "")).dropout]
)
def test_dropout_and_sampling_run_batched(name: str) -> None:
    row = ROWS[name]
    net = network(row, **({row.dropout: 0.5} if row.dropout else {}))
    batch, values = padded(row.task), moved(net, 3)
    same = {n: v[:1].expand_as(v) for n, v in values.items()}
    lane = choose_lane(net, examples(row.task))
    assert lane.name == row.lane
    found = gradients(net, lane, batch, same, training=True)
    quiet = gradients(net, lane, batch, same, training=False)
    assert all(bool(g.isfinite().all()) for g in found.values())
    assert gap(found, quiet) > 1e-3  # it is on
    repeated = examples(row.task).batch(torch.tensor([[3], [3], [3]]))
    with torch.no_grad():
        set_mode(net.model, True, base_dropout=False)
        logits = lane.logits(same, repeated)
    assert not torch.equal(logits[0], logits[1])  # every client has its own


def outputs(model: nn.Module, task: Task, **named: Tensor) -> Tensor:
    batch = examples(task).batch(torch.tensor([[0, 1, 2, 9]]))
    set_mode(model, training=False, base_dropout=False)
    with torch.no_grad():
        found = model(input_ids=batch.tokens, attention_mask=batch.mask, **named).logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_trainable_tensors_are_all_that_has_to_travel(
    name: str, rows: dict[str, Row], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = rows[name]
    net, twin, start = network(row), network(row), network(row)
    values = {n: v[0] for n, v in moved(net, 1).items()}
    before = outputs(net.model, row.task)
    net.write(values)
    wanted = outputs(net.model, row.task)
    assert not torch.equal(before, wanted)
    twin.write(values)
    assert torch.equal(outputs(twin.model, row.task), wanted)

    caplog.clear()
    save_adapter(start, values, tmp_path, "base")
    warned = "peft loads" in caplog.text or "peft saves no" in caplog.text
    plain = base(row.task)
    plain.config.use_cache = False  # type: ignore[union-attr]
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    asks = row.adapter["kind"] in ("poly", "multitask_prompt_tuning")
    task = {"task_ids": torch.zeros(4, dtype=torch.long)} if asks else {}
    same = torch.allclose(outputs(loaded, row.task, **task), wanted, atol=1e-5)
    assert same != warned

    again = build_network(
        attach(base(row.task), row.adapter, row.task, 0),
        row.task,
        CLASSES,
        torch.device("cpu"),
        start=str(tmp_path),
    )
    assert torch.equal(outputs(again.model, row.task), wanted)


def population(task: Task) -> Population:
    """Three clients with 5, 4 and 3 examples of the table's twelve."""
    everything, clients = examples(task), []
    for k, part in enumerate(np.split(np.arange(12, dtype=np.int64), [5, 9])):
        clients.append(ClientData(f"c{k}", part, part[:1]))
    labels = tuple(f"label-{n}" for n in range(CLASSES)) if task == "classification" else ()
    return Population(task, Clients.of(clients), everything, everything, labels, "table")


@pytest.mark.parametrize("name", NAMES)
def test_a_federated_round_runs(name: str, rows: dict[str, Row]) -> None:
    row = rows[name]
    net, rounds, strategy = network(row), Rounds(count=1), FedAvg()
    lane = LANES[row.lane](net.model)
    settings = Settings(Local(optimizer="sgd", lr=0.1, batch_size=4), rounds, 0)
    chunk = 1 if row.lane == "loop" else 3
    federation = CohortFederation(net, lane, population(row.task), strategy, settings, chunk)
    state = strategy.init(Problem(net.initial, net.scaling, ("c0", "c1", "c2"), 1, 0))
    state, report = play_round(strategy, state, federation, rounds, 0, 1)
    assert not report.excluded
    after = strategy.adapter(state)
    assert any(not torch.equal(after[n], net.initial[n]) for n in after)
    scores = federation.score_shared(after, tuple(federation.clients()))
    assert all(np.isfinite(score.loss) for score in scores.values())
