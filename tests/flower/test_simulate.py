"""Real simulations on Ray: the same adapter as in process, and nothing left behind."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

from fedpeft.config import Output
from fedpeft.engine import Seam, play_round
from fedpeft.errors import FedpeftError
from fedpeft.events import Watcher
from fedpeft.federation import Federation
from fedpeft.flower import simulate
from fedpeft.flower.courier import Courier
from fedpeft.flower.digests import digests_of
from fedpeft.flower.federation import FlowerFederation
from fedpeft.flower.secure import secured_in_simulation
from fedpeft.flower.simulate import Shares, divide, run_in_simulation
from fedpeft.prepare import prepare
from fedpeft.run import run
from fedpeft.tree import Tree
from tests.flower.securely import in_process, one_by_one, recipe_of
from tests.tiny import IA3, LORA, tiny_recipe, write_tiny

# Ray neither closes its handles on /dev/null nor asks its ended processes for their exit status.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


BEFORE: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def others() -> None:
    """Threads that other tests left (torch.compile keeps some) are not what is looked for."""
    BEFORE.clear()
    BEFORE.update(threading.enumerate())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The tiny model and data; the actors' cache of them too."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tiny(tmp_path)
    yield tmp_path
    gc.collect()  # while the warnings that it gives rise to are off


def left_behind() -> list[str]:
    """Processes that still run, and threads that would keep this one alive."""
    children = [
        " ".join(child.cmdline())
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE
    ]
    own = set(threading.enumerate()) - BEFORE
    alive = [t.name for t in own if not t.daemon]
    return children + [name for name in alive if name != threading.main_thread().name]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, IA3], ids=["lora", "ia3"])
def test_a_simulation_gives_the_adapter_of_the_batched_cohort(
    folder: Path, adapter: dict[str, Any]
) -> None:
    recipe = tiny_recipe(folder, adapter)
    engine = dataclasses.replace(recipe.engine, kind="cohort", chunk=3)
    prepared = prepare(dataclasses.replace(recipe, engine=engine))
    strategy, network = prepared.strategy, prepared.network
    before = dict(os.environ)

    def body(federation: Federation) -> Tree:
        assert threading.current_thread() is threading.main_thread()
        assert dict(federation.clients()) == {"c0": 5, "c1": 9, "c2": 4, "c3": 12}
        state = strategy.init(prepared.problem)
        for number in (1, 2):
            state, report = play_round(
                strategy, state, federation, recipe.rounds, recipe.seed, number
            )
            assert (report.replied, report.excluded) == (4, {})
        return strategy.adapter(state)

    digests = digests_of(prepared)
    found = run_in_simulation(recipe, 4, 2, body, digests)
    wanted = body(prepared.federation())
    assert prepared.lane.name == "fold"
    for name, value in wanted.items():
        scale = float(value.abs().max())
        assert float((found[name] - value).abs().max()) <= 1e-5 * max(1.0, scale)
    assert max(float((found[n] - network.initial[n]).abs().max()) for n in found) > 1e-3
    assert left_behind() == []
    assert not ray.is_initialized()
    assert dict(os.environ) == before


@pytest.mark.slow
def test_a_simulation_under_secure_aggregation_gives_the_adapter_of_one_process(
    folder: Path,
) -> None:
    recipe = recipe_of(folder, name="fedask")
    prepared = prepare(one_by_one(recipe))

    def body(federation: Federation) -> Tree:
        state = prepared.strategy.init(prepared.problem)
        for number in (1, 2):
            seam = Seam(prepared.post)
            state, report = play_round(
                prepared.strategy, state, federation, recipe.rounds, recipe.seed, number, seam
            )
            assert (report.replied, report.excluded) == (4, {})
            assert report.up.keys() <= {"masked", "secagg"}
        return prepared.strategy.adapter(state)

    def securely(federation: FlowerFederation) -> Tree:
        return body(secured_in_simulation(prepared, federation))

    found = run_in_simulation(recipe, 4, 2, securely)
    wanted = body(in_process(recipe))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    initial = prepared.network.initial
    assert max(float((found[n] - initial[n]).abs().max()) for n in found) > 1e-3
    assert left_behind() == []


@pytest.mark.slow
def test_fedpeft_run_on_flower_secures_its_federation(folder: Path) -> None:
    recipe = dataclasses.replace(
        recipe_of(folder), output=Output(folder=str(folder / "run")), baselines=()
    )
    run(recipe, Watcher())
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rounds = [own for own in map(json.loads, lines) if own["kind"] == "round"]
    assert [own["bytes_up"].keys() for own in rounds] == [{"masked", "secagg"}] * 2
    assert [own["replies"] for own in rounds] == [4, 4]


@pytest.mark.slow
def test_ctrl_c_in_training_ends_everything(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(folder)
    recipe = dataclasses.replace(recipe, local=dataclasses.replace(recipe.local, steps=10**7))
    prepared = prepare(recipe)
    monkeypatch.setattr(simulate, "GRACE", 0.01)

    def interrupt(self: Courier, began: float) -> None:
        raise KeyboardInterrupt

    def body(federation: Federation) -> None:
        names = tuple(federation.clients())
        state = prepared.strategy.init(prepared.problem)
        monkeypatch.setattr(Courier, "pause", interrupt)
        list(federation.run(1, prepared.strategy.send(state, 1, names)))

    capfd.readouterr()
    with pytest.raises(KeyboardInterrupt):
        run_in_simulation(recipe, 4, 2, body)
    assert left_behind() == []
    assert not ray.is_initialized()
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


@pytest.mark.slow
def test_a_simulation_that_cannot_run_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "divide", lambda *args: Shares(actors=2, cpus=1, gpus=99.0))

    def body(federation: Federation) -> None:
        federation.clients()

    with pytest.raises(FedpeftError, match="simulation ended before the run did"):
        run_in_simulation(tiny_recipe(folder), 4, 2, body)
    assert left_behind() == []


@pytest.mark.parametrize(
    ("cores", "workers", "nodes", "wanted"),
    [
        (8, 0, 100, Shares(8, 1, 0.0)),
        (8, 2, 100, Shares(2, 4, 0.0)),
        (8, 0, 3, Shares(3, 2, 0.0)),
        (2, 5, 100, Shares(5, 1, 0.0)),
    ],
)
def test_the_machine_is_divided_among_the_actors(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int, nodes: int, wanted: Shares
) -> None:
    monkeypatch.setattr(simulate, "_cores", lambda: cores)
    recipe = tiny_recipe(Path("nowhere"))
    assert divide(recipe, nodes, workers) == wanted


def test_actors_share_the_gpus_unless_the_recipe_wants_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simulate, "_cores", lambda: 16)
    monkeypatch.setattr(simulate.torch.cuda, "device_count", lambda: 2)
    recipe = tiny_recipe(Path("nowhere"))
    assert divide(recipe, 100, 6) == Shares(6, 2, 0.0)
    engine = dataclasses.replace(recipe.engine, device="auto")
    assert divide(dataclasses.replace(recipe, engine=engine), 100, 6) == Shares(6, 2, 0.3333)


def test_a_ray_that_runs_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(FedpeftError, match=r"call ray\.shutdown\(\) first"):
        run_in_simulation(tiny_recipe(Path("nowhere")), 4, 2, lambda federation: None)
