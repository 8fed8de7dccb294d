"""Changes of the frozen base, added to the pretrained weights while a call runs, then taken back.

Some methods change the base for everybody (a residual, a stack of adapters). Such a change is a
tree of dense updates by LoRA layer, ``[d_out, d_in]`` as in ``W + s B A``, whatever the layout in
which the layer holds its weight.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedpeft.adapter_file import note_of, seal
from fedpeft.errors import FedpeftError
from fedpeft.model import Network
from fedpeft.tree import Tree

log = logging.getLogger(__name__)

SMALLEST = 1e-7
"""Singular values below this share of the largest are rounding of float32."""

Sums = Callable[[], tuple[Tensor, Tensor]]
"""Gives a summed loss and the number of items in it."""


@contextmanager
def folded(network: Network, base: Tree) -> Iterator[None]:
    """Adds ``base`` to the pretrained weights inside the block; bit-equal again afterwards.

    The weights are written in place, so whatever holds them (compiled steps, CUDA graphs) sees it.
    Raises FedpeftError where a layer cannot take its update exactly; see ``weight_of``.
    """
    places = {layer: weight_of(network, layer, update) for layer, update in base.items()}
    pristine = {layer: weight.detach().clone() for layer, (weight, _) in places.items()}
    try:
        with torch.no_grad():
            for layer, (weight, transposed) in places.items():
                update = base[layer].to(weight.device, weight.dtype)
                weight.add_(update.mT if transposed else update)
        yield
    finally:
        with torch.no_grad():
            for layer, (weight, _) in places.items():
                weight.copy_(pristine[layer])


def weight_of(
    network: Network, layer: str, update: Tensor, changes: bool = True
) -> tuple[Tensor, bool]:
    """A LoRA layer's own weight, and whether it is held as ``[d_in, d_out]``: by type, not shape.

    Raises FedpeftError unless it is a matrix of the update's shape that nobody shares, and float32
    if the strategy ``changes`` it or takes its gradient; to be read, 16 bits will do.
    """
    module = dict(network.model.named_modules()).get(layer)
    inner = module.get_base_layer() if isinstance(module, LoraLayer) else None
    if not isinstance(module, LoraLayer) or not isinstance(inner, nn.Linear | Conv1D):
        raise FedpeftError(
            f"the strategy changes the frozen weight of {layer!r}, which is no LoRA layer on a "
            f"linear module with its weight in full: set adapter.kind=lora, adapter.target_modules "
            f"to linear modules, and model.quantize=none."
        )
    weight = inner.weight
    transposed = isinstance(inner, Conv1D)
    shape = tuple(weight.shape[::-1]) if transposed else tuple(weight.shape)
    if tuple(update.shape) != shape:
        raise FedpeftError(f"the change of {layer!r} has shape {tuple(update.shape)}, not {shape}")
    if weight.dtype != torch.float32 and (changes or not weight.is_floating_point()):
        raise FedpeftError(
            f"the strategy adds small changes to the frozen weight of {layer!r}, or takes its "
            f"gradient, and it is held in {weight.dtype}, too coarse for either: set "
            f"local.precision=fp32 and model.quantize=none."
        )
    names = [n for n, p in network.model.named_parameters(remove_duplicate=False) if p is weight]
    if len(names) > 1:
        raise FedpeftError(
            f"the strategy changes the frozen weight of {layer!r}, which is also {names[-1]!r}: "
            f"leave the layer out of adapter.target_modules, or choose another strategy."
        )
    return weight, transposed


def pretrained(network: Network, layer: str) -> Tensor:
    """A LoRA layer's own weight ``[d_out, d_in]``: a copy, float32, on the CPU."""
    rows, columns = _size(network, layer)
    like = torch.empty(rows, columns, device="meta")
    weight, transposed = weight_of(network, layer, like, changes=False)
    found = weight.detach().mT if transposed else weight.detach()
    return found.cpu().float().clone(memory_format=torch.contiguous_format)


def gradients_by_weight(network: Network, losses: Iterable[Sums]) -> Tree:
    """The gradient of a mean loss by the weights of all LoRA layers: ``[d_out, d_in]``, on the CPU.

    losses: each gives a part's summed loss and its number of items.
    """
    places = {}
    for layer in network.scaling:
        rows, columns = _size(network, layer)
        places[layer] = weight_of(network, layer, torch.empty(rows, columns, device="meta"))
    weights = [weight for weight, _ in places.values()]
    total, items = [torch.zeros(w.shape) for w in weights], 0.0
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for part in losses:
            loss, count = part()
            for summed, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
                summed += gradient.cpu()
            items += float(count)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return {
        layer: (g.mT if transposed else g) / max(items, 1.0)
        for (layer, (_, transposed)), g in zip(places.items(), total, strict=True)
    }


def check_foldable(network: Network, strategy: str) -> None:
    """Raises FedpeftError unless the weight of every LoRA layer can be changed, and taken back."""
    if not network.scaling:
        raise FedpeftError(
            f"strategy.name={strategy!r} changes the frozen weights of layers with lora_A and "
            f"lora_B; this adapter has none: set adapter.kind=lora, or choose another strategy."
        )
    for layer in network.scaling:
        rows, columns = _size(network, layer)
        weight_of(network, layer, torch.empty(rows, columns, device="meta"))


def _size(network: Network, layer: str) -> tuple[int, int]:
    module: Any = network.model.get_submodule(layer)
    return int(module.out_features), int(module.in_features)


def export_with_base(network: Network, values: Tree, base: Tree, folder: Path) -> None:
    """Rewrites an exported LoRA so that it holds ``base`` too: factors of a higher rank, s = 1.

    peft loads it onto the pretrained base as any other LoRA. Each layer's base + s B A is split by
    its SVD; the rank is the largest that a layer needs, at most min(d_out, d_in), where nothing is
    lost but what float32 cannot hold.
    """
    factors = {}
    for layer in network.scaling:
        a, b = (values[f"{layer}.lora_{x}.default.weight"].double().cpu() for x in "AB")
        dense = network.scaling[layer] * b @ a
        if layer in base:
            dense = dense + base[layer].double().cpu()
        u, s, vt = torch.linalg.svd(dense, full_matrices=False)
        need = max(1, int((s > SMALLEST * s[0]).sum())) if float(s[0]) > 0 else 1
        factors[layer] = (u[:, :need] * s[:need], vt[:need])
    rank = max(len(down) for _, down in factors.values())
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for layer, (up, down) in factors.items():
        wide, tall = up.new_zeros(len(up), rank), down.new_zeros(rank, down.shape[1])
        wide[:, : up.shape[1]], tall[: len(down)] = up, down
        tensors[f"{layer}.lora_A.weight"] = tall.float().contiguous()
        tensors[f"{layer}.lora_B.weight"] = wide.float().contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False}
    config |= {"rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    seal(folder, note_of(folder))
    log.info("the exported LoRA holds the base's changes too: rank %d", rank)
