"""Flower's stock strategies drive the batched engine unchanged."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, FedProx, Result, Strategy
from flwr.supercore.task_identity import TaskIdentity

import fedpeft.strategies.fedavg
import fedpeft.strategies.fedprox
from fedpeft import strategy as strategies
from fedpeft.cohort.lanes import LoopLane
from fedpeft.engine import play_round
from fedpeft.errors import FedpeftError
from fedpeft.federation import Failure, Partial
from fedpeft.flower.grid import CohortGrid
from fedpeft.flower.records import encode_tree
from fedpeft.metrics import Score
from fedpeft.strategy import Messages
from fedpeft.tree import Tree
from tests.tiny import IA3, LORA, Tiny

ROUNDS = 3


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins as a process that Flower did not start."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    random.seed(0)  # Flower's strategies sample with the global stream
    yield


def ours(tiny: Tiny, algorithm: strategies.Strategy[Any]) -> Tree:
    """The adapter of fedpeft's own engine after all rounds."""
    federation = tiny.federation(algorithm)
    state = algorithm.init(tiny.problem)
    for number in range(1, ROUNDS + 1):
        state, report = play_round(algorithm, state, federation, tiny.rounds, tiny.seed, number)
        assert report.replied == len(tiny.sizes)
    return algorithm.adapter(state)


def flowers(tiny: Tiny, grid: CohortGrid, strategy: Strategy) -> Result:
    arrays = encode_tree(tiny.network.initial)
    return strategy.start(grid=grid, initial_arrays=arrays, num_rounds=ROUNDS)


def gap(result: Result, wanted: Tree) -> float:
    assert result.arrays is not None
    assert set(result.arrays) == set(wanted)
    found = {name: torch.from_numpy(array.numpy()) for name, array in result.arrays.items()}
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


@pytest.mark.parametrize("adapter", [LORA, IA3], ids=["lora", "ia3"])
def test_stock_fedavg_gives_the_engines_adapter(adapter: Mapping[str, Any]) -> None:
    tiny = Tiny(adapter=adapter)
    wanted = ours(tiny, fedpeft.strategies.fedavg.FedAvg())
    moved = max(float((wanted[n] - tiny.network.initial[n]).abs().max()) for n in wanted)
    assert moved > 1e-2
    grid = CohortGrid(tiny.federation(fedpeft.strategies.fedavg.FedAvg()))
    result = flowers(tiny, grid, FedAvg())
    assert gap(result, wanted) < 1e-6
    assert set(result.train_metrics_clientapp) == {1, 2, 3}
    assert set(result.evaluate_metrics_clientapp[3]) == {"loss", "accuracy"}


def test_stock_fedprox_with_its_mu_gives_the_engines_adapter() -> None:
    tiny = Tiny()
    prox = fedpeft.strategies.fedprox.FedProx(mu=0.5)
    wanted = ours(tiny, prox)
    grid = CohortGrid(tiny.federation(prox), config={"proximal-mu": 0.5})
    assert gap(flowers(tiny, grid, FedProx(proximal_mu=0.5)), wanted) < 1e-6
    plain = ours(tiny, fedpeft.strategies.fedavg.FedAvg())
    assert max(float((plain[n] - wanted[n]).abs().max()) for n in wanted) > 1e-4


def test_a_setting_that_no_client_heeds_is_refused() -> None:
    tiny = Tiny()
    prox = fedpeft.strategies.fedprox.FedProx(mu=0.5)
    for config in ({}, {"proximal-mu": 0.25}):
        grid = CohortGrid(tiny.federation(prox), config)
        with pytest.raises(FedpeftError, match=r"proximal-mu=0\.5 would go unheeded"):
            flowers(tiny, grid, FedProx(proximal_mu=0.5))


@pytest.mark.parametrize("kind", [FedAdam, FedMedian])
def test_other_stock_strategies_run(kind: type[FedAvg]) -> None:
    tiny = Tiny()
    grid = CohortGrid(tiny.federation(fedpeft.strategies.fedavg.FedAvg()))
    result = flowers(tiny, grid, kind())
    assert set(result.evaluate_metrics_clientapp) == {1, 2, 3}
    assert gap(result, tiny.network.initial) > 1e-3


class Spy:
    """A federation whose answers are made up; it keeps what it was asked."""

    def __init__(self, sizes: Mapping[str, int], bad: Mapping[str, str] | None = None) -> None:
        self.sizes = dict(sizes)
        self.bad = dict(bad or {})
        self.asked: list[tuple[int, Messages]] = []

    def clients(self) -> Mapping[str, int]:
        return self.sizes

    def run(self, round: int, messages: Messages) -> Iterator[Messages | Failure | Partial]:
        self.asked.append((round, messages))
        for k, name in enumerate(messages.clients):
            reason = self.bad.get(name)
            if reason == "nan":
                own = {"x": messages.trees["adapter"]["x"][k : k + 1] * float("nan")}
            else:
                own = {"x": messages.trees["adapter"]["x"][k : k + 1] + self.sizes[name]}
            if reason in (None, "nan"):
                loss = torch.tensor([float(k)])
                yield Messages((name,), {"adapter": own}).reply(
                    {"adapter": own}, weight=torch.ones(1), loss=loss
                )
            else:
                yield Failure(name, str(reason))

    def evaluate(self, round: int, messages: Messages) -> Iterator[dict[str, Score] | Failure]:
        self.asked.append((round, messages))
        yield {name: Score(int(name == "a") * 4, 0.5, 0.25, 0.1) for name in messages.clients[:-1]}
        yield Failure(messages.clients[-1], "broken")

    def memory(self) -> dict[str, dict[str, Tree]]:
        return {}

    def restore(self, memory: Mapping[str, Mapping[str, Tree]]) -> None:
        raise AssertionError("not called")


def content(config: Mapping[str, int] | None = None, value: float = 1.0) -> RecordDict:
    arrays = encode_tree({"x": torch.full((2,), value)})
    return RecordDict({"some-key": arrays, "config": ConfigRecord(dict(config or {}))})


def ask(grid: CohortGrid, kind: str, shared: RecordDict) -> list[Message]:
    nodes = list(grid.get_node_ids())
    return [Message(shared, node, kind) for node in reversed(nodes)]


def test_all_messages_of_a_push_train_in_one_run_on_one_copy() -> None:
    spy = Spy({"a": 1, "b": 2, "c": 3})
    grid = CohortGrid(spy)
    shared = content({"server-round": 7})
    before = copy.deepcopy(shared)
    ids = list(grid.push_messages(ask(grid, "train", shared)))
    [(number, messages)] = spy.asked
    assert (number, messages.clients) == (7, ("a", "b", "c"))
    assert messages.trees["adapter"]["x"].untyped_storage().nbytes() == 8
    assert shared == before
    replies = list(grid.pull_messages(ids))
    assert [grid.names[r.metadata.src_node_id] for r in replies] == ["a", "b", "c"]
    assert [r.metadata.reply_to_message_id for r in replies] == ids[::-1]
    assert [r.content["some-key"]["x"].numpy().tolist() for r in replies] == [
        [2.0, 2.0],
        [3.0, 3.0],
        [4.0, 4.0],
    ]
    assert replies[1].content["metrics"] == MetricRecord({"num-examples": 2, "loss": 1.0})
    assert list(grid.pull_messages(ids)) == []


def test_rounds_are_counted_where_the_server_does_not_say() -> None:
    spy = Spy({"a": 1, "b": 2})
    grid = CohortGrid(spy)
    for kind in ("train", "evaluate", "train", "evaluate"):
        list(grid.send_and_receive(ask(grid, kind, content())))
    assert [number for number, _ in spy.asked] == [1, 1, 2, 2]


def test_each_node_may_get_its_own_arrays() -> None:
    spy = Spy({"a": 1, "b": 2})
    grid = CohortGrid(spy)
    low, high = grid.get_node_ids()
    messages = [Message(content(value=10), high, "train"), Message(content(value=20), low, "train")]
    replies = list(grid.send_and_receive(messages, timeout=0.0))
    values = [float(r.content["some-key"]["x"].numpy()[0]) for r in replies]
    assert values == [21.0, 12.0]


def test_failures_and_nan_are_error_replies_of_their_client_alone() -> None:
    spy = Spy({"a": 1, "b": 2, "c": 3}, bad={"a": "ValueError: no", "c": "nan"})
    grid = CohortGrid(spy)
    replies = list(grid.send_and_receive(ask(grid, "train", content())))
    reasons = [r.error.reason if r.has_error() else None for r in replies]
    assert reasons == ["ValueError: no", None, "NaN or Inf in the trained adapter"]
    result = FedAvg().start(
        grid, ArrayRecord({"x": content().array_records["some-key"]["x"]}), num_rounds=1
    )
    assert result.arrays is not None
    np.testing.assert_array_equal(result.arrays["x"].numpy(), np.float32([3, 3]))


def test_evaluation_without_examples_is_an_error_reply() -> None:
    grid = CohortGrid(Spy({"a": 1, "b": 2, "c": 3}))
    first, *others = grid.send_and_receive(ask(grid, "evaluate", content()))
    metrics = {"num-examples": 4, "loss": 0.5, "accuracy": 0.25}
    assert first.content == RecordDict({"metrics": MetricRecord(metrics)})
    reasons = [message.error.reason for message in others]
    assert reasons == ["it holds out no example to be evaluated on", "broken"]


def test_messages_that_cannot_be_served_are_refused() -> None:
    grid = CohortGrid(Spy({"a": 1, "b": 2}))
    low, high = grid.get_node_ids()
    two = RecordDict({"p": ArrayRecord(), "q": ArrayRecord()})
    other = RecordDict({"x": encode_tree({"y": torch.ones(2)})})
    wrong: list[tuple[list[Message], str]] = [
        ([Message(content(), 1, "train")], "node 1 does not exist"),
        ([Message(content(), low, "query")], "message type 'query' is unknown"),
        ([Message(two, low, "train")], r"2 ArrayRecords \(\['p', 'q'\]\)"),
        ([Message(content(), low, "train")] * 2, "for the same node"),
        ([Message(content(), low, "train"), Message(other, high, "train")], "different arrays"),
    ]
    for messages, reason in wrong:
        with pytest.raises(FedpeftError, match=reason):
            grid.push_messages(messages)


def test_a_strategy_with_more_than_an_adapter_is_refused() -> None:
    class Two(Spy):
        def run(self, round: int, messages: Messages) -> Iterator[Messages | Failure | Partial]:
            yield Messages(messages.clients, {"adapter": {}, "control": {}})

    grid = CohortGrid(Two({"a": 1, "b": 2}))
    with pytest.raises(FedpeftError, match=r"replies with the trees \['adapter', 'control'\]"):
        grid.push_messages(ask(grid, "train", content()))


def test_a_federation_that_averages_replies_is_refused() -> None:
    class Averages(Spy):
        def run(self, round: int, messages: Messages) -> Iterator[Messages | Failure | Partial]:
            yield Partial(messages.rows([0]), 2, (), {})

    grid = CohortGrid(Averages({"a": 1, "b": 2}))
    with pytest.raises(FedpeftError, match=r"want each client's own: use a CohortFederation"):
        grid.push_messages(ask(grid, "train", content()))


def test_the_loop_lane_gives_the_same() -> None:
    tiny = Tiny()
    algorithm = fedpeft.strategies.fedavg.FedAvg()
    grid = CohortGrid(tiny.federation(algorithm, chunk=1, lane=LoopLane))
    assert gap(flowers(tiny, grid, FedAvg()), ours(tiny, algorithm)) < 1e-6


def test_a_process_of_flowers_own_keeps_its_identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 11, 12, 13
    grid = CohortGrid(Spy({"a": 1}))
    assert (TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id) == (11, 12, 13)
    assert grid.run.run_id == 11
