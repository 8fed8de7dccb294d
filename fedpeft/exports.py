"""The clients' own models of a run: adapter merged, and cut down to what each client has left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedpeft.config_load import parse_recipe
from fedpeft.errors import FedpeftError, suggest
from fedpeft.prepare import prepare
from fedpeft.pruned import save, smaller
from fedpeft.pruning.anatomy import structure_of
from fedpeft.record.checkpoint import latest
from fedpeft.record.folder import RunFolder
from fedpeft.strategy import addressed
from fedpeft.tree import row

NOTE = "clients.json"
"""Folder -> whose model it holds, and the share of the prunable weights that is gone."""


def export_clients(run: Path, out: Path, clients: Sequence[str]) -> dict[str, dict[str, object]]:
    """Writes the models of ``clients`` (empty: all) after the run's newest checkpoint.

    Folders are numbered in the order of all clients' names: no name of a client becomes a path.
    The result is what ``clients.json`` holds. Raises FedpeftError for a folder that is no run's,
    clients that it does not have, a strategy that changes the base, and an ``out`` in use.
    """
    folder = RunFolder.open(run)
    prepared = prepare(parse_recipe(folder.recipe(), str(folder.path)))
    folder.check_data(prepared.population.fingerprint)
    strategy, every = prepared.strategy, list(prepared.population.clients.names)
    for name in clients:
        if name not in every:
            raise FedpeftError(f"client {name!r} is not in {run}. {suggest(name, every)}")
    if strategy.folds:
        raise FedpeftError(
            f"strategy.name={prepared.recipe.strategy['name']!r} changes the base itself, and the "
            f"adapter in {folder.adapter} holds that: use it on the pretrained model."
        )
    if out.exists() and any(out.iterdir()):
        raise FedpeftError(f"{out} is not empty: name a new folder.")
    checkpoint, _ = latest(folder.checkpoints, type(strategy.init(prepared.problem)))
    federation = prepared.federation()
    memory = checkpoint.memory.items()
    federation.restore({c: {n: dict(t) for n, t in own.items()} for c, own in memory})
    structure = structure_of(prepared.network.model, prepared.network.scaling)
    number, found = checkpoint.round + 1, dict[str, dict[str, object]]()
    for sent in addressed(strategy, checkpoint.state, number, tuple(clients or every)):
        adapters, alive = federation.models(number, sent)
        alive = alive or structure.whole(len(sent))
        gone = structure.gone(alive)
        for k, client in enumerate(sent.clients):
            own = {name: there.cpu() for name, there in row(alive, k).items()}
            model = smaller(prepared.network, row(adapters, k), own)
            place = f"{every.index(client):06d}"
            save(model, out / place)
            found[place] = {"client": client, "gone": round(float(gone[k]), 6)}
    found = dict(sorted(found.items()))
    (out / NOTE).write_text(json.dumps(found, indent=2) + "\n")
    return found
