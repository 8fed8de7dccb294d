"""The forwards of modules that own trainable tensors, for K clients at once.

Input and output are ``[K*b, ...]``, client-major. ``bmm`` for LoRA and linear heads, ``vmap`` for
everything else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from fedpeft.cohort import patches
from fedpeft.tree import Tree

Forward = Callable[..., Tensor]

QUANTISED = "peft.tuners.lora.bnb"
"""Where peft keeps its LoRA layers over 8- and 4-bit bases; it imports only with bitsandbytes."""

PLAIN_LORA = {"lora_A.default.weight", "lora_B.default.weight"}
"""The tensors of a layer that the hand-written LoRA path knows."""


class _Unpatched(nn.Module):
    """Calls the class's forward of a module whose instance forward is replaced."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, x: Tensor) -> Tensor:
        found = type(self.inner).forward(self.inner, x)
        assert isinstance(found, Tensor)
        return found


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost adapter layers and saved modules that own trainable tensors, by name.

    Raises ValueError when a trainable tensor lies outside all of them.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{owner}.") for owner in found)
        if inside or not isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            continue
        assert isinstance(module, nn.Module)
        if any(p.requires_grad for p in module.parameters()):
            found[name] = module
    for name, p in model.named_parameters():
        if p.requires_grad and not any(name.startswith(f"{owner}.") for owner in found):
            raise ValueError(f"trainable tensor {name} lies outside every adapter layer")
    return found


def travelling(model: nn.Module, module: nn.Module) -> dict[str, str]:
    """The names of a module's tensors inside it -> the names under which they travel.

    A tensor that several layers share (VB-LoRA's bank, Lily's B) travels once, under the name that
    the model gives it first.
    """
    first = {id(p): name for name, p in model.named_parameters()}
    return {local: first[id(p)] for local, p in module.named_parameters()}


def fold(module: nn.Module, own: Tree, clients: int) -> Forward:
    """The forward of ``module`` for ``clients`` clients; input and output ``[K*b, ...]``."""
    if is_plain_lora(module) and own.keys() <= PLAIN_LORA:
        assert isinstance(module, LoraLayer)
        return _lora_forward(module, own, clients)
    if isinstance(module, ModulesToSaveWrapper):
        saved = module.modules_to_save["default"]
        names = {"modules_to_save.default.weight", "modules_to_save.default.bias"}
        if type(saved) is nn.Linear and set(own) == names:
            return _linear_forward(own, clients)
    return _vmap_forward(module, own, clients)


def is_plain_lora(module: nn.Module) -> bool:
    """Whether a module is LoRA on a linear layer without any variant: W x + s B A x."""
    kind: type = type(module)
    return (
        isinstance(module, LoraLayer)
        and (kind is LoraLinear or kind.__module__ == QUANTISED)
        and module.active_adapters == ["default"]
        and not module.merged
        and not module.disable_adapters
        and not module.lora_variant
        and not module.lora_bias["default"]
        and not module._forward_pre_hooks
    )


def _lora_forward(module: LoraLayer, own: Tree, clients: int) -> Forward:
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
        flat: Tensor = base.reshape(clients, -1, base.shape[-1])  # [K, b*T, o]
        flat.baddbmm_(inner.to(flat.dtype), wide.mT.to(flat.dtype), alpha=scale)
        return flat.view(base.shape)

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
    needed = patches.needed(module)

    def forward(x: Tensor) -> Tensor:
        folded = x.reshape(clients, -1, *x.shape[1:])

        def one(own: Tree, x: Tensor) -> Tensor:
            found = functional_call(inner, own, (x,))
            assert isinstance(found, Tensor)
            return found

        with patches.applied(needed):
            found = torch.vmap(one, randomness="different")(named, folded)
        return found.reshape(len(x), *found.shape[2:])

    return forward
