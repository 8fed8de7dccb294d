"""A client's pruned model on its own: adapter merged, groups cut out, as a transformers checkpoint.

Where transformers' configuration can say what is left, ``from_pretrained`` loads the folder as any
other: channels of every family, if all blocks keep as many, and heads of Llama, which has a size of
heads apart from the hidden size. (Llama's configuration refuses numbers of heads that do not divide
the hidden size; then the same weights are written as Mistral's without a sliding window, which
computes the same.) BERT and RoBERTa derive the size of a head from their number, so with fewer
heads no configuration of theirs fits: then the weights are the smaller model's, the configuration
the whole one's, ``pruned.json`` says what was cut, and ``load`` reads it. ``from_pretrained``
refuses such a folder, it does not load another model.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from fedpeft import whole
from fedpeft.errors import FedpeftError
from fedpeft.model import Network
from fedpeft.pruning.anatomy import structure_of
from fedpeft.pruning.slicing import slice_model
from fedpeft.pruning.structure import Part
from fedpeft.tree import Tree

log = logging.getLogger(__name__)

NOTE = "pruned.json"
"""Part -> groups that are left, where the configuration cannot say it."""

WEIGHTS = "model.safetensors"
"""Where transformers writes them."""


def smaller(network: Network, adapter: Tree, alive: Tree) -> nn.Module:
    """A copy of the model with ``adapter`` merged, without what ``alive`` (by part) lacks.

    adapter: every trainable tensor. alive: part -> bool ``[G]``, as by ``Cohort.structure``.
    Raises FedpeftError where the adapter cannot be merged, or the model not be cut.
    """
    parts = structure_of(network.model, {}).parts
    if not isinstance(network.model, PeftModel):
        raise FedpeftError(
            "a pruned model is made of LoRA on a frozen base: set adapter.kind=lora."
        )
    network.write(adapter)
    merged: Any = copy.deepcopy(network.model).merge_and_unload()
    merged.eval().requires_grad_(False)
    own = structure_of(merged, {}).parts
    slice_model(merged, own, {p.name: alive[q.name] for p, q in zip(own, parts, strict=True)})
    assert isinstance(merged, nn.Module)
    return merged


def save(model: nn.Module, folder: Path) -> None:
    """Writes a model of ``smaller``, or one that is whole, to be loaded by ``load``."""
    bare = model if isinstance(model, PreTrainedModel) else model.get_submodule("encoder")
    assert isinstance(bare, PreTrainedModel)
    parts = structure_of(bare, {}).parts
    fitting = _fitting(bare, parts)
    if fitting is None:
        whole.save(model, folder)
        note = json.dumps({p.name: p.groups for p in parts}, indent=2)
        (folder / NOTE).write_text(note + "\n")
        log.info("%s: only fedpeft.pruned.load can read it, %s says why", folder, NOTE)
    elif bare is model:
        whole.save(fitting, folder)
    else:
        model.encoder = fitting
        whole.save(model, folder)


def load(folder: Path) -> PreTrainedModel:
    """The model, or the encoder, that ``save`` wrote, in eval mode.

    Raises FedpeftError for a folder without one.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FedpeftError(f"{folder} holds no model: {error}") from error
    name = str((config.architectures or [""])[0])
    kind: Any = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise FedpeftError(
            f"{folder}: config.json names the class {name!r}, no transformers model."
        )
    note = folder / NOTE
    if not note.is_file():
        found = kind.from_pretrained(str(folder), use_safetensors=True, trust_remote_code=False)
        return _ready(found)
    model: Any = kind(config)
    parts = structure_of(model, {}).parts
    counts = _counts(note, parts)
    first = {p.name: torch.arange(p.groups) < counts[p.name] for p in parts}
    slice_model(model, parts, first)
    missing, unknown = model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    model.tie_weights()
    tied = set(model.all_tied_weights_keys)
    if unknown or set(missing) - tied:
        raise FedpeftError(f"{folder}: {WEIGHTS} and {NOTE} are not of one model: {unknown[:3]}")
    return _ready(model)


def _ready(model: Any) -> PreTrainedModel:
    model.eval().requires_grad_(False)
    assert isinstance(model, PreTrainedModel)
    return model


def _counts(note: Path, parts: tuple[Part, ...]) -> Mapping[str, int]:
    counts: Mapping[str, int] = json.loads(note.read_text())
    wanted = {p.name: p.groups for p in parts}
    fine = isinstance(counts, dict) and counts.keys() == wanted.keys()
    if not fine or not all(type(n) is int and 1 <= n <= wanted[p] for p, n in counts.items()):
        raise FedpeftError(f"{note} does not give each part of the model its number of groups.")
    return counts


def _fitting(model: PreTrainedModel, parts: tuple[Part, ...]) -> PreTrainedModel | None:
    """The model with a configuration that says its sizes; None if there is none."""
    config: Any = model.config
    counts = {kind: {p.groups for p in parts if p.kind == kind} for kind in ("heads", "channels")}
    if any(len(own) > 1 for own in counts.values()):
        return None
    (heads,), (channels,) = counts.values()
    if config.model_type in ("bert", "roberta"):
        if heads != config.num_attention_heads:
            return None
        config.intermediate_size = channels
        return model
    each = config.num_attention_heads // config.num_key_value_heads
    sizes = {
        "num_attention_heads": heads * each,
        "num_key_value_heads": heads,
        "intermediate_size": channels,
        "head_dim": config.head_dim,
    }
    if config.model_type == "mistral" or config.hidden_size % (heads * each) == 0:
        for name, size in sizes.items():
            setattr(config, name, size)
        return model
    if config.attention_bias or config.mlp_bias:
        return None
    return _as_mistral(model, sizes)


def _as_mistral(model: PreTrainedModel, sizes: Mapping[str, int]) -> PreTrainedModel:
    """The same weights in the class of Mistral's that stands where the model's class does."""
    known: Any = model.config.to_dict()
    foreign = ("model_type", "architectures", "attention_bias", "mlp_bias", "pretrained_tp")
    known = {name: value for name, value in known.items() if name not in foreign}
    config = transformers.MistralConfig(**{**known, **sizes, "sliding_window": None})
    kind: Any = getattr(transformers, type(model).__name__.replace("Llama", "Mistral"))
    with torch.random.fork_rng():
        found = kind(config)
    found.load_state_dict(model.state_dict())
    return _ready(found)
