"""Real actors: the same run as in one process, workers that die, and nothing left behind."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file

from fedpeft import cluster
from fedpeft.config import Engine, Output, Recipe, Rounds
from fedpeft.config_load import load_recipe
from fedpeft.engine import RoundReport, play_round
from fedpeft.errors import FedpeftError
from fedpeft.events import Watcher
from fedpeft.metrics import Score
from fedpeft.prepare import prepare
from fedpeft.run import resume, run
from fedpeft.workers.federation import WorkersFederation
from fedpeft.workers.ray_pool import Needs, RayPool, opened
from fedpeft.workers.worker import Digests
from tests.tiny import tiny_recipe, write_tiny

# Ray neither closes its handles on /dev/null nor asks its ended processes for their exit status.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The tiny model and data; the workers' cache of them too."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write_tiny(tmp_path)
    yield tmp_path
    gc.collect()  # while the warnings that it gives rise to are off


def recipe(files: Path, workers: int, out: str = "run", **strategy: Any) -> Recipe:
    return dataclasses.replace(
        tiny_recipe(files, **strategy),
        rounds=Rounds(count=3),
        engine=Engine(chunk=2, threads=2, device="cpu", workers=workers),
        output=Output(folder=str(files / out)),
        baselines=(),
    )


BEFORE: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def others() -> None:
    """Threads that other tests left (torch.compile keeps some) are not what is looked for."""
    BEFORE.clear()
    BEFORE.update(threading.enumerate())


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


class See(Watcher):
    """Keeps the reports; interrupts round ``stop`` after its first shard."""

    def __init__(self, stop: int = 0) -> None:
        self.stop, self.now = stop, 0
        self.reports: list[RoundReport] = []

    def round_began(self, number: int, clients: int, tokens: int) -> None:
        self.now = number

    def chunk_done(self, clients: int, tokens: int) -> None:
        if self.now == self.stop:
            raise KeyboardInterrupt

    def round_done(self, report: RoundReport, score: Score | None) -> None:
        self.reports.append(dataclasses.replace(report, seconds=0.0))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_run_on_two_workers_is_the_run_in_one_process_and_resumes_bit_by_bit(
    files: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = See(), See()
    run(recipe(files, 1, "one"), one)
    assert not ray.is_initialized()
    before = dict(os.environ)
    capfd.readouterr()
    run(recipe(files, 2, "two"), two)
    assert dict(os.environ) == before and left_behind() == [] and not ray.is_initialized()
    shown = capfd.readouterr()
    assert "ray" not in (shown.out + shown.err).lower()
    assert load_recipe(str(files / "two" / "recipe.yaml")).engine.workers == 2
    alone, apart = adapter(files / "one"), adapter(files / "two")
    for name, value in alone.items():
        assert float((apart[name] - value).norm()) <= 1e-6 * float(value.norm())
    for left, right in zip(one.reports, two.reports, strict=True):
        assert right.loss == pytest.approx(left.loss, rel=1e-6)
        assert dataclasses.replace(right, loss=left.loss) == left

    with pytest.raises(KeyboardInterrupt):
        run(recipe(files, 2, "stopped"), See(stop=2))
    assert left_behind() == [] and not ray.is_initialized()
    resume(str(files / "stopped"), See())
    again = adapter(files / "stopped")
    assert again.keys() == apart.keys()
    assert all(torch.equal(again[name], value) for name, value in apart.items())


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_one_that_keeps_dying_costs_its_clients(
    files: Path,
) -> None:
    deaths = files / "deaths"
    settings = {"name": "tests.workers.killer", "deaths": str(deaths)}
    prepared = prepare(recipe(files, 2, **settings))
    state = prepared.strategy.init(prepared.problem)
    found: list[tuple[Any, RoundReport]] = []
    with opened(prepared) as pool:
        federation = WorkersFederation(prepared, pool)
        for count in ("0", "1", "3", "0"):
            deaths.write_text(count)
            rounds = prepared.recipe.rounds
            found.append(play_round(prepared.strategy, state, federation, rounds, 0, 1))
            assert deaths.read_text() == "0"
    assert left_behind() == []
    (whole, report), (redone, second), (_, short), (after, fourth) = found
    assert report.replied == second.replied == fourth.replied == 4
    for other in (redone, after):
        assert all(torch.equal(other.adapter[n], v) for n, v in whole.adapter.items())
    assert second.excluded == {} and "c1" in short.excluded
    assert short.replied == 4 - len(short.excluded)
    for reason in short.excluded.values():
        assert reason.startswith("its worker died 3 times in a row: The actor is dead")
        assert "lower engine.chunk" in reason


@pytest.mark.slow
def test_other_data_and_too_small_a_cluster_are_refused_and_a_running_ray_is_left_running(
    files: Path,
) -> None:
    prepared = prepare(recipe(files, 2))
    with (files / "data.jsonl").open("a") as out:
        out.write('{"text": "w2 w3", "label": 0, "client": "c0"}\n')
    too_small = r"^engine\.workers=3: .* too little: 3 CPUs needed, 2 there\. Lower engine\.workers"
    more = dataclasses.replace(prepared, recipe=recipe(files, 3))
    with cluster.connected(cpus=2, gpus=0, threads=1):
        other = r"^engine\.workers: .* another data than the run"
        with pytest.raises(FedpeftError, match=other), opened(prepared):
            pass
        with pytest.raises(FedpeftError, match=too_small), opened(more):
            pass
        assert ray.is_initialized()
    assert left_behind() == [] and not ray.is_initialized()


def test_ray_is_not_loaded_for_one_worker() -> None:
    code = "import fedpeft.run, fedpeft.workers.federation, sys; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def pool_of(monkeypatch: pytest.MonkeyPatch, workers: int, cluster: dict[str, float]) -> RayPool:
    """A pool whose actors are numbers, on a cluster with so much."""
    fresh = itertools.count(10)
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: cluster)
    monkeypatch.setattr(RayPool, "_begin", lambda self: next(fresh))
    pool = RayPool(Recipe(), Digests("", "", ""), Needs(workers, 1, 1))
    pool._actors = list(range(workers))
    return pool


def test_a_worker_whose_node_is_gone_leaves_its_shards_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = pool_of(monkeypatch, 3, {"CPU": 8.0, "GPU": 3.0})
    pool.replace(1)
    assert pool._actors == [0, 10, 2]
    pool = pool_of(monkeypatch, 3, {"CPU": 8.0, "GPU": 2.0})
    pool.replace(2)
    assert pool._actors == [0, 1, 0]
    pool.replace(0)  # the one that did the work of two: there is room for one beside worker 1
    assert pool._actors == [10, 1, 0]


def test_a_worker_has_a_gpu_and_a_core_or_its_share_of_the_threads(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(recipe(files, 3))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    needs = Needs.of(prepared)
    assert needs == Needs(3, cpus=2, gpus=0)
    wanted = Engine(chunk=2, threads=2, device="cpu", workers=1)
    assert needs.recipe(prepared).engine == wanted
    network = dataclasses.replace(prepared.network, device=torch.device("cuda"))
    needs = Needs.of(dataclasses.replace(prepared, network=network))
    assert needs == Needs(3, cpus=1, gpus=1)
    assert needs.recipe(prepared).engine.device == "cuda:0"
