"""Pruning as a mask: each client's rows of a batch without the groups that the client lacks.

K clients share one frozen model; what is gone differs between them. A gate multiplies the output
that a group alone makes, the values of a head or an activation of a channel, by the client's 0 or
1. So logits, and the gradients of what is left, are those of the smaller model; what is gone has
gradient zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fedpeft.errors import FedpeftError
from fedpeft.pruning.structure import Part
from fedpeft.tree import Tree


class Gates:
    """The gates of a model, for clients with ``alive`` (part -> bool ``[K, G]``).

    ``select`` says whose rows the next batches hold; ``one`` that they hold one of these alone.
    """

    def __init__(self, model: nn.Module, parts: Sequence[Part], alive: Tree) -> None:
        self._model = model
        self._parts = parts
        self._factors = {
            p.name: alive[p.name].float().repeat_interleave(p.gate.width, dim=1) for p in parts
        }
        self._selected = self._rows = self._factors

    def select(self, clients: Sequence[int] | slice) -> None:
        """The next batches hold rows of these clients, in this order."""
        self._selected = {name: value[clients] for name, value in self._factors.items()}
        self._rows = self._selected

    def one(self, k: int) -> None:
        """The next batch holds rows of the k-th selected client alone."""
        self._rows = {name: value[k : k + 1] for name, value in self._selected.items()}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model has its gates inside the block."""
        handles = []
        try:
            for part in self._parts:
                module = self._model.get_submodule(part.gate.layer)
                handles.append(module.register_forward_hook(partial(self._multiply, part)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _multiply(self, part: Part, module: nn.Module, given: object, output: Tensor) -> Tensor:
        factor = self._rows[part.name].to(output)
        clients, first = len(factor), part.gate.start
        if len(output) % clients:
            raise FedpeftError(
                f"{part.name}: {len(output)} rows are not those of {clients} clients"
            )
        rows = output.reshape(clients, -1, output.shape[-1])
        last = output.shape[-1] - first - factor.shape[1]
        if first or last:
            factor = torch.nn.functional.pad(factor, (first, last), value=1.0)
        return (rows * factor[:, None]).view(output.shape)
