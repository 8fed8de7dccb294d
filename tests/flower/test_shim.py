"""A message's process hands it to the resident one, which answers as the client app would."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import RecordDict

from fedpeft.config import Privacy
from fedpeft.config_load import dump_recipe
from fedpeft.engine import play_round
from fedpeft.errors import FedpeftError
from fedpeft.flower import shim
from fedpeft.flower.client_app import answer, client_app
from fedpeft.flower.federation import FlowerFederation, Patience
from fedpeft.flower.node import Node
from fedpeft.flower.records import Header, decode, encode
from fedpeft.flower.resident import answered, introduction
from fedpeft.prepare import prepare
from fedpeft.site.frames import Frame
from fedpeft.strategy import Message
from tests.flower.nodes import InProcess
from tests.site.fakes import Dies, Site
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.usefixtures("flower_task")

NAMES = ("c0", "c1", "c2", "c3")
RUN = "0123456789abcdef"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", ["fedpeft.flower.shim", "fedpeft.site.process"])
def test_what_starts_often_is_light(module: str) -> None:
    """Of each message's process, and of the resident one beside its worker."""
    heavy = ("torch", "transformers", "peft", "datasets", "ray", "omegaconf", "safetensors")
    code = (
        f"import sys, {module}\n"
        f"print([name for name in {heavy!r} if name in sys.modules], {module}.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["[]", module]


def config(path: Path, client: str, **more: Any) -> dict[str, Any]:
    return {"client": client, "socket": str(path), "socket-wait": 0, **more}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """One resident process that plays all clients' sites, to the config that each node has."""
    state = RecordDict()

    def answer_frame(frame: Frame) -> Frame:
        return answered(frame, frame.head["config"], state)

    found = Site(tmp_path / "own" / "s", answer=answer_frame)
    with found.served():
        yield found


def played(recipe: Any, nodes: dict[int, Any], app: Any, rounds: int = 2, run: str = "") -> Any:
    prepared = prepare(recipe)
    grid = InProcess(nodes, app=app)
    federation = FlowerFederation(grid, recipe, 4, patience=Patience(0.05, 30.0), run=run)
    state = prepared.strategy.init(prepared.problem)
    for number in range(1, rounds + 1):
        state, report = play_round(
            prepared.strategy, state, federation, recipe.rounds, recipe.seed, number
        )
        assert not report.excluded
    return prepared.strategy.adapter(state)


def test_over_the_socket_a_run_ends_with_the_same_bits(tiny: Path, site: Site) -> None:
    recipe = tiny_recipe(tiny)
    over = {k: config(site.path, name) for k, name in enumerate(NAMES)}
    found = played(recipe, over, shim.app)
    assert len(site.workers) == 1 and sum("train of round" in line for line in site.said) == 8
    wanted = played(
        recipe, {k: {"client": name} for k, name in enumerate(NAMES)}, client_app(False)
    )
    assert found.keys() == wanted.keys()
    assert all(bool((found[name] == value).all()) for name, value in wanted.items())


def test_without_a_socket_the_process_answers_by_itself(tiny: Path) -> None:
    recipe = tiny_recipe(tiny)
    nodes = {k: {"client": name} for k, name in enumerate(NAMES)}
    found, wanted = (played(recipe, nodes, app, 1) for app in (shim.app, client_app(False)))
    assert all(bool((found[name] == value).all()) for name, value in wanted.items())


def refused(recipe: Any, nodes: dict[int, Any], app: Any = shim.app) -> str:
    with pytest.raises(FedpeftError) as caught:
        FlowerFederation(
            InProcess(nodes, app=app), recipe, 1, patience=Patience(0.05, 5.0)
        ).clients()
    return str(caught.value)


def test_nobody_at_the_socket_is_an_error_reply(tiny: Path, tmp_path: Path) -> None:
    text = refused(tiny_recipe(tiny), {1: config(tmp_path / "s", "c0")})
    assert "nobody answers at node config socket=" in text and "start `fedpeft site`" in text


def test_a_worker_that_dies_is_an_error_reply(tiny: Path, tmp_path: Path) -> None:
    def dies(frame: Frame) -> Frame:
        raise Dies

    found = Site(tmp_path / "own" / "s", answer=dies)
    with found.served():
        text = refused(tiny_recipe(tiny), {1: config(found.path, "c0")})
    assert "FedpeftError: the site's worker ended with -9 over this request, which is lost" in text


def test_of_an_error_only_a_public_reason_leaves(
    tiny: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaks(*_: Any) -> None:
        raise OSError("token=secret in row 17")

    monkeypatch.setattr("fedpeft.flower.resident.answer", leaks)
    text = refused(tiny_recipe(tiny), {1: config(site.path, "c0")})
    assert "OSError (the traceback is in the node's log)" in text and "secret" not in text


def test_the_shims_own_errors_are_no_different(
    tiny: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaks(*_: Any) -> None:
        raise OSError("token=secret in row 17")

    monkeypatch.setattr(shim, "handed", leaks)
    text = refused(tiny_recipe(tiny), {1: config(site.path, "c0")})
    assert "OSError (the traceback is in the node's log)" in text and "secret" not in text


def test_a_node_with_another_config_than_its_process_is_refused(tiny: Path) -> None:
    frame = Frame({"kind": "query", "config": {"client": "c1", "socket": "s"}, "records": []})
    found = answered(frame, {"client": "c0", "socket": "s", "policy": "p"}, RecordDict())
    assert found.head["error"] == (
        "FedpeftError: node config client, policy: the node and its site process have different "
        "ones. Start both with what site.json says."
    )


def node(path: Path, **settings: Any) -> Node:
    (path / "policy.yaml").write_text("".join(f"{k}: {v}\n" for k, v in settings.items()))
    return Node({"client": "c0", "policy": str(path / "policy.yaml")}, RecordDict(), False)


def asked(recipe: Any, at: Node) -> Message:
    content = encode(Message(), Header(recipe=dump_recipe(recipe)))
    return decode(answer("query", content, at))[0]


def test_a_policy_is_asked_before_anything_is_loaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(recipe: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("fedpeft.flower.client_app._prepared", loads)
    for settings in ({"sources": "[pydocs]"}, {"strategies": "[fedprox]"}, {"max_rank": 1}):
        with pytest.raises(FedpeftError, match="this site's policy refuses the recipe: "):
            asked(tiny_recipe(tiny), node(tmp_path, **settings))


def test_a_policy_counts_from_the_next_request_on(tiny: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny)
    assert asked(recipe, node(tmp_path, max_rank=2)).scalars == {"examples": 5.0, "kept": 0.0}
    with pytest.raises(FedpeftError, match="max_rank allows 1, and adapter.r is 2"):
        asked(recipe, node(tmp_path, max_rank=1))
    with pytest.raises(FedpeftError, match="base_models allows abc, and the base model's digest"):
        asked(recipe, node(tmp_path, base_models="[abc]"))
    with pytest.raises(FedpeftError, match="min_cohort allows at least 3, and .* is 2"):
        asked(recipe, node(tmp_path, min_cohort=3))


def test_a_policy_bounds_noise_that_the_recipe_gives(tiny: Path, tmp_path: Path) -> None:
    """The epsilon is found from sizes and rounds, before anything is trained."""

    privacy = Privacy(unit="record", noise_multiplier=1.0, delta=1e-3, accountant="rdp")
    recipe = dataclasses.replace(tiny_recipe(tiny), privacy=privacy)
    assert asked(recipe, node(tmp_path, max_epsilon=100)).scalars == {"examples": 5.0, "kept": 0.0}
    with pytest.raises(FedpeftError, match="max_epsilon allows 0.5, and the run's epsilon is"):
        asked(recipe, node(tmp_path, max_epsilon=0.5))


def test_an_operator_sees_what_a_server_would(tiny: Path, tmp_path: Path) -> None:
    own = node(tmp_path, max_rank=2).config
    found = introduction(own, tiny_recipe(tiny))  # type: ignore[arg-type]
    assert (found.client, found.examples) == ("c0", 5) and len(found.base) == 16
    with pytest.raises(FedpeftError, match="policy refuses"):
        introduction(node(tmp_path, max_rank=1).config, tiny_recipe(tiny))  # type: ignore[arg-type]
