"""The adapter in a folder: sealed when it is written, and checked before it is the start of a run.

A folder may be anybody's. Nothing of it is trusted: tensors come from safetensors only, its
configuration is compared with the recipe's and never used, and what the recipe's adapter does not
have, or has otherwise, is refused by the name of file and field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedpeft import tree, tuners
from fedpeft.errors import FedpeftError

NOTE = "fedpeft.json"
RAW = "trainable.safetensors"
"""What peft's own file is not enough for: every trainable tensor."""

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FLOATS = {torch.float32, torch.float16, torch.bfloat16}
_FREE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "runtime_config")
"""Of a configuration, what does not change the model; so do starts and dropout."""


def seal(folder: Path, note: Mapping[str, object]) -> None:
    """Writes ``note`` and the SHA-256 of the adapter's files beside them."""
    files = [folder / name for name in (_CONFIG, _WEIGHTS, RAW)]
    sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}
    (folder / NOTE).write_text(json.dumps({**note, "sha256": sums}, indent=2) + "\n")


def note_of(folder: Path) -> dict[str, Any]:
    """What the folder's note says; empty where there is none."""
    path = folder / NOTE
    return _json(path, folder) if path.is_file() else {}


def load_start(model: nn.Module, folder: str, digest: str) -> None:
    """Fills the model's adapter from a folder.

    digest: of the base model. Raises FedpeftError for all that is wrong with the folder.
    """
    path = Path(folder)
    if not (path / _CONFIG).is_file():
        raise FedpeftError(
            f"adapter.start={folder!r} holds no {_CONFIG}: give a folder written by peft or by a "
            f"fedpeft run (RUN/adapter)."
        )
    note = note_of(path)
    other = note.get("base_digest", digest)
    if other != digest:
        raise FedpeftError(
            f"adapter.start={folder!r} was trained on another base model (digest {other}, here "
            f"{digest}): set model.name to the base that the adapter belongs to."
        )
    _check_seal(path, note)
    assert isinstance(model, peft.PeftModel)
    config = model.active_peft_config
    _check_config(path, config)
    if tuners.keeps_less(config):
        _load_raw(model, path / RAW)
        return
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = _tensors(path / _WEIGHTS, own)
    missing = sorted(own.keys() - weights.keys())
    if missing:
        raise _refused(path, f"{_WEIGHTS} lacks {len(missing)} tensors, as {missing[0]!r}")
    try:
        found: Any = peft.set_peft_model_state_dict(model, weights)
    except (KeyError, RuntimeError) as error:
        raise _unfit(path, str(error)) from error
    known = tuners.PROMPT_KEYS if config.is_prompt_learning else set()
    unknown = sorted(set(found.unexpected_keys) - known)
    if unknown:
        raise FedpeftError(
            f"adapter.start={folder!r} holds tensors that this model and adapter do not have: "
            f"{unknown[:3]}. Use the adapter settings it was trained with."
        )


def _load_raw(model: nn.Module, path: Path) -> None:
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not path.is_file():
        raise FedpeftError(
            f"adapter.start={str(path.parent)!r} holds no {RAW}: peft's own file of this adapter "
            f"kind is not enough to go on training. Give the folder of a fedpeft run (RUN/adapter)."
        )
    values = _tensors(path, own)
    try:
        tree.check_same({name: p.detach() for name, p in own.items()}, values, "model and file")
    except ValueError as error:
        raise _unfit(path.parent, str(error)) from error
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def _check_seal(folder: Path, note: Mapping[str, Any]) -> None:
    for name, wanted in note.get("sha256", {}).items():
        path = folder / Path(name).name
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
            raise _refused(folder, f"{name} is not the file that was written: its SHA-256 differs")


def _check_config(folder: Path, config: peft.PeftConfig) -> None:
    """Raises FedpeftError where the folder's configuration means another adapter than this."""
    found, own = _json(folder / _CONFIG, folder), _plain(config.to_dict())
    kind = found.get("peft_type")
    if kind != own["peft_type"]:
        raise _refused(folder, f"{_CONFIG}: peft_type is {kind!r}, the recipe's adapter is another")
    for name, value in found.items():
        if name not in own:
            raise _refused(folder, f"{_CONFIG}: field {name[:40]!r} is unknown to this peft")
        free = name in _FREE or name.startswith("init_") or "dropout" in name
        if not free and _sorted(value) != _sorted(own[name]):
            raise _unfit(
                folder, f"{_CONFIG}: {name} is {str(value)[:80]}, here it is {str(own[name])[:80]}"
            )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As it would be read back from JSON."""
    found: dict[str, Any] = json.loads(json.dumps(values, default=list))
    return found


def _sorted(value: Any) -> Any:
    """Lists of names are sets to peft."""
    names = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return sorted(set(value)) if names else value


def _tensors(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file. Raises FedpeftError for those that are not of the kind of ``own``."""
    if not path.is_file():
        raise _refused(path.parent, f"there is no {path.name}, and no other format is read")
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _refused(path.parent, f"{path.name} cannot be read: {error}") from None
    for name, value in found.items():
        like = own[name].dtype if name in own else torch.float32
        if value.dtype != like and not {value.dtype, like} <= _FLOATS:
            raise _refused(path.parent, f"{path.name}: {name!r} has dtype {value.dtype}")
        if not bool(torch.isfinite(value).all()):
            raise _refused(path.parent, f"{path.name}: NaN or Inf in {name!r}")
    return found


def _json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _refused(folder, f"{path.name} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise _refused(folder, f"{path.name} is no JSON object")
    return found


def _refused(folder: Path, why: str) -> FedpeftError:
    return FedpeftError(
        f"adapter.start={str(folder)!r}: {why}. Give a whole folder written by peft or by a "
        f"fedpeft run (RUN/adapter)."
    )


def _unfit(folder: Path, why: str) -> FedpeftError:
    return FedpeftError(
        f"adapter.start={str(folder)!r} does not fit this model and adapter: {why}. Use the "
        f"adapter settings it was trained with."
    )
