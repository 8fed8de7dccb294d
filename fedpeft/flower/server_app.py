"""The Flower server: a run of a recipe on the nodes of a deployment.

It is the run that ``fedpeft run`` plays, with the same folder (``metrics.jsonl``, checkpoints,
``adapter/``), but the clients are the nodes. Run config:

- ``recipe``: a built-in name or a path on the server.
- ``resume``: go on with the run in its folder, as after a crash of this app or of Flower's server.
  Without it, a run that is there is moved aside.
- ``join-timeout``, ``reply-timeout`` (seconds), ``enough``: see ``courier.Patience``.
- ``log``, ``metrics-port``: see ``observe.watching``.
- ``identities``: under secure aggregation, a JSON file on the server with every client's public
  key (see ``identity``).

With privacy the ledger, ``privacy.jsonl``, lies beside the run's folder, and later runs go on with
it; ``privacy.json`` says what has been promised.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpeft import job
from fedpeft.config import Recipe
from fedpeft.config_load import load_recipe
from fedpeft.errors import FedpeftError
from fedpeft.events import Outcome
from fedpeft.federation import Federation
from fedpeft.flower.courier import Patience
from fedpeft.flower.digests import digests_of
from fedpeft.flower.federation import FlowerFederation
from fedpeft.flower.identity import read_identities
from fedpeft.flower.node import protected
from fedpeft.flower.secure import SecureFlowerFederation
from fedpeft.observe.watchers import watching
from fedpeft.prepare import Prepared
from fedpeft.record.folder import RunFolder

LOGGER = "flwr.fedpeft"
"""What it logs, Flower shows."""

Config = Mapping[str, object]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Plays the rounds and writes the adapter. Raises FedpeftError, which ends Flower's run."""
    config = context.run_config
    recipe = served(load_recipe(str(config["recipe"])))
    folder = Path(recipe.output.folder)
    ledger = folder.with_name("privacy.jsonl")

    def host(prepared: Prepared, run: str, body: job.Body) -> Outcome:
        return body(federation_of(prepared, grid, config, run))

    with watching(config, LOGGER) as watcher:
        if config.get("resume"):
            job.go_on(folder, watcher, host, ledger, recipe)
        else:
            set_aside(folder)
            job.begin(recipe, watcher, host, ledger)


def served(recipe: Recipe) -> Recipe:
    """The recipe without what needs the clients' data here, or gives them away in clear.

    A client's score on its own hold-out is neither noised nor masked.
    """
    evaluation = dataclasses.replace(
        recipe.evaluation, clients=recipe.evaluation.clients and not protected(recipe)
    )
    return dataclasses.replace(recipe, baselines=(), evaluation=evaluation)


def federation_of(prepared: Prepared, grid: Grid, config: Config, run: str) -> Federation:
    """The recipe's clients on the nodes of a grid, under secure aggregation where it says so."""
    recipe = prepared.recipe
    federation = FlowerFederation(
        grid,
        recipe,
        nodes=len(prepared.population.clients),
        digests=digests_of(prepared),
        patience=patience_of(config),
        run=run,
    )
    if not recipe.secure_aggregation.enabled:
        return federation
    path = str(config.get("identities") or "")
    if not path:
        raise FedpeftError(
            "secure_aggregation.enabled needs run config identities=FILE on the server: all "
            "clients' public Ed25519 keys (JSON, name -> hex), by which forged answers are told."
        )
    return SecureFlowerFederation(prepared, federation, read_identities(Path(path)))


def patience_of(config: Config) -> Patience:
    """Raises FedpeftError for what is no time, or no share."""
    found = {}
    for key in ("join-timeout", "reply-timeout", "enough"):
        try:
            value = float(str(config[key]))
        except ValueError:
            value = 0.0
        if not value > 0 or (key == "enough" and value > 1):
            rule = "above 0 and at most 1" if key == "enough" else "a number of seconds above 0"
            raise FedpeftError(f"run config {key}={config[key]!r} must be {rule}.")
        found[key] = value
    return Patience(found["join-timeout"], found["reply-timeout"], found["enough"])


def set_aside(folder: Path) -> None:
    """Moves the run in ``folder``, if there is one, to FOLDER-001, or the next that is free."""
    if not (folder.is_dir() and RunFolder.holds(folder)):
        return
    names = (folder.with_name(f"{folder.name}-{n:03d}") for n in itertools.count(1))
    folder.rename(next(name for name in names if not name.exists()))
