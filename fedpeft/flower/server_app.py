"""The Flower server: all rounds of a recipe on the nodes of a deployment, then the adapter.

Run config: ``recipe`` (a built-in name or a path on the server), ``join-timeout`` and
``reply-timeout`` in seconds. The run folder gets ``adapter/``, in peft's format.
"""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpeft.config_load import load_recipe
from fedpeft.engine import play_round
from fedpeft.evaluate import score
from fedpeft.flower.federation import Digests, FlowerFederation, Patience
from fedpeft.model import save_adapter
from fedpeft.prepare import prepare

log = logging.getLogger("flwr.fedpeft")  # what Flower shows

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Plays the rounds and writes the adapter. Raises FedpeftError, which ends Flower's run."""
    config = context.run_config
    recipe = load_recipe(str(config["recipe"]))
    prepared = prepare(recipe)
    network, strategy = prepared.network, prepared.strategy
    federation = FlowerFederation(
        grid,
        recipe,
        nodes=len(prepared.population.clients),
        digests=Digests(network.digest, network.layout.digest),
        patience=Patience(float(config["join-timeout"]), float(config["reply-timeout"])),
    )
    state = strategy.init(prepared.problem)
    for number in range(1, recipe.rounds.count + 1):
        state, report = play_round(strategy, state, federation, recipe.rounds, recipe.seed, number)
        log.info("round %d: %d replies, loss %.4f", number, report.replied, report.loss)
        for client, reason in report.excluded.items():
            log.warning("round %d: %s excluded: %s", number, client, reason)
    adapter = strategy.adapter(state)
    log.info("test: %s", score(network, prepared.lane, adapter, prepared.population.test))
    save_adapter(network, adapter, Path(recipe.output.folder) / "adapter", recipe.model.name)
