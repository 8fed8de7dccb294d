"""The Flower server: all rounds of a recipe on the nodes of a deployment, then the adapter.

Run config: ``recipe`` (a built-in name or a path on the server), ``join-timeout`` and
``reply-timeout`` in seconds; under secure aggregation ``identities``, a JSON file on the server
with every client's public key (see ``identity``). The run folder gets ``adapter/``, in peft's
format; with privacy also ``privacy.jsonl``, the ledger, which a server that starts again goes on
with, and ``privacy.json``, what the run may promise.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpeft.config_load import load_recipe
from fedpeft.engine import Seam, play_round
from fedpeft.errors import FedpeftError
from fedpeft.evaluate import score
from fedpeft.federation import Federation
from fedpeft.flower.federation import Digests, FlowerFederation, Patience
from fedpeft.flower.identity import read_identities
from fedpeft.flower.secure import SecureFlowerFederation
from fedpeft.forecast import BytesSpentError, Purse
from fedpeft.model import save_adapter
from fedpeft.prepare import Prepared, prepare
from fedpeft.privacy.guard import BudgetSpentError, Guard

log = logging.getLogger("flwr.fedpeft")  # what Flower shows

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Plays the rounds and writes the adapter. Raises FedpeftError, which ends Flower's run."""
    recipe = load_recipe(str(context.run_config["recipe"]))
    prepared = prepare(recipe)
    federation = federation_of(prepared, grid, context.run_config)
    folder = Path(recipe.output.folder)
    with guarded(prepared, folder) as guard:
        state = play(prepared, federation, guard)
        if guard is not None:
            promise = guard.statement()
            (folder / "privacy.json").write_text(json.dumps(promise.as_dict(), indent=2) + "\n")
            for line in promise.lines():
                log.info("privacy: %s", line)
    adapter = prepared.strategy.adapter(state)
    network, test = prepared.network, prepared.population.test
    log.info("test: %s", score(network, prepared.lane, adapter, test))
    save_adapter(network, adapter, folder / "adapter", recipe.model.name)


def federation_of(prepared: Prepared, grid: Grid, config: Mapping[str, object]) -> Federation:
    """The recipe's clients on the nodes of a grid, under secure aggregation where it says so."""
    network, recipe = prepared.network, prepared.recipe
    patience = Patience(float(str(config["join-timeout"])), float(str(config["reply-timeout"])))
    federation = FlowerFederation(
        grid,
        recipe,
        nodes=len(prepared.population.clients),
        digests=Digests(network.digest, network.layout.digest),
        patience=patience,
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


@contextmanager
def guarded(prepared: Prepared, folder: Path) -> Iterator[Guard | None]:
    """What lets clients into the rounds, and its ledger in the run folder; None without privacy."""
    if prepared.terms is None:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    guard = Guard(prepared.terms, folder / "privacy.jsonl", prepared.recipe)
    try:
        if guard.terms.whole_run and guard.ledger.clients():
            raise FedpeftError(
                f"output.folder={str(folder)!r} has the ledger of an earlier run, and with "
                f"privacy.bands a run is charged as a whole and cannot be begun again: set "
                f"privacy.bands=0. Another folder would forget what the clients have spent."
            )
        yield guard
    finally:
        guard.close()


def play(prepared: Prepared, federation: Federation, guard: Guard | None) -> Any:
    """The state after all rounds, or after the last one that the budgets allow."""
    strategy, recipe, post = prepared.strategy, prepared.recipe, prepared.post
    state, purse, spent = strategy.init(prepared.problem), Purse.of(prepared), 0
    for number in range(1, recipe.rounds.count + 1):
        try:
            if purse is not None:
                purse.check(number, spent)
            names = None if guard is None else guard.admit(number, federation.clients())
        except (BudgetSpentError, BytesSpentError) as end:
            log.warning("stopped before %s", end)
            break
        seam = Seam(post, names)
        state, report = play_round(
            strategy, state, federation, recipe.rounds, recipe.seed, number, seam
        )
        spent += sum(report.down.values()) + sum(report.up.values())
        log.info("round %d: %d replies, loss %.4f", number, report.replied, report.loss)
        for client, reason in report.excluded.items():
            log.warning("round %d: %s excluded: %s", number, client, reason)
    return state
