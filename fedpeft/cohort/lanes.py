"""Lanes: ways to run one model for K clients, each with its own trainable tensors.

``FoldLane``: one big batch through the frozen base; only modules that own trainable tensors fold
their input to ``[K, b, ...]`` and apply K copies (``bmm`` for LoRA and linear heads, ``vmap`` for
everything else). ``VmapLane``: the whole model under ``vmap``, for prompt learning, whose virtual
tokens are not inside any layer. ``LoopLane``: one client after another; works for every model and
is what the other two are tested against.

``stacked`` names the trainable tensors that differ between clients, ``[K, *shape]``; every other
trainable tensor has the value that the model holds (``Network.write``), the same for all clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import masking_utils

from fedpeft.cohort.fold import fold, owners
from fedpeft.data.examples import Batch
from fedpeft.tree import Tree


class Lane(ABC):
    """Runs ``model`` for the clients of a batch."""

    name: str

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @abstractmethod
    def logits(self, stacked: Tree, batch: Batch) -> Tensor:
        """Logits of all rows, client-major: ``[K*b, C]`` or ``[K*b, P + T, V]``."""


class LoopLane(Lane):
    """One client after another, each through the whole model."""

    name = "loop"

    def logits(self, stacked: Tree, batch: Batch) -> Tensor:
        found = []
        for k, rows in enumerate(_per_client(batch)):
            own = {name: value[k] for name, value in stacked.items()}
            output = functional_call(self.model, own, (), _inputs(*rows))
            found.append(output.logits)
        return torch.cat(found)


class VmapLane(Lane):
    """The whole model under ``vmap`` over clients.

    2-D padding masks break under vmap in transformers 5 where a shortcut looks at their values;
    inside this lane the shortcut is off. Attention runs as plain matrix products, the only kernel
    with a batching rule both ways.
    """

    name = "vmap"

    def logits(self, stacked: Tree, batch: Batch) -> Tensor:
        shape = (batch.clients, -1, batch.tokens.shape[1])
        tokens = batch.tokens.view(shape)
        mask = torch.ones_like(tokens) if batch.mask is None else batch.mask.view(shape)

        def one(own: Tree, tokens: Tensor, mask: Tensor) -> Tensor:
            output = functional_call(self.model, own, (), _inputs(tokens, mask))
            logits = output.logits
            assert isinstance(logits, Tensor)
            return logits

        with _no_mask_shortcut(), sdpa_kernel(SDPBackend.MATH):
            logits = torch.vmap(one, randomness="different")(stacked, tokens, mask)
        return logits.flatten(0, 1)


class FoldLane(Lane):
    """One batch through the base; folding inside the modules that own trainable tensors.

    Raises ValueError when a trainable tensor lies outside every tuner layer and saved module.
    """

    name = "fold"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise ValueError("prompt learning: virtual tokens are made outside the layers")
        self._owners = owners(model)

    def logits(self, stacked: Tree, batch: Batch) -> Tensor:
        with self._folded(stacked, batch.clients):
            output = self.model(**_inputs(batch.tokens, batch.mask))
        logits = output.logits
        assert isinstance(logits, Tensor)
        return logits

    @contextmanager
    def _folded(self, stacked: Tree, clients: int) -> Iterator[None]:
        patched = []
        try:
            for prefix, module in self._owners.items():
                own = {
                    local: stacked[f"{prefix}.{local}"]
                    for local, p in module.named_parameters()
                    if f"{prefix}.{local}" in stacked
                }
                if own:
                    module.forward = fold(module, own, clients)
                    patched.append(module)
            yield
        finally:
            for module in patched:
                del module.forward


def _inputs(tokens: Tensor, mask: Tensor | None) -> dict[str, Any]:
    return {"input_ids": tokens, "attention_mask": mask}


def _per_client(batch: Batch) -> Iterator[tuple[Tensor, Tensor | None]]:
    size = len(batch.tokens) // batch.clients
    for k in range(batch.clients):
        rows = slice(k * size, (k + 1) * size)
        yield batch.tokens[rows], None if batch.mask is None else batch.mask[rows]


@contextmanager
def _no_mask_shortcut() -> Iterator[None]:
    """Turns off transformers' look into the mask (``mask.all()``), which no transform can trace."""
    names = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
    before = {name: getattr(masking_utils, name) for name in names}
    for name in names:
        setattr(masking_utils, name, lambda *a, **k: False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(masking_utils, name, value)
