"""A frozen base in 8 or 4 bits: bitsandbytes' weights, loaded by transformers.

Only the weights are quantised; a product dequantises its weight, in the backward pass once more.
bitsandbytes' own products are not used: those of 8 bits quantise the inputs too, with outliers
looked for over the whole batch, so that a client's result would depend on the others' rows; those
of 4 bits repack the weights in the first evaluation on some processors, and then return no
gradient (bitsandbytes 0.50.2, ``Linear4bit.forward``).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig

from fedpeft.config import Model
from fedpeft.errors import FedpeftError


def check(model: Model, device: torch.device) -> None:
    """Raises FedpeftError when ``model.quantize`` cannot be had here."""
    setting = f"model.quantize={model.quantize!r}"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FedpeftError(
            f"{setting} needs bitsandbytes, which is not installed: pip install bitsandbytes (or "
            f"'fedpeft[quantize]'), or set model.quantize=none."
        )
    if model.random:
        raise FedpeftError(
            f"{setting} with model.random=true: weights are quantised as they are loaded, and "
            f"random ones are not loaded. Set one of the two."
        )
    if device.type not in importlib.import_module("bitsandbytes").supported_torch_devices:
        raise FedpeftError(
            f"{setting} on engine.device={str(device)!r}: the installed bitsandbytes does not "
            f"support this kind of device. Use another device, or set model.quantize=none."
        )


def load_arguments(model: Model, auto: Any, config: Any, device: torch.device) -> dict[str, Any]:
    """What ``from_pretrained`` is given to quantise; nothing for ``model.quantize=none``.

    auto, config: transformers' auto class and the model's configuration. A head (what the model
    has beside its base model) stays in float32, because it is trained or feeds the loss.
    """
    if model.quantize == "none":
        return {}
    with torch.device("meta"):
        skeleton = auto.from_config(config, trust_remote_code=False)
    children = [name for name, _ in skeleton.named_children()]
    inner = skeleton.base_model_prefix
    settings: Any = BitsAndBytesConfig  # has no annotations
    quantisation = settings(
        load_in_8bit=model.quantize == "8bit",
        load_in_4bit=model.quantize == "4bit",
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=[c for c in children if c != inner] if inner in children else [],
    )
    return {"quantization_config": quantisation, "device_map": {"": str(device)}}


def use_dequantised(base: nn.Module) -> None:
    """Gives every quantised linear layer of ``base`` the forward of this module."""
    found: list[nn.Module] = [
        module
        for module in base.modules()
        if isinstance(module, nn.Linear) and statistics(module.weight) is not None
    ]
    for module in found:
        module.forward = functools.partial(_forward, module)


def statistics(parameter: Any) -> Tensor | None:
    """The scales of a quantised weight, None for any other tensor."""
    kind, found = type(parameter).__name__, None
    if kind == "Int8Params":
        found = parameter.SCB  # [o]: the largest absolute value of each row
    elif kind == "Params4bit":
        found = parameter.quant_state.absmax  # one per block of 64 values
    assert found is None or isinstance(found, Tensor)
    return found


def count(parameter: Any) -> int:
    """How many numbers a parameter stands for: two of 4 bits share a byte."""
    if type(parameter).__name__ == "Params4bit":
        return int(torch.Size(parameter.quant_state.shape).numel())
    return int(parameter.numel())


def _forward(module: Any, x: Tensor) -> Tensor:
    """y = x W^T + b in the precision of ``x``, or of autocast."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y = dequantised_linear(x, functools.partial(_weight, module.weight))
    return y if module.bias is None else y + module.bias.to(y.dtype)


def _weight(parameter: Any, kind: torch.dtype) -> Tensor:
    """The dequantised weight ``[o, i]``."""
    if type(parameter).__name__ == "Params4bit":
        functional = importlib.import_module("bitsandbytes.functional")
        found = functional.dequantize_4bit(parameter.data, parameter.quant_state).to(kind)
    else:
        scale = parameter.SCB.to(parameter.device) / 127.0
        found = parameter.data.to(kind) * scale.to(kind).unsqueeze(1)
    assert isinstance(found, Tensor)
    return found


def dequantised_linear(x: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
    """``x W^T`` for ``x`` ``[..., i]``; ``weight(dtype)`` gives W ``[o, i]``, which is not kept."""
    apply: Any = _Dequantised.apply  # has no annotations
    found = apply(x, weight)
    assert isinstance(found, Tensor)
    return found


class _Dequantised(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
        return linear(x, weight(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.weight = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.weight(gradient.dtype), None
