"""Going on from an adapter folder (``adapter.start``), which may come from anywhere.

Nothing in the folder decides what is built: the adapter is that of the recipe, and the folder's
configuration is compared with it, field by field, never handed to peft (whose ``target_modules``
may be a regular expression, and whose ``r`` is allocated before it is found not to fit). Weights
are safetensors, floats, finite, of the names and shapes that the adapter has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from fedpeft import tuners
from fedpeft.errors import FedpeftError
from fedpeft.manifest import read_file, read_json, verify

RAW = "trainable.safetensors"
"""Beside peft's file, for kinds whose file is not enough to go on training from."""

CONFIG, WEIGHTS, NOTE = "adapter_config.json", "adapter_model.safetensors", "fedpeft.json"

_WHAT = "adapter.start"
_AGAIN = "Use the adapter settings it was trained with."
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_SLACK = 16 * 2**20
_FREE = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type"}
"""Fields of peft's configuration that say where an adapter comes from, not what it does."""


def load_start(model: nn.Module, folder: str, digest: str) -> None:
    """Writes the weights in an adapter folder into a model with such an adapter.

    digest: of the model's base. Raises FedpeftError, with file and field, for a folder of another
    base or adapter, one that is not as its manifest says, and for weights that are no adapter's.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise FedpeftError(
            f"adapter.start={folder!r} holds no {CONFIG}: give a folder written by peft or by a "
            f"fedpeft run (RUN/adapter)."
        )
    verify(path, _WHAT)
    if (path / NOTE).is_file():
        other = read_json(path, NOTE, _WHAT).get("base_digest")
        if other != digest:
            raise FedpeftError(
                f"adapter.start={folder!r} was trained on another base model (digest "
                f"{str(other)[:16]}, here {digest}): set model.name to the base that the adapter "
                f"belongs to."
            )
    assert isinstance(model, peft.PeftModel)
    config = model.active_peft_config
    _check_config(read_json(path, CONFIG, _WHAT), _plain(config.to_dict()), folder)
    if tuners.keeps_less(config):
        _load_raw(model, path)
        return
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = _read(path, WEIGHTS, expected)
    _check_weights(path, WEIGHTS, weights, expected)
    try:
        peft.set_peft_model_state_dict(model, weights)
    except (RuntimeError, KeyError) as error:
        raise FedpeftError(
            f"adapter.start={folder!r} does not fit this model and adapter: {error}"
        ) from error


def _load_raw(model: nn.Module, folder: Path) -> None:
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not (folder / RAW).is_file():
        raise FedpeftError(
            f"adapter.start={str(folder)!r} holds no {RAW}: peft's own file of this adapter "
            f"kind is not enough to go on training. Give the folder of a fedpeft run (RUN/adapter)."
        )
    values = _read(folder, RAW, own)
    _check_weights(folder, RAW, values, own)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def _check_config(theirs: Mapping[str, Any], ours: Mapping[str, Any], folder: str) -> None:
    """Raises FedpeftError for the first field that would make another function of the weights."""
    if theirs.get("peft_type") != ours["peft_type"]:
        raise _fault(folder, CONFIG, f"peft_type is {theirs.get('peft_type')!r:.60}, "
                     f"the recipe's is {ours['peft_type']!r}")  # fmt: skip
    for name in sorted(theirs):
        if name in _FREE or "dropout" in name or name.startswith("init"):
            continue
        if name not in ours:
            if theirs[name]:
                raise _fault(folder, CONFIG, f"{name[:60]!r} is a field that this peft lacks")
        elif _plain(theirs[name]) != ours[name]:
            raise _fault(
                folder,
                CONFIG,
                f"{name} is {theirs[name]!r:.60}, the recipe's adapter has {ours[name]!r:.60}",
            )


def _plain(value: Any) -> Any:
    """A configuration as JSON has it, with lists of names as the sets that they are."""
    if isinstance(value, Mapping):
        return {str(key): _plain(below) for key, below in value.items()}
    if isinstance(value, set | list | tuple):
        items = [_plain(below) for below in value]
        return sorted(set(items)) if all(isinstance(item, str) for item in items) else items
    return json.loads(json.dumps(value, default=str))


def _read(folder: Path, name: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file that is not larger than what is expected of it."""
    limit = 2 * sum(4 * tensor.numel() for tensor in expected.values()) + _SLACK
    try:
        return load(read_file(folder, name, limit, _WHAT))
    except SafetensorError as error:
        raise _fault(str(folder), name, f"it is no safetensors file: {str(error)[:80]}") from None


def _check_weights(
    folder: Path, file: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    unknown, missing = sorted(found.keys() - expected), sorted(expected.keys() - found)
    if unknown:
        raise FedpeftError(
            f"adapter.start={str(folder)!r}: {file} holds tensors that this model and adapter do "
            f"not have: {unknown[:3]}. {_AGAIN}"
        )
    if missing:
        raise _fault(str(folder), file, f"tensors are missing: {missing[:3]}")
    for name, tensor in found.items():
        want = expected[name]
        if tensor.shape != want.shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(want.shape)}"
            raise _fault(str(folder), file, f"{name!r} has shape {shapes}")
        if tensor.dtype not in _FLOATS and tensor.dtype != want.dtype:
            raise _fault(str(folder), file, f"{name!r} is of {tensor.dtype}, not {want.dtype}")
        if not bool(tensor.isfinite().all()):
            raise _fault(str(folder), file, f"{name!r} holds NaN or Inf")


def _fault(folder: str, file: str, why: str) -> FedpeftError:
    return FedpeftError(
        f"adapter.start={folder!r} does not fit this model and adapter: {file}: {why}. {_AGAIN}"
    )
