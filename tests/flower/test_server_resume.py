"""A deployment's server that stops and starts again, rounds without a quorum, and its record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage
from safetensors.torch import load_file

from fedpeft.config import Engine, Evaluation, Output, Privacy, Recipe, Rounds
from fedpeft.config_load import dump_recipe
from fedpeft.engine import AbortedRoundError
from fedpeft.errors import FedpeftError
from fedpeft.events import Watcher
from fedpeft.flower.client_app import app
from fedpeft.flower.records import decode
from fedpeft.flower.server_app import main
from fedpeft.privacy.ledger import Budget, Ledger
from fedpeft.run import resume, run
from tests.flower.nodes import InProcess, Reply
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.usefixtures("flower_task")

NODES: dict[int, dict[str, Any]] = {k: {"client": f"c{k}"} for k in range(4)}


def at(tiny: Path, folder: Path, **rounds: Any) -> Recipe:
    output = Output(folder=str(folder / "run"))
    rules = Rounds(**{"count": 3, **rounds})
    return dataclasses.replace(tiny_recipe(tiny), output=output, rounds=rules)


def serve(recipe: Recipe, grid: InProcess, folder: Path, **config: object) -> Path:
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    asked: Any = {
        "recipe": str(folder / "recipe.yaml"),
        "join-timeout": 0.05,
        "reply-timeout": 5.0,
        "enough": 1.0,
        **config,
    }
    main(grid, Context(1, 0, {}, RecordDict(), asked))
    return Path(recipe.output.folder)


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["kind"] == kind]


def without_time(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("seconds", "time")}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


class Crash(BaseException):
    """The end of the server's process, as far as this one goes."""


def crashing(round: int, count: int) -> Reply:
    """The server dies while replies of a round come in."""
    seen = []

    def reply(asked: FlowerMessage, found: FlowerMessage) -> FlowerMessage:
        if decode(asked.content)[1].round == round:
            seen.append(asked)
            if len(seen) > count:
                raise Crash
        return found

    return reply


def test_the_record_is_that_of_a_run_in_one_process(tiny: Path, tmp_path: Path) -> None:
    recipe = at(tiny, tmp_path)
    folder = serve(recipe, InProcess(NODES), tmp_path)
    alone = dataclasses.replace(
        recipe,
        output=Output(folder=str(tmp_path / "alone")),
        engine=Engine(kind="cohort", device="cpu"),
        baselines=(),
    )
    run(alone, Watcher())
    for kind in ("round", "bytes", "evaluation"):
        found, wanted = (lines(f, kind) for f in (folder, tmp_path / "alone"))
        assert len(found) == len(wanted) > 0
        for one, other in zip(found, wanted, strict=True):
            assert {**without_time(one), "loss": 0, "score": 0} == {
                **without_time(other),
                "loss": 0,
                "score": 0,
            }
    found, wanted = adapter(folder), adapter(tmp_path / "alone")
    assert max(float((found[n] - wanted[n]).abs().max()) for n in wanted) <= 1e-6


@pytest.mark.parametrize("count", [0, 2])
def test_a_server_that_dies_in_a_round_loses_that_round_and_nothing_else(
    tiny: Path, tmp_path: Path, count: int
) -> None:
    for name in ("broken", "whole"):
        (tmp_path / name).mkdir()
    recipe = at(tiny, tmp_path / "broken")
    with pytest.raises(Crash):
        serve(recipe, InProcess(NODES, crashing(2, count)), tmp_path / "broken")
    folder = serve(recipe, InProcess(NODES), tmp_path / "broken", resume=True)
    whole = serve(at(tiny, tmp_path / "whole"), InProcess(NODES), tmp_path / "whole")
    found, wanted = adapter(folder), adapter(whole)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [without_time(x) for x in lines(folder, "round")] == [
        without_time(x) for x in lines(whole, "round")
    ]
    assert [x["text"] for x in lines(folder, "note")] == ["resumed after round 1"]


def test_sites_that_come_back_suffice(tiny: Path, tmp_path: Path) -> None:
    recipe = at(tiny, tmp_path)
    with pytest.raises(Crash):
        serve(recipe, InProcess(NODES, crashing(2, 0)), tmp_path)
    few = {k: NODES[k] for k in (0, 2, 3)}
    folder = serve(recipe, InProcess(few), tmp_path, resume=True)
    assert [line["replies"] for line in lines(folder, "round")] == [4, 3, 3]


def test_another_recipe_is_no_resume_and_is_told_apart_key_by_key(
    tiny: Path, tmp_path: Path
) -> None:
    recipe = at(tiny, tmp_path)
    with pytest.raises(Crash):
        serve(recipe, InProcess(NODES, crashing(2, 0)), tmp_path)
    other = dataclasses.replace(recipe, seed=7, local=dataclasses.replace(recipe.local, lr=0.5))
    grid = InProcess(NODES)
    with pytest.raises(FedpeftError, match=r"another recipe: local.lr=0.5, was .*; seed=7, was 0"):
        serve(other, grid, tmp_path, resume=True)
    assert grid.seen == []


def test_a_deployed_run_is_not_resumed_without_its_sites(tiny: Path, tmp_path: Path) -> None:
    folder = serve(at(tiny, tmp_path), InProcess(NODES), tmp_path)
    with pytest.raises(FedpeftError, match="a run of a deployment, whose clients are its sites"):
        resume(str(folder), Watcher())


def test_a_second_run_moves_the_first_aside(tiny: Path, tmp_path: Path) -> None:
    for _ in range(3):
        serve(at(tiny, tmp_path, count=1), InProcess(NODES), tmp_path)
    names = {path.name for path in tmp_path.glob("run*")}
    assert names == {"run", "run-001", "run-002"}
    assert len({(tmp_path / n / "run.json").read_text() for n in names}) == 3


def failing(rounds: set[int]) -> Reply:
    """In these rounds nobody but c0 answers properly."""

    def reply(asked: FlowerMessage, found: FlowerMessage) -> FlowerMessage:
        _, header = decode(asked.content)
        if header.round in rounds and header.client != "c0":
            del found.content["scalars"]
        return found

    return reply


def test_rounds_without_a_quorum_leave_the_model_and_count(tiny: Path, tmp_path: Path) -> None:
    recipe = at(tiny, tmp_path, count=5, aborts=2)
    folder = serve(recipe, InProcess(NODES, failing({2, 3})), tmp_path)
    found = lines(folder, "round")
    assert [bool(line.get("aborted")) for line in found] == [False, True, True, False, False]
    assert "1 valid replies of 4 clients" in found[1]["aborted"]
    scores = [line["score"] for line in lines(folder, "evaluation") if line["scope"] == "test"]
    assert scores[0] == scores[1] == scores[2] != scores[3]
    assert sum(found[1]["bytes_up"].values()) > 0


def test_more_of_them_in_a_row_stop_the_run_with_a_checkpoint(tiny: Path, tmp_path: Path) -> None:
    recipe = at(tiny, tmp_path, count=5, aborts=1)
    with pytest.raises(AbortedRoundError, match="round 3: 1 valid replies of 4 clients"):
        serve(recipe, InProcess(NODES, failing({2, 3})), tmp_path)
    folder = serve(recipe, InProcess(NODES), tmp_path, resume=True)
    assert [line["replies"] for line in lines(folder, "round")] == [4, 1, 4, 4, 4]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"reply-timeout": "soon"}, "run config reply-timeout='soon' must be a number of seconds"),
        ({"join-timeout": -1.0}, "run config join-timeout=-1.0 must be a number of seconds above"),
        ({"enough": 1.5}, "run config enough=1.5 must be above 0 and at most 1"),
    ],
)
def test_patience_is_checked(
    tiny: Path, tmp_path: Path, config: dict[str, object], text: str
) -> None:
    with pytest.raises(FedpeftError, match=text):
        serve(at(tiny, tmp_path), InProcess(NODES), tmp_path, **config)


def test_protected_clients_are_not_asked_for_their_scores(tiny: Path, tmp_path: Path) -> None:
    recipe = at(tiny, tmp_path, weighting="equal")
    privacy = dataclasses.replace(
        recipe.privacy, unit="client", noise_multiplier=1.0, clip_norm=1.0, delta=1e-3
    )
    assert recipe.evaluation == Evaluation()
    grid = InProcess(NODES, app=app)
    serve(dataclasses.replace(recipe, privacy=privacy), grid, tmp_path)
    assert {kind for kind, _ in grid.answers} == {"query", "train"}


def test_epsilon_is_that_of_the_same_run_in_one_process(tiny: Path, tmp_path: Path) -> None:
    privacy = Privacy(unit="record", noise_multiplier=1.0, clip_norm=0.5, delta=1e-3)
    recipe = dataclasses.replace(at(tiny, tmp_path), privacy=privacy)
    nodes = {
        k: {**own, "privacy-ledger": str(tmp_path / f"site-{k}.jsonl")} for k, own in NODES.items()
    }
    serve(recipe, InProcess(nodes), tmp_path)
    alone = dataclasses.replace(
        recipe,
        output=Output(folder=str(tmp_path / "alone")),
        engine=Engine(kind="cohort", device="cpu"),
        baselines=(),
    )
    run(alone, Watcher())
    deployed = json.loads((tmp_path / "privacy.json").read_text())
    assert (
        deployed["epsilon"] == json.loads((tmp_path / "alone/privacy.json").read_text())["epsilon"]
    )
    sizes = {f"c{k}": Ledger.open(tmp_path / f"site-{k}.jsonl", Budget(1e6, 1e-3)) for k in NODES}
    with Ledger.open(tmp_path / "privacy.jsonl", Budget(1e6, 1e-3)) as server:
        for client, own in sizes.items():
            with own:
                assert own.epsilon(client) == server.epsilon(client) > 0
