"""A server that resumes redoes rounds, and sites that went on find their way back, bit by bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fedpeft.codecs.settings import Codec
from fedpeft.config import Comms, Recipe, Rounds
from fedpeft.config_load import dump_recipe
from fedpeft.engine import Seam, play_round
from fedpeft.errors import QuorumError
from fedpeft.federation import Failure
from fedpeft.flower import client_app
from fedpeft.flower.federation import FlowerFederation, Patience
from fedpeft.flower.node import Node
from fedpeft.flower.records import Header, decode, encode
from fedpeft.prepare import prepare
from fedpeft.strategy import Message, addressed
from tests.flower.nodes import InProcess
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.usefixtures("flower_task")

NAMES = ("c0", "c1", "c2", "c3")
RUN = "0123456789abcdef"
CODECS = Comms(up=Codec(codec="topk", density=0.2), down=Codec("dense", "int8"))


def recipe_of(folder: Path, comms: Comms, **strategy: Any) -> Recipe:
    recipe = tiny_recipe(folder, **strategy)
    return dataclasses.replace(recipe, rounds=Rounds(count=5, quorum=1.0), comms=comms)


class Federated:
    """A server on sites with state on disk; ``restarted`` sites have nothing but their files."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.prepared = prepare(recipe)
        nodes = {k: {"client": n, "state": str(folder / n)} for k, n in enumerate(NAMES)}
        self.grid = InProcess(nodes)
        self.federation = FlowerFederation(
            self.grid, recipe, 4, None, Patience(0.05, 30.0), run=RUN
        )
        self.state = self.prepared.strategy.init(self.prepared.problem)

    def restart_sites(self) -> None:
        client_app._prepared.cache_clear()
        for number, old in self.grid.contexts.items():
            self.grid.contexts[number] = Context(1, number, dict(old.node_config), RecordDict(), {})

    def play(self, *rounds: int) -> None:
        own = self.prepared
        for number in rounds:
            self.restart_sites()
            self.state, _ = play_round(
                own.strategy,
                self.state,
                self.federation,
                own.recipe.rounds,
                own.recipe.seed,
                number,
                Seam(own.post, None),
            )

    def scores(self) -> Any:
        sent = addressed(self.prepared.strategy, self.state, 5, NAMES)
        found = list(self.federation.evaluate(5, *sent))
        assert not [one for one in found if isinstance(one, Failure)]
        return found


@pytest.mark.parametrize(
    ("comms", "strategy"),
    [
        (Comms(), {"name": "scaffold"}),
        (Comms(), {"name": "fedex_lora"}),
        (Comms(), {"name": "fedask"}),
        (CODECS, {"name": "fedavg"}),
    ],
    ids=["scaffold", "fedex_lora", "fedask", "codecs"],
)
def test_redone_rounds_give_the_same_bits(
    tiny: Path, tmp_path: Path, comms: Comms, strategy: dict[str, Any]
) -> None:
    """Private memory, a changed base, two exchanges a round, residuals and references."""
    recipe = recipe_of(tiny, comms, **strategy)
    first = Federated(recipe, tmp_path)
    first.play(1, 2, 3)
    checkpoint, post = first.state, first.prepared.post.memory()
    first.play(4, 5)
    kept = {path.name: len(list(path.glob("*/*.safetensors"))) for path in tmp_path.iterdir()}
    assert all(kept[name] > 0 for name in NAMES)
    again = Federated(recipe, tmp_path)
    again.state = checkpoint
    again.prepared.post.restore(post)
    again.play(4, 5)
    found, wanted = (one.prepared.strategy.adapter(one.state) for one in (again, first))
    assert all(bool((found[name] == value).all()) for name, value in wanted.items())
    if comms.down.codec == "none":
        assert again.scores() == first.scores()


def test_a_site_says_whether_it_kept_anything_of_the_run(tiny: Path, tmp_path: Path) -> None:
    own = Federated(recipe_of(tiny, Comms(), name="scaffold"), tmp_path)
    text = dump_recipe(own.prepared.recipe)

    def kept(run: str) -> float:
        node = Node(own.grid.contexts[1].node_config, RecordDict(), False)
        content = encode(Message(), Header(recipe=text, run=run))
        return decode(client_app.answer("query", content, node))[0].scalars["kept"]

    assert kept(RUN) == 0.0
    own.play(1)
    assert (kept(RUN), kept("ab" * 16)) == (1.0, 0.0)


def test_a_client_that_keeps_nothing_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    Federated(recipe_of(tiny, Comms(), name="fedavg"), tmp_path).play(1, 2)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]


def test_a_site_whose_state_is_damaged_does_not_train(tiny: Path, tmp_path: Path) -> None:
    own = Federated(recipe_of(tiny, Comms(), name="scaffold"), tmp_path)
    own.play(1, 2)
    for path in (tmp_path / "c1").glob("*/manifest.json"):
        path.write_text("{}")
    with pytest.raises(QuorumError, match="client 'c1' kept of this run is damaged: manifest.json"):
        own.play(3)


def test_a_run_without_a_name_is_kept_by_flower(tiny: Path, tmp_path: Path) -> None:
    own = Federated(recipe_of(tiny, Comms(), name="scaffold"), tmp_path)
    own.federation._run = ""
    play_round(own.prepared.strategy, own.state, own.federation, own.prepared.recipe.rounds, 0, 1)
    assert list(tmp_path.iterdir()) == []
    assert all(any(k.startswith("memory.") for k in c.state) for c in own.grid.contexts.values())
