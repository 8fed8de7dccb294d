"""What a run's clients compute in a round, for the fleet's clock: counted, not measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedpeft import quantize
from fedpeft.config import Local
from fedpeft.errors import FedpeftError
from fedpeft.fleet.availability import Labels
from fedpeft.fleet.flops import flops_of
from fedpeft.fleet.memory import Fit, Footprint, fit
from fedpeft.fleet.simulator import Simulator
from fedpeft.fleet.speed import Work
from fedpeft.prepare import Prepared
from fedpeft.strategy import Effort

READS = 2
"""How often a batch reads the weights: forward and backward."""


class Costs:
    """The work of the run's clients, by the model's products and their own examples.

    A round is what the recipe's ``local`` says, on the lengths that the client's examples have.
    Not known here: steps that a strategy chooses itself, and what it asks for beside training and
    does not say (``Strategy.efforts``).
    """

    def __init__(self, prepared: Prepared, fleet: Simulator) -> None:
        self._population, self._local = prepared.population, prepared.recipe.local
        self._sizes = prepared.population.clients.roster.numbers
        self._fit, weights = fitted(prepared, fleet)
        self._moved = 4.0 * READS * weights
        self._flops = flops_of(prepared.network.model)
        if prepared.strategy.walks:
            self._flops = self._flops.forward(2)
        self._known: dict[int, tuple[float, float]] = {}
        self.adapted = int(self._fit.adapted.sum())

    def of(self, clients: np.ndarray, efforts: Mapping[int, Effort]) -> Work:
        """Of one round's training; efforts: client's number -> what it leaves out."""
        local, sizes = self._local, self._sizes[clients]
        seen, batches = examples_seen(sizes, local)
        each = np.array([self._lengths(int(client)) for client in clients]).reshape(-1, 2)
        effort = [efforts.get(int(client), _WHOLE) for client in clients]
        pruned = np.array([one.pruned for one in effort])
        adapter = np.array([one.adapter for one in effort])
        parts = (seen, seen * each[:, 0], seen * each[:, 1], pruned, adapter)
        flops = self._flops.of(*parts)
        again = self._fit.checkpointing[clients]
        if again.any():
            flops = np.where(again, self._flops.checkpointed().of(*parts), flops)
        flops = flops + optimizer_steps(sizes, local) * np.array([one.step for one in effort])
        forward = 2 * np.minimum(np.array([one.forward for one in effort]), sizes)
        once = (forward, forward * each[:, 0], forward * each[:, 1], pruned, adapter)
        flops = flops + self._flops.forward(1).of(*once)
        batches = batches * np.ceil(local.batch_size / self._fit.batch[clients])
        return Work(flops, batches * self._moved * (1.0 - pruned), seen, batches)

    def nothing(self, clients: np.ndarray) -> Work:
        """Of an exchange without training."""
        none = np.zeros(len(clients))
        return Work(none, none, none, none)

    def _lengths(self, client: int) -> tuple[float, float]:
        """Mean tokens of a client's examples, and mean of their squares."""
        if client not in self._known:
            population = self._population
            length = population.examples.lengths_of(population.clients[client].train)
            own = length.astype(np.float64)
            self._known[client] = float(own.mean()), float((own * own).mean())
        return self._known[client]


_WHOLE = Effort()


def examples_seen(sizes: np.ndarray, local: Local) -> tuple[np.ndarray, np.ndarray]:
    """Examples that clients of these sizes see in a round, and batches; float64 ``[K]`` each."""
    many = sizes.astype(np.float64)
    step = local.batch_size * local.accumulate
    if local.steps:
        seen = local.steps * np.minimum(many, step)
        return seen, local.steps * np.ceil(np.minimum(many, step) / local.batch_size)
    return local.epochs * many, local.epochs * np.ceil(many / local.batch_size)


def optimizer_steps(sizes: np.ndarray, local: Local) -> np.ndarray:
    """Of clients of these sizes in a round, float64 ``[K]``."""
    if local.steps:
        return np.full(len(sizes), float(local.steps))
    return local.epochs * np.ceil(sizes / (local.batch_size * local.accumulate))


def fitted(prepared: Prepared, fleet: Simulator) -> tuple[Fit, int]:
    """How the clients' training fits into their memory; the base's weights.

    Notes in ``fleet.usable`` who can train. Raises FedpeftError where nobody can.
    """
    model, recipe = prepared.network.model, prepared.recipe
    config: Any = model.config
    frozen = sum(quantize.count(p) for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    try:
        shape = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    except AttributeError as error:
        raise FedpeftError(
            f"fleet.preset={recipe.fleet.preset}: the memory of training model.name="
            f"{recipe.model.name!r} cannot be counted, its configuration does not say how large it "
            f"is ({error}). Use another model, or leave fleet: out."
        ) from None
    footprint = Footprint(frozen, trained, *map(int, shape))
    everybody = np.arange(fleet.count)
    longest = np.full(fleet.count, float(prepared.population.examples.longest))
    have = fleet.speed.memory(everybody)
    own = fit(footprint, recipe.local.batch_size, longest, have, recipe.fleet.memory)
    if not own.possible.any():
        need = float(footprint.bytes(recipe.local.batch_size, longest[0]))
        raise FedpeftError(
            f"fleet.preset={recipe.fleet.preset}: no device has memory enough, training needs "
            f"{need / 1e9:.1f} GB. Set fleet.memory=accumulate or checkpoint, lower "
            f"local.batch_size, or set fleet.memory=ignore."
        )
    fleet.usable = own.possible
    return own, frozen + trained


def labels_of(prepared: Prepared) -> Labels | None:
    """The clients' labels; None where examples have none."""
    population = prepared.population
    if population.examples.labels is None:
        return None
    every = population.examples.labels.numpy()
    own = [np.unique(every[client.train]) for client in population.clients]
    return Labels(
        np.array([labels[0] for labels in own]),
        np.array([labels[-1] for labels in own]),
        np.array([len(labels) for labels in own]),
        len(population.labels),
    )
