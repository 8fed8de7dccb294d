"""Faults 27 to 42: replies that do not come, come twice, late, from others, or mean another run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, RecordDict
from flwr.app import Message as FlowerMessage

from fedpeft import __version__
from fedpeft.cohort.clients import TorchCohort
from fedpeft.config import Engine, Output, Recipe
from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.events import Watcher
from fedpeft.flower import records
from fedpeft.flower.digests import digests_of
from fedpeft.flower.records import Header, decode, encode
from fedpeft.message import Message
from fedpeft.prepare import prepare
from fedpeft.run import resume, run
from fedpeft.strategies.fedavg import FedAvg
from tests.faults.federated import (
    NAMES,
    Spoil,
    changes_nothing,
    costs_c1_alone,
    faulty_client,
    federate,
    grid_of,
    play,
    recipe_of,
    same,
    skipped,
)
from tests.faults.register import fault
from tests.flower.nodes import InProcess
from tests.test_run import digest, lines


def header(**fields: Any) -> Spoil:
    def spoil(content: RecordDict, message: Message, own: Header) -> RecordDict:
        return encode(message, dataclasses.replace(own, **fields))

    return spoil


def silent(content: RecordDict, message: Message, own: Header) -> None:
    return None


def fit_of(client: str, act: Callable[[], Any]) -> Any:
    """``Cohort.fit``, in which something happens to a client in its second round."""
    whole, calls = TorchCohort.fit, []

    def fit(self: TorchCohort, *args: Any, **kwargs: Any) -> Any:
        if client in self.clients:
            calls.append(client)
            if len(calls) == 2:
                return act()
        return whole(self, *args, **kwargs)

    return fit


@fault(27, "X")
@pytest.mark.parametrize("reply", [None, {"adapter": 1}])
def test_a_client_that_returns_nothing_or_something_else(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, reply: object
) -> None:
    """It is excluded by its answer, not by the clock: the grid has none."""
    whole, calls = FedAvg.train, []

    def train(self: FedAvg, messages: Any, cohort: Any) -> Any:
        if "c1" in cohort.clients:
            calls.append(1)
            if len(calls) == 2:
                return reply
        return whole(self, messages, cohort)

    monkeypatch.setattr(FedAvg, "train", train)
    costs_c1_alone(lambda request, answer: answer, recipe_of(tiny), "the traceback is in the node")


def raising(error: Exception) -> Callable[[], Any]:
    def act() -> Any:
        raise error

    return act


@fault(28, "X")
@pytest.mark.parametrize("own", [False, True])
def test_an_error_leaves_the_client_without_its_secrets(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    secret = "row 17 of patients.csv, token=hf_ABCDEFGHIJKL"
    error = FedpeftError(secret) if own else RuntimeError(secret)
    monkeypatch.setattr(TorchCohort, "fit", fit_of("c1", raising(error)))
    grid = grid_of()
    _, reports = play(grid, recipe_of(tiny))
    told = reports[2].excluded["c1"]
    assert "hf_ABC" not in told and ("[secret]" in told) == own
    assert ("patients" in told) == own  # fedpeft's own words may leave
    monkeypatch.setattr(TorchCohort, "fit", fit_of("c1", raising(error)))
    costs_c1_alone(lambda request, answer: answer, recipe_of(tiny), told)


@fault(29, "X")
def test_a_client_that_does_not_answer_in_time(tiny: Path) -> None:
    costs_c1_alone(faulty_client(silent), recipe_of(tiny), "no reply within 0.05 seconds")


@fault(30, "X")
def test_a_client_whose_process_died(tiny: Path) -> None:
    """As Flower says it; ``test_real_ray`` has real processes."""

    def reply(request: FlowerMessage, answer: FlowerMessage) -> FlowerMessage:
        _, asked = decode(request.content)
        if (asked.client, asked.round) != ("c1", 2):
            return answer
        return FlowerMessage(Error(0, "ActorDiedError: the actor died"), reply_to=request)

    costs_c1_alone(reply, recipe_of(tiny), "the actor died")


@fault(31, "A")
def test_all_clients_fail_once_and_the_round_is_aborted(tiny: Path) -> None:
    recipe = recipe_of(tiny, aborts=1)
    adapter, reports = play(grid_of(faulty_client(header(round=9), NAMES)), recipe)
    assert [bool(report.aborted) for report in reports.values()] == [False, True, False]
    assert same(adapter, skipped(recipe))
    _, books = play(grid_of(), recipe)  # what was sent is on the ledger all the same
    assert reports[2].down == books[2].down and not reports[2].up


def in_files(tiny: Path, out: Path, **rounds: Any) -> Recipe:
    engine = Engine(kind="sequential", threads=1, device="cpu")
    output = Output(folder=str(out))
    recipe = recipe_of(tiny, **rounds)
    return dataclasses.replace(recipe, engine=engine, output=output, baselines=())


@fault(31, "Q")
def test_all_clients_fail_again_and_again_and_the_run_stops_with_its_checkpoint(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(in_files(tiny, tmp_path / "whole"), Watcher())
    tries = []

    class Failing(Watcher):
        def round_began(self, number: int, clients: int, tokens: int) -> None:
            if number == 2:
                monkeypatch.setattr(TorchCohort, "fit", fit)

    def fit(self: TorchCohort, *args: Any, **kwargs: Any) -> Any:
        tries.append(self.clients)
        raise RuntimeError("no memory left")

    with pytest.raises(QuorumError, match="round 2: 0 valid replies.*adapter is kept"):
        run(in_files(tiny, tmp_path / "cut"), Failing())
    assert len(tries) == len(NAMES)
    monkeypatch.undo()
    resume(str(tmp_path / "cut"), Watcher())
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    assert [line["round"] for line in lines(tmp_path / "cut", "round")] == [1, 2, 3]


@fault(32, "A")
def test_no_reply_at_all_is_said(tiny: Path) -> None:
    recipe = recipe_of(tiny, aborts=1)
    adapter, reports = play(grid_of(faulty_client(silent, NAMES)), recipe)
    assert "round 2: 0 valid replies of 4 clients" in reports[2].aborted
    assert same(adapter, skipped(recipe))


@fault(33, "A")
def test_fewer_replies_than_the_quorum(tiny: Path) -> None:
    recipe = recipe_of(tiny, aborts=1, quorum=0.75)
    two = ("c0", "c3")
    adapter, reports = play(grid_of(faulty_client(silent, two)), recipe)
    assert "2 valid replies of 4 clients, fewer than" in reports[2].aborted
    assert reports[2].replied == 2 and same(adapter, skipped(recipe))
    with pytest.raises(QuorumError, match="2 valid replies of 4 clients, fewer than"):
        play(grid_of(faulty_client(silent, two)), recipe_of(tiny, quorum=0.75))


@fault(34, "K")
def test_a_second_reply_is_passed_over(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Twice(InProcess):
        def pull_messages(self, message_ids: Any) -> Any:
            for message in super().pull_messages(message_ids):
                yield message
                if message.metadata.message_type == "train":
                    yield message

    nodes = {10 + k: {"client": name} for k, name in enumerate(NAMES)}
    adapter, reports = play(Twice(nodes), recipe_of(tiny))
    assert all(report.replied == 4 and not report.excluded for report in reports.values())
    assert "passed over a reply that answers nothing, or once more" in caplog.text
    assert same(adapter, play(grid_of(), recipe_of(tiny))[0])


@fault(35, "X")
@pytest.mark.parametrize("what", ["round", "nonce", "run"])
def test_a_reply_of_an_earlier_round_or_run(tiny: Path, what: str) -> None:
    """Round 1's own reply comes again; or one that has everything right but the nonce."""
    kept: list[tuple[Message, Header]] = []

    def reply(request: FlowerMessage, answer: FlowerMessage) -> FlowerMessage:
        _, asked = decode(request.content)
        if asked.client == "c1" and asked.round == 1:
            kept.append(decode(answer.content))
        if asked.client != "c1" or asked.round != 2:
            return answer
        message, old = kept[-1]
        own = decode(answer.content)[1]
        forged = old if what == "round" else dataclasses.replace(own, **{what: "0"})
        return FlowerMessage(encode(message, forged), reply_to=request)

    costs_c1_alone(reply, recipe_of(tiny), f"the reply is of {what}")


@fault(36, "X")
def test_a_reply_from_a_client_that_was_not_drawn(tiny: Path) -> None:
    """c3 is not in round 2, and answers in c1's place; and once in nobody's."""
    recipe = recipe_of(tiny)
    drawn = {2: ("c0", "c1")}
    adapter, reports = play(grid_of(faulty_client(header(client="c3"))), recipe, drawn)
    assert reports[2].excluded == {"c1": "the reply is of client 'c3', asked was 'c1'"}
    assert reports[2].replied == 1
    assert same(adapter, play(grid_of(), recipe, {2: ("c0",)})[0])

    class Meddling(InProcess):
        def pull_messages(self, message_ids: Any) -> Any:
            for message in super().pull_messages(message_ids):
                yield message
                stray = FlowerMessage(message.content, dst_node_id=1, message_type="train")
                stray.metadata.__dict__["_reply_to_message_id"] = str(uuid4())
                yield stray

    nodes = {10 + k: {"client": name} for k, name in enumerate(NAMES)}
    adapter, reports = play(Meddling(nodes), recipe)
    assert all(report.replied == 4 for report in reports.values())
    assert same(adapter, play(grid_of(), recipe)[0])


@fault(37, "X")
def test_another_base_model_is_refused_with_both_hashes(tiny: Path) -> None:
    grid = grid_of()
    federate(grid, recipe_of(tiny)).clients()
    base = decode(grid.answers[0][1].content)[1].base
    reason = f"the reply is of base 'f00d', asked was {base!r}"
    costs_c1_alone(faulty_client(header(base="f00d")), recipe_of(tiny), reason)


@fault(38, "X")
def test_another_adapter_is_refused_with_both_hashes(tiny: Path) -> None:
    """Its configuration comes with the recipe; what is left to differ are the tensors it makes."""
    reason = "the reply is of layout 'f00d', asked was"
    costs_c1_alone(faulty_client(header(layout="f00d")), recipe_of(tiny), reason)


@fault(38, "X")
def test_another_tokenizer_or_label_map_is_refused_with_both_hashes(tiny: Path) -> None:
    reason = "the reply is of words 'f00d', asked was"
    costs_c1_alone(faulty_client(header(words="f00d")), recipe_of(tiny), reason)
    prepared = prepare(recipe_of(tiny))
    labels = prepared.population.labels
    other = dataclasses.replace(prepared.population, labels=labels[::-1])
    assert len(labels) > 1
    own, swapped = (
        digests_of(dataclasses.replace(prepared, population=p))
        for p in (prepared.population, other)
    )
    assert own.words != swapped.words and own.layout == swapped.layout


def newer(by: int) -> str:
    """Another version of fedpeft: 0 a patch, 1 one that does not understand this one."""
    major, minor, patch = (int(number) for number in __version__.split(".")[:3])
    return f"{major}.{minor + by}.{patch + 1}"


@fault(39, "X")
def test_a_client_that_was_updated_in_the_middle(tiny: Path) -> None:
    spoil = header(version=newer(1))
    costs_c1_alone(faulty_client(spoil), recipe_of(tiny), "do not understand each other")


class Introducing(InProcess):
    """Nodes of which c1's introduces itself with another header."""

    def __init__(self, change: Callable[[ConfigRecord], Any]) -> None:
        super().__init__({10 + k: {"client": name} for k, name in enumerate(NAMES)})
        self._change = change

    def pull_messages(self, message_ids: Any) -> Any:
        for message in super().pull_messages(message_ids):
            record = message.content.config_records["header"]
            if message.metadata.message_type == "query" and record["client"] == "c1":
                self._change(record)
            yield message


@fault(39, "E")
def test_another_version_is_refused_before_the_first_round(tiny: Path) -> None:
    grid = Introducing(lambda record: record.update(version=newer(1)))
    with pytest.raises(FedpeftError, match="install the same version on server and sites"):
        play(grid, recipe_of(tiny, quorum=1.0))
    assert {kind for kind, _ in grid.answers} == {"query"}


@fault(39, "K")
def test_a_version_that_differs_a_little_is_said_and_taken(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records._warn.cache_clear()
    with caplog.at_level(logging.WARNING, "fedpeft"):
        changes_nothing(faulty_client(header(version=newer(0))), recipe_of(tiny))
    said = f"the other side has fedpeft {newer(0)}, this one {__version__}"
    assert caplog.text.count(said) == 1


@fault(40, "E")
@pytest.mark.parametrize("what", ["version", "field"])
def test_a_client_that_is_newer_than_the_server(tiny: Path, what: str) -> None:
    changed = {"version": newer(1)} if what == "version" else {"priority": 3}
    grid = Introducing(lambda record: record.update(changed))
    wanted = "is newer than this one" if what == "version" else "header field 'priority' is int"
    with pytest.raises(FedpeftError, match=wanted):
        play(grid, recipe_of(tiny, quorum=1.0))
    assert {kind for kind, _ in grid.answers} == {"query"}


@fault(41, "X")
def test_a_message_whose_time_is_over(tiny: Path) -> None:
    """Flower answers for the node when a message's time to live ends, by its own clock."""

    def reply(request: FlowerMessage, answer: FlowerMessage) -> FlowerMessage:
        _, asked = decode(request.content)
        if (asked.client, asked.round) != ("c1", 2):
            return answer
        gone = Error(4, "Error: Reply Message Unavailable - the reply has expired")
        return FlowerMessage(gone, reply_to=request)

    costs_c1_alone(reply, recipe_of(tiny), "the reply has expired")


@fault(42, "K")
def test_a_client_that_leaves_and_comes_back_as_another_node(tiny: Path) -> None:
    """It misses a round; then it is the same client under whatever id."""
    grid, recipe, gone = grid_of(), recipe_of(tiny), list[Context]()

    def move(number: int) -> None:
        if number == 2:
            gone.append(grid.contexts.pop(11))
        if number == 3:
            grid.contexts[4711] = Context(1, 4711, dict(gone[0].node_config), RecordDict(), {})

    adapter, reports = play(grid, recipe, before=move)
    assert [r.replied for r in reports.values()] == [4, 3, 4]
    assert reports[2].excluded == {"c1": "its node is not connected"}
    assert same(adapter, play(grid_of(), recipe, {2: ("c0", "c2", "c3")})[0])
    assert all(bool(torch.isfinite(value).all()) for value in adapter.values())
