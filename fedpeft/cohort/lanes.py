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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear
from transformers import masking_utils

from fedpeft.data.examples import Batch
from fedpeft.tree import Tree

Forward = Callable[..., Tensor]


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
        self._owners = _owners(model)

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
                    module.forward = _fold(module, own, clients)
                    patched.append(module)
            yield
        finally:
            for module in patched:
                del module.forward


class _Unpatched(nn.Module):
    """Calls the class's forward of a module whose instance forward is replaced."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, x: Tensor) -> Tensor:
        found = type(self.inner).forward(self.inner, x)
        assert isinstance(found, Tensor)
        return found


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    owners: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{owner}.") for owner in owners)
        if inside or not isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            continue
        assert isinstance(module, nn.Module)
        if any(p.requires_grad for p in module.parameters()):
            owners[name] = module
    for name, p in model.named_parameters():
        if p.requires_grad and not any(name.startswith(f"{owner}.") for owner in owners):
            raise ValueError(f"trainable tensor {name} lies outside every adapter layer")
    return owners


def _fold(module: nn.Module, own: Tree, clients: int) -> Forward:
    """The forward of ``module`` for ``clients`` clients; input and output ``[K*b, ...]``."""
    if _is_plain_lora(module):
        assert isinstance(module, LoraLinear)
        return _lora_forward(module, own, clients)
    if isinstance(module, ModulesToSaveWrapper):
        saved = module.modules_to_save["default"]
        names = {"modules_to_save.default.weight", "modules_to_save.default.bias"}
        if type(saved) is nn.Linear and set(own) == names:
            return _linear_forward(own, clients)
    return _vmap_forward(module, own, clients)


def _is_plain_lora(module: nn.Module) -> bool:
    return (
        type(module) is LoraLinear
        and module.active_adapters == ["default"]
        and not module.merged
        and not module.disable_adapters
        and not module.lora_variant
        and not module.lora_bias["default"]
        and not module._forward_pre_hooks
    )


def _lora_forward(module: LoraLinear, own: Tree, clients: int) -> Forward:
    """y = W x + s B_k (A_k x), the base product on the whole batch; one factor may be shared."""
    shared_down, shared_up = module.lora_A["default"].weight, module.lora_B["default"].weight
    assert isinstance(shared_down, Tensor) and isinstance(shared_up, Tensor)
    down = own.get("lora_A.default.weight", shared_down)  # [K, r, i], or [r, i] where shared
    up = own.get("lora_B.default.weight", shared_up)  # [K, o, r], or [o, r]
    scale = float(module.scaling["default"])
    dropout = module.lora_dropout["default"]

    def forward(x: Tensor) -> Tensor:
        base = module.base_layer(x)
        folded = dropout(x).reshape(clients, -1, x.shape[-1])  # [K, b*T, i]
        inner = linear(folded, down) if down.ndim == 2 else folded @ down.mT
        wide = up.expand(clients, *up.shape) if up.ndim == 2 else up
        flat = base.reshape(clients, -1, base.shape[-1])  # [K, b*T, o]
        return torch.baddbmm(flat, inner.to(flat.dtype), wide.mT.to(flat.dtype), alpha=scale).view(
            base.shape
        )

    return forward


def _linear_forward(own: Tree, clients: int) -> Forward:
    weight = own["modules_to_save.default.weight"]  # [K, o, i]
    bias = own["modules_to_save.default.bias"]  # [K, o]

    def forward(x: Tensor) -> Tensor:
        folded = x.reshape(clients, -1, x.shape[-1])
        found = torch.baddbmm(bias.unsqueeze(1).to(x.dtype), folded, weight.mT.to(x.dtype))
        return found.view(*x.shape[:-1], weight.shape[1])

    return forward


def _vmap_forward(module: nn.Module, own: Tree, clients: int) -> Forward:
    inner = _Unpatched(module)
    named = {f"inner.{name}": value for name, value in own.items()}

    def forward(x: Tensor) -> Tensor:
        folded = x.reshape(clients, -1, *x.shape[1:])

        def one(own: Tree, x: Tensor) -> Tensor:
            found = functional_call(inner, own, (x,))
            assert isinstance(found, Tensor)
            return found

        found = torch.vmap(one, randomness="different")(named, folded)
        return found.reshape(len(x), *found.shape[2:])

    return forward


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
