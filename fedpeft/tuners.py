"""What single tuners of peft need, or lack here, beyond ``peft.get_peft_model``."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, PrefixTuningConfig
from peft.tuners.tuners_utils import BasePromptEncoder, BaseTunerLayer
from peft.tuners.xlora.classifier import XLoraClassifier
from torch import nn

from fedpeft.errors import FedpeftError
from fedpeft.manifest import read_json, verify

log = logging.getLogger(__name__)

PREPARED = {
    "eva": "the activations of a data set",
    "lora_ga": "the first gradient on a data set",
    "corda": "the activations of a data set",
    "loftq": "a quantised base model",
}
"""Initialisations of LoRA by prefix, and what has to be computed for them before attaching."""

ADAPTERS = (BaseTunerLayer, BasePromptEncoder, XLoraClassifier)
"""Modules of peft whose dropout belongs to the adapter."""

PROMPT_KEYS = {"prompt_embeddings", "prefix_task_cols", "prefix_task_rows"}
"""Names in peft's files of prompt learning, which are no names of the model's tensors."""

MULTITASK = (PeftType.POLY, PeftType.MULTITASK_PROMPT_TUNING)
"""Tuners whose forward asks which task a row belongs to."""


NAMES = {
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "feedforward_modules",
    "target_parameters",
    "trainable_token_indices",
    "layers_pattern",
}
"""Settings whose texts peft compiles or matches as names of modules; so are ``*_pattern``."""

REMOTE = {"auto_mapping", "megatron_config", "megatron_core", "parent_library"}
"""Settings that name what is imported."""

RANKS = {"r", "init_r", "target_r", "num_virtual_tokens"}
MAX_RANK = 65536

_DEFAULTS = {"megatron_core": "megatron.core"}
_EXPERT = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_NAME = re.compile(r"[\w.-]{1,200}", re.ASCII)


def check_start(settings: Mapping[str, Any]) -> None:
    """Raises FedpeftError for settings that nothing here could carry out.

    Without this, peft would quietly train LoRA from its random start instead of EVA or LoRA-GA.
    """
    check_names(settings)
    init = str(settings.get("init_lora_weights", "")).lower()
    for prefix, needed in PREPARED.items():
        if init.startswith(prefix):
            raise FedpeftError(
                f"adapter.init_lora_weights={init!r} needs {needed} before the adapter is "
                f"attached, which a recipe cannot give. Use one that needs no more than the base "
                f"weights: true, 'gaussian', 'orthogonal', 'olora', 'pissa' or 'mica'."
            )
    if settings.get("use_asa"):
        raise FedpeftError(
            "adapter.use_asa=true is not available: every client would keep other subspaces, which "
            "cannot be averaged. Set adapter.use_asa=false."
        )


def check_names(settings: Mapping[str, Any], where: str = "adapter") -> None:
    """Raises FedpeftError for settings by which peft would run more than the adapter's own code.

    peft compiles names of modules as regular expressions (one can be made to run for years), some
    settings import a module or change the class of the model, and a rank is allocated before it is
    found not to fit.
    """
    _check_experts(settings.get("adapters"))
    for key in sorted(REMOTE & settings.keys()):
        if settings[key] is None or settings[key] == _DEFAULTS.get(key):
            continue
        raise FedpeftError(
            f"{where}.{key}={settings[key]!r}: peft would import what it names, which a recipe "
            f"cannot ask for. Leave it out."
        )
    for key, value in settings.items():
        if key in NAMES or key.endswith("_pattern"):
            for name in _texts(value):
                if not _NAME.fullmatch(name):
                    raise FedpeftError(
                        f"{where}.{key}: {name[:60]!r} must be the name of a module (letters, "
                        f"digits, '_', '-' and '.'), or all-linear: regular expressions are not "
                        f"compiled. List the names."
                    )
        for rank in _numbers(value) if key in RANKS or key == "rank_pattern" else ():
            if rank > MAX_RANK:
                raise FedpeftError(f"{where}.{key}={rank} must be at most {MAX_RANK}.")


def _check_experts(experts: object) -> None:
    """Raises FedpeftError for experts that X-LoRA may not have.

    peft makes folders by their names, and builds what their own configurations say.
    """
    for name, folder in experts.items() if isinstance(experts, Mapping) else ():
        what = f"adapter.adapters.{str(name)[:60]}"
        if not _EXPERT.fullmatch(str(name)):
            raise FedpeftError(f"{what!r}: a name is 1 to 64 letters, digits, '_' or '-'.")
        if Path(str(folder)).is_dir():
            verify(Path(str(folder)), what)
            check_names(read_json(Path(str(folder)), "adapter_config.json", what), what)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | Sequence):
        for below in value:
            yield from _texts(below)


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, Mapping):
        for below in value.values():
            yield from _numbers(below)


def note_limits(config: PeftConfig) -> None:
    """Logs a warning where a tuner trains without a part of its method."""
    kind, own = config.peft_type, vars(config)
    if kind == PeftType.ADALORA:
        log.warning(
            "adapter adalora: all ranks stay at init_r=%s; target_r and its schedule are not used, "
            "since every client would prune other ranks",
            own["init_r"],
        )
    if kind == PeftType.SHADOW and own["auxiliary_loss_weight"] > 0:
        log.warning("adapter shadow: trains without its auxiliary loss (auxiliary_loss_weight)")
    if kind == PeftType.CPT and own["opt_weighted_loss_type"] != "none":
        log.warning("adapter cpt: trains on the plain loss (opt_weighted_loss_type)")


def keeps_less(config: PeftConfig) -> bool:
    """Whether peft's file holds less than the trainable tensors, so that training cannot go on.

    P-tuning and projected prefixes keep the prompt that their encoder makes, not the encoder; from
    X-LoRA's router, peft 0.21 drops the tensors whose names contain an expert's number.
    """
    kind = config.peft_type
    return kind in (PeftType.P_TUNING, PeftType.XLORA) or (
        isinstance(config, PrefixTuningConfig) and config.prefix_projection
    )


def note_export(config: PeftConfig) -> None:
    """Logs a warning where ``PeftModel.from_pretrained`` gives another model than the saved one."""
    if config.peft_type == PeftType.XLORA:
        log.warning(
            "adapter xlora: peft saves no router and loads a new one; adapter.start restores it"
        )
    if str(vars(config).get("init_lora_weights", "")).startswith("pissa_niter"):
        log.warning(
            "adapter lora: init_lora_weights=pissa_niter draws its base residual at random, so "
            "peft loads this adapter onto another base; adapter.start with the same recipe does not"
        )


def answer_task(model: PeftModel) -> None:
    """Makes a multi-task tuner see task 0 in every row: a federation has one task."""
    if model.active_peft_config.peft_type in MULTITASK:
        model.register_forward_pre_hook(_first_task, with_kwargs=True)


def _first_task(
    module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    tokens = named["input_ids"]
    task = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    return args, {**named, "task_ids": task}
