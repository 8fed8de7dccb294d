"""Pruning for good: a model without the rows and columns of the groups that are gone.

In place, on a model with LoRA or without. What is left computes what the masked model computes.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedpeft.errors import FedpeftError
from fedpeft.pruning.anatomy import inner
from fedpeft.pruning.structure import Part, kept, sides
from fedpeft.tree import Tree


def slice_model(model: nn.Module, parts: tuple[Part, ...], alive: Tree) -> None:
    """Takes from the model, in place, what ``alive`` (part -> bool ``[G]``) lacks.

    Raises FedpeftError for GPT-2, whose attention cannot be smaller than its hidden size.
    """
    one = {name: value[None].cpu() for name, value in alive.items()}
    for (layer, side), members in sides(parts).items():
        if any(member.start for _, member in members):
            raise FedpeftError(
                f"{layer}: GPT-2 fuses q, k and v at its hidden size, so its heads can be masked "
                f"and not cut out. Choose a model of another family to export it smaller."
            )
        module = model.get_submodule(layer)
        size = int(weight_shape(module)[0 if side == "rows" else 1])
        index = torch.nonzero(kept(members, one, size)[0]).flatten()
        _cut(module, side, index)
    for part in parts:
        if part.kind == "heads":
            _resize(model, part, int(alive[part.name].sum()))


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """``(d_out, d_in)`` of a linear layer, with or without LoRA."""
    base: Any = inner(module)
    rows, columns = base.weight.shape
    return (columns, rows) if isinstance(base, Conv1D) else (rows, columns)


def _cut(module: nn.Module, side: str, index: Tensor) -> None:
    rows = side == "rows"
    _keep(inner(module), 0 if rows else 1, index)
    if isinstance(module, LoraLayer):
        factors = module.lora_B if rows else module.lora_A
        for factor in factors.values():
            _keep(factor, 0 if rows else 1, index)
        if rows:
            module.out_features = len(index)
        else:
            module.in_features = len(index)


def _keep(linear: Any, dim: int, index: Tensor) -> None:
    """Keeps rows (dim 0) or columns (dim 1) of a linear layer, and the entries of its bias."""
    index = index.to(linear.weight.device)
    linear.weight = _chosen(linear.weight, dim, index)
    if dim == 0 and linear.bias is not None:
        linear.bias = _chosen(linear.bias, 0, index)
    linear.out_features, linear.in_features = linear.weight.shape


def _chosen(tensor: nn.Parameter, dim: int, index: Tensor) -> nn.Parameter:
    chosen = tensor.detach().index_select(dim, index)
    return nn.Parameter(chosen, requires_grad=tensor.requires_grad)


def _resize(model: nn.Module, part: Part, heads: int) -> None:
    """Tells an attention module that counts its heads how many are left; others look at shapes."""
    block = part.name.removesuffix(".heads")
    found: Any = dict(model.named_modules()).get(f"{block}.attention.self")
    if found is not None:
        found.num_attention_heads = heads
        found.all_head_size = heads * found.attention_head_size
