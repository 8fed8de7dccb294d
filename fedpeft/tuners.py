"""What single tuners of peft need, or lack here, beyond ``peft.get_peft_model``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, PrefixTuningConfig
from peft.tuners.tuners_utils import BasePromptEncoder, BaseTunerLayer
from peft.tuners.xlora.classifier import XLoraClassifier
from torch import nn

from fedpeft.errors import FedpeftError

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


def check_start(settings: Mapping[str, Any]) -> None:
    """Raises FedpeftError for settings that nothing here could carry out.

    Without this, peft would quietly train LoRA from its random start instead of EVA or LoRA-GA.
    """
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
