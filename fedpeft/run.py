"""A run from recipe to table, on the recipe's engine, or on with one that was stopped."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from fedpeft import job
from fedpeft.config import Recipe
from fedpeft.errors import FedpeftError
from fedpeft.events import Outcome, Summary, Watcher
from fedpeft.prepare import Prepared
from fedpeft.record.folder import RunFolder
from fedpeft.workers.federation import WorkersFederation


def run(recipe: Recipe, watcher: Watcher) -> Summary:
    """A new run; see ``fedpeft.job.begin``."""
    return job.begin(recipe, watcher, partial(_host, watcher))


def resume(path: str, watcher: Watcher) -> Summary:
    """Goes on with a run from its newest whole checkpoint, as if it had never stopped."""
    folder = RunFolder.open(Path(path))
    if folder.deployed:
        raise FedpeftError(
            f"{path} is a run of a deployment, whose clients are its sites: on the server, submit "
            f"it again with run config resume=true; `fedpeft deploy up DIR --local --resume` on "
            f"this machine alone."
        )
    return job.go_on(folder.path, watcher, partial(_host, watcher))


def _host(watcher: Watcher, prepared: Prepared, identity: str, body: job.Body) -> Outcome:
    """What ``body`` makes of the run's clients, on the recipe's engine."""
    if prepared.recipe.engine.kind == "flower":
        return _on_flower(prepared, body)
    if prepared.workers > 1:
        return _on_workers(watcher, prepared, body)
    return body(prepared.secured(prepared.federation(watcher.chunk_done)))


def _on_workers(watcher: Watcher, prepared: Prepared, body: job.Body) -> Outcome:
    """In several processes; Ray is loaded only then."""
    from fedpeft.workers.ray_pool import opened

    with opened(prepared) as pool:
        workers = WorkersFederation(prepared, pool, watcher.chunk_done)
        return body(prepared.secured(workers))


def _on_flower(prepared: Prepared, body: job.Body) -> Outcome:
    """On Flower's simulation; Flower and Ray are loaded only then."""
    from fedpeft.flower.digests import digests_of
    from fedpeft.flower.federation import FlowerFederation
    from fedpeft.flower.secure import secured_in_simulation
    from fedpeft.flower.simulate import run_in_simulation

    recipe = prepared.recipe
    nodes = len(prepared.population.clients)
    own = digests_of(prepared)

    def rounds(federation: FlowerFederation) -> Outcome:
        return body(secured_in_simulation(prepared, federation))

    return run_in_simulation(recipe, nodes, recipe.engine.workers, rounds, own)
