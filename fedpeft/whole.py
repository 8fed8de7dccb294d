"""``adapter.kind=full``: no adapter; every tensor of the base model is trained and exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from fedpeft.errors import FedpeftError

KIND = "full"
"""The adapter kind."""

HEAD = "classifier.safetensors"
"""The head's tensors, beside the checkpoint of an encoder whose token vectors are averaged."""


def free(base: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """The base model, in place, with every tensor trainable.

    Raises FedpeftError for settings that only an adapter has, and for a quantised base.
    """
    for key in sorted(settings.keys() - {"kind"}):
        raise FedpeftError(
            f"adapter.{key}={settings[key]!r} with adapter.kind=full, which has no settings: leave "
            f"it out. To go on from an exported model, set model.name to its folder."
        )
    for name, parameter in base.named_parameters():
        if not parameter.is_floating_point():
            raise FedpeftError(
                f"adapter.kind=full trains every tensor, but {name} is held as {parameter.dtype}: "
                f"set model.quantize=none."
            )
        parameter.requires_grad_(True)
    return base


def save(model: nn.Module, folder: Path) -> None:
    """Writes the model in the format that ``from_pretrained`` of its class loads.

    Of an encoder with averaged token vectors, the encoder, and its head apart.
    """
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(str(folder))
        return
    encoder, head = model.get_submodule("encoder"), model.get_submodule("classifier")
    assert isinstance(encoder, PreTrainedModel)
    encoder.save_pretrained(str(folder))
    save_file({n: v.contiguous() for n, v in head.state_dict().items()}, folder / HEAD)
