"""FlowerFederation and the ClientApp, over a Grid that calls the app in this process."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedpeft import strategy as strategies
from fedpeft.cohort.clients import TorchCohort
from fedpeft.config import Recipe, Rounds
from fedpeft.config_load import dump_recipe, load_strategy, parse_recipe
from fedpeft.engine import RoundReport, play_round
from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.federation import Failure, Federation
from fedpeft.flower.client_app import app, client_of, public_reason
from fedpeft.flower.courier import Patience
from fedpeft.flower.digests import Digests, digests_of
from fedpeft.flower.federation import FlowerFederation
from fedpeft.flower.records import Header, decode, encode
from fedpeft.metrics import Score
from fedpeft.prepare import Prepared, prepare
from fedpeft.strategy import Messages
from fedpeft.tree import Tree
from tests.flower.nodes import InProcess, Reply
from tests.tiny import IA3, LORA, tiny_recipe, write_tiny

SIZES = {"c0": 5, "c1": 9, "c2": 4, "c3": 12}  # of what write_tiny writes, a fifth is held out


pytestmark = pytest.mark.usefixtures("flower_task")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny model and data as files; what ``datasets`` caches of them goes with them."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        write_tiny(folder)
        yield folder


def partitions(count: int = 4) -> dict[int, dict[str, Any]]:
    """Nodes whose ids are in another order than their clients' names."""
    return {900 - k: {"partition-id": k, "num-partitions": count} for k in range(count)}


def federate(
    grid: Grid, recipe: Recipe, nodes: int = 4, digests: Digests | None = None
) -> FlowerFederation:
    return FlowerFederation(grid, recipe, nodes, digests, Patience(join=0.05, reply=5.0))


def play(
    prepared: Prepared, federation: Federation, rounds: int = 2
) -> tuple[Tree, list[RoundReport]]:
    state, reports = prepared.strategy.init(prepared.problem), []
    for number in range(1, rounds + 1):
        recipe = prepared.recipe
        state, report = play_round(
            prepared.strategy, state, federation, recipe.rounds, recipe.seed, number
        )
        reports.append(report)
    return prepared.strategy.adapter(state), reports


def gap(left: Tree, right: Tree) -> float:
    assert left.keys() == right.keys()
    return max(float((left[n] - right[n]).abs().max()) for n in left)


def sent(prepared: Prepared, names: Iterable[str] = SIZES) -> Messages:
    return prepared.strategy.send(prepared.strategy.init(prepared.problem), 1, tuple(names))


def evaluate(prepared: Prepared, federation: Federation) -> dict[str, Score]:
    found: dict[str, Score] = {}
    for part in federation.evaluate(2, sent(prepared)):
        assert not isinstance(part, Failure)
        found.update(part)
    return found


def named(message: Message) -> str:
    return decode(message.content)[1].client


@pytest.mark.parametrize("adapter", [LORA, IA3], ids=["lora", "ia3"])
def test_the_same_adapter_and_scores_as_in_process(folder: Path, adapter: dict[str, Any]) -> None:
    recipe = tiny_recipe(folder, adapter)
    prepared = prepare(recipe)
    federation = federate(InProcess(partitions()), recipe)
    assert federation.clients() == SIZES
    found, reports = play(prepared, federation)
    wanted, books = play(prepared, prepared.federation())
    assert gap(found, wanted) <= 1e-6 < 1e-3 < gap(found, prepared.network.initial)
    for report, book in zip(reports, books, strict=True):
        assert dataclasses.replace(report, seconds=0, loss=0) == dataclasses.replace(
            book, seconds=0, loss=0
        )
        assert report.loss == pytest.approx(book.loss, abs=1e-6)
    scores = evaluate(prepared, federation)
    own = evaluate(prepared, prepared.federation())
    assert list(scores) == list(SIZES)
    assert [s.items for s in scores.values()] == [s.items for s in own.values()] == [1, 2, 0, 2]
    assert [s.loss for s in scores.values()] == pytest.approx(
        [s.loss for s in own.values()], abs=1e-6, nan_ok=True
    )


def test_the_order_of_nodes_and_answers_changes_nothing(folder: Path) -> None:
    recipe = tiny_recipe(folder)
    prepared = prepare(recipe)
    straight = {10 + k: {"client": name} for k, name in enumerate(SIZES)}
    first, _ = play(prepared, federate(InProcess(partitions()), recipe))
    second, _ = play(prepared, federate(InProcess(straight), recipe))
    assert gap(first, second) == 0.0
    stacks = list(federate(InProcess(partitions()), recipe).run(1, sent(prepared, ["c3", "c0"])))
    assert [stack.clients for stack in stacks if isinstance(stack, Messages)] == [("c3", "c0")]


def outcomes(folder: Path, reply: Reply) -> list[Messages | Failure]:
    recipe = tiny_recipe(folder)
    grid = InProcess(partitions(), reply)
    federation = FlowerFederation(grid, recipe, 4, None, Patience(join=0.05, reply=0.05))
    return list(federation.run(1, sent(prepare(recipe))))


def change_of(client: str, change: Callable[[Message, Header], Any]) -> Reply:
    """Changes the named client's reply: ``change`` gives its new content."""

    def reply(request: Message, answer: Message) -> Message | None:
        if named(request) != client:
            return answer
        message, header = decode(answer.content)
        content = change(message, header)  # type: ignore[arg-type]  # fedpeft's message
        return None if content is None else Message(content, reply_to=request)

    return reply


def test_a_reply_of_another_schema_stands_alone(folder: Path) -> None:
    def widen(message: Any, header: Header) -> RecordDict:
        adapter = {name: torch.cat([t, t]) for name, t in message.trees["adapter"].items()}
        return encode(strategies.Message({"adapter": adapter}, message.scalars), header)

    found = outcomes(folder, change_of("c1", widen))
    assert [stack.clients for stack in found if isinstance(stack, Messages)] == [
        ("c0",),
        ("c1",),
        ("c2", "c3"),
    ]
    recipe = tiny_recipe(folder)
    grid = InProcess(partitions(), change_of("c1", widen))
    _, [report] = play(prepare(recipe), federate(grid, recipe), rounds=1)
    assert set(report.excluded) == {"c1"}
    assert "shape" in report.excluded["c1"]
    assert report.replied == 3


BAD_REPLIES: dict[str, tuple[Callable[[Any, Header], Any], str]] = {
    "late": (lambda m, h: None, "no reply within 0.05 seconds"),
    "other round": (
        lambda m, h: encode(m, dataclasses.replace(h, round=2)),
        "the reply is of round 2, asked was 1",
    ),
    "other client": (
        lambda m, h: encode(m, dataclasses.replace(h, client="c2")),
        "the reply is of client 'c2', asked was 'c1'",
    ),
    "other base": (
        lambda m, h: encode(m, dataclasses.replace(h, base="x")),
        "the reply is of base 'x'",
    ),
    "other adapter": (
        lambda m, h: encode(m, dataclasses.replace(h, layout="x")),
        "the reply is of layout 'x'",
    ),
    "malformed": (lambda m, h: RecordDict(), "record 'scalars' is missing"),
}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_bad_reply_costs_its_client_alone(folder: Path, name: str) -> None:
    change, reason = BAD_REPLIES[name]
    found = outcomes(folder, change_of("c1", change))
    [failure] = [one for one in found if isinstance(one, Failure)]
    assert failure.client == "c1"
    assert reason in failure.reason
    stacks = [one.clients for one in found if isinstance(one, Messages)]
    assert stacks == [("c0",), ("c2", "c3")]


def test_an_error_of_flowers_own_is_a_failure(folder: Path) -> None:
    def reply(request: Message, answer: Message) -> Message:
        crashed = Error(8, "ClientApp\n  stopped   responding")
        return Message(crashed, reply_to=request) if named(request) == "c3" else answer

    found = outcomes(folder, reply)
    assert found[-1] == Failure("c3", "ClientApp stopped responding")


def fail_for(client: str, error: Exception) -> Callable[..., Any]:
    train = TorchCohort.fit

    def fit(self: TorchCohort, *args: Any, **kwargs: Any) -> Any:
        if client in self.clients:
            raise error
        return train(self, *args, **kwargs)

    return fit


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("row 17: 'secret' in x.csv"),
            "RuntimeError (the traceback is in the node's log)",
        ),
        (FedpeftError("adapter.r=0 must be"), "FedpeftError: adapter.r=0 must be"),
    ],
    ids=["foreign", "own"],
)
def test_a_failing_client_tells_no_secret(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    reason: str,
) -> None:
    recipe = tiny_recipe(folder)
    monkeypatch.setattr(TorchCohort, "fit", fail_for("c2", error))
    federation = federate(InProcess(partitions()), recipe)
    with caplog.at_level(logging.WARNING):
        _, [report] = play(prepare(recipe), federation, rounds=1)
    assert report.excluded == {"c2": reason}
    assert report.replied == 3
    assert str(error) in caplog.text  # on the node


def test_a_failure_counts_against_the_quorum(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(folder)
    monkeypatch.setattr(TorchCohort, "fit", fail_for("c0", RuntimeError()))
    recipe = dataclasses.replace(recipe, rounds=dataclasses.replace(recipe.rounds, quorum=1.0))
    with pytest.raises(QuorumError, match="3 valid replies of 4 clients"):
        play(prepare(recipe), federate(InProcess(partitions()), recipe))


def test_private_memory_stays_on_the_node(folder: Path) -> None:
    recipe = tiny_recipe(folder, name="local")
    prepared = prepare(recipe)
    assert prepared.strategy.remembers
    grid = InProcess(partitions())
    federation, own = federate(grid, recipe), prepared.federation()
    play(prepared, federation)
    play(prepared, own)
    assert repr(evaluate(prepared, federation)) == repr(evaluate(prepared, own))
    assert all(list(c.state) == ["memory.adapter"] for c in grid.contexts.values())
    assert federation.memory() == {name: {} for name in SIZES}
    fresh = federate(InProcess(partitions()), recipe)
    fresh.restore({})
    with pytest.raises(FedpeftError, match="engine.kind=flower cannot resume.*4 clients.*cohort"):
        fresh.restore(federation.memory())


def test_a_strategy_without_memory_leaves_none(folder: Path) -> None:
    recipe = tiny_recipe(folder)
    federation = federate(InProcess(partitions()), recipe)
    play(prepare(recipe), federation, rounds=1)
    assert federation.memory() == {}
    federation.restore({})


def test_too_few_nodes_is_an_error_in_time(folder: Path) -> None:
    federation = federate(InProcess(partitions(1)), tiny_recipe(folder))
    text = r"1 of 4 nodes joined within 0\.05 seconds, rounds.quorum asks for 2"
    with pytest.raises(FedpeftError, match=text):
        federation.clients()


def test_a_quorum_begins_and_others_join_later(folder: Path) -> None:
    recipe = tiny_recipe(folder)
    grid = InProcess({1: {"client": "c0"}, 2: {"client": "c1"}})
    federation = federate(grid, recipe)
    assert set(federation.clients()) == {"c0", "c1"}
    _, reports = play(prepare(recipe), federation, rounds=1)
    assert reports[0].sampled == ("c0", "c1")
    grid.contexts[3] = Context(1, 3, {"client": "c2"}, RecordDict(), {})
    _, reports = play(prepare(recipe), federation, rounds=1)
    assert set(federation.clients()) == {"c0", "c1", "c2"}


def test_waiting_can_be_ended(folder: Path) -> None:
    def dead() -> None:
        raise RuntimeError("the simulation is dead")

    federation = FlowerFederation(InProcess({}), tiny_recipe(folder), 4, alive=dead)
    with pytest.raises(RuntimeError, match="is dead"):
        federation.clients()


def test_two_nodes_of_one_client_are_refused(folder: Path) -> None:
    nodes = {1: {"client": "c0"}, 2: {"client": "c1"}, 3: {"client": "c0"}}
    every = dataclasses.replace(tiny_recipe(folder), rounds=Rounds(quorum=1.0))
    federation = federate(InProcess(nodes), every, nodes=3)
    with pytest.raises(FedpeftError, match="node 3: client 'c0' has a node already, 1"):
        federation.clients()
    federation = federate(InProcess(nodes), tiny_recipe(folder), nodes=3)
    assert set(federation.clients()) == {"c0", "c1"}


def test_a_node_that_cannot_prepare_is_named(folder: Path) -> None:
    recipe = tiny_recipe(folder)
    broken = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, text="txt"))
    federation = federate(InProcess(partitions()), broken)
    reason = "4 of 4 nodes cannot take part: node 897: FedpeftError: data.text does not fit"
    with pytest.raises(FedpeftError, match=reason):
        federation.clients()


def test_another_base_or_adapter_is_refused(folder: Path) -> None:
    recipe = tiny_recipe(folder)
    right = digests_of(prepare(recipe))
    assert federate(InProcess(partitions()), recipe, digests=right).clients() == SIZES
    for key in ("base", "layout", "words"):
        wrong = dataclasses.replace(right, **{key: "x"})
        federation = federate(InProcess(partitions()), recipe, digests=wrong)
        with pytest.raises(FedpeftError, match="must load the same base model, adapter, tok"):
            federation.clients()


def test_a_node_that_starts_again_is_found_again(folder: Path) -> None:
    recipe = tiny_recipe(folder)
    grid = InProcess(partitions())
    federation = federate(grid, recipe)
    messages = sent(prepare(recipe))
    federation.clients()
    gone = grid.contexts.pop(899)
    assert federation.clients() == SIZES
    found = list(federation.run(1, messages))
    assert [one for one in found if isinstance(one, Failure)] == [
        Failure("c1", "its node is not connected")
    ]
    gone.node_id = 12345
    grid.contexts[12345] = gone
    [stack] = federation.run(2, messages)
    assert isinstance(stack, Messages) and stack.clients == tuple(SIZES)


def test_a_message_for_another_client_is_refused(folder: Path) -> None:
    recipe = tiny_recipe(folder)
    header = Header(1, "c3", recipe=dump_recipe(recipe))
    request = Message(encode(sent(prepare(recipe))[0], header), 7, "train")
    answer = app(request, Context(1, 7, {"partition-id": 0}, RecordDict(), {}))
    assert answer.error.reason == (
        "FedpeftError: the server asks for client 'c3', this node has 'c0'"
    )


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"partition-id": 1}, "b"),
        ({"partition-id": "0"}, "a"),
        ({"client": "c", "partition-id": 0}, "c"),
        ({"partition-id": 3}, "partition-id=3 must be a number below 3"),
        ({"partition-id": -1}, "partition-id=-1"),
        ({}, "partition-id=None must be a number"),
        ({"client": "bb"}, "client='bb' is no client of this recipe. Did you mean 'b'"),
    ],
)
def test_which_client_a_node_is(config: dict[str, Any], wanted: str) -> None:
    if len(wanted) == 1:
        assert client_of(config, ("a", "b", "c")) == wanted
        return
    with pytest.raises(FedpeftError) as caught:
        client_of(config, ("a", "b", "c"))
    assert wanted in str(caught.value)


def test_public_reason_keeps_only_fedpefts_own_messages() -> None:
    assert public_reason("ReplyError: record 'x' is missing") == "ReplyError: record 'x' is missing"
    assert "x.csv" not in public_reason("FileNotFoundError: x.csv")


def test_the_recipe_survives_the_journey(folder: Path) -> None:
    recipe = tiny_recipe(folder, IA3)
    assert parse_recipe(dump_recipe(recipe), "test") == recipe
    assert load_strategy(recipe) == prepare(recipe).strategy
