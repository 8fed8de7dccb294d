"""A frozen base model by transformers with an adapter by peft, seen as a tree of trainable tensors.

What travels between server and clients are the raw trainable parameters under their own names;
``save_adapter`` writes peft's format, for export only. Weights are safetensors, remote code is
never run.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput

from fedpeft import quantize, streams, tree, tuners, whole
from fedpeft.config import Model
from fedpeft.data.clients import Task
from fedpeft.errors import FedpeftError, suggest
from fedpeft.manifest import seal, verify
from fedpeft.start import NOTE, RAW, load_start
from fedpeft.tree import Layout, Tree

BUILT_IN = {"classification": "tiny-encoder", "causal_lm": "tiny-decoder"}
"""The folder under ``fedpeft/models`` that ``fedpeft-tiny`` stands for, by task."""


class MeanPoolClassifier(nn.Module):
    """An encoder, the mean of its token vectors over the mask, and a linear head ``classifier``."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        config: Any = encoder.config
        self.config = config
        self.encoder = encoder
        self.classifier = nn.Linear(int(config.hidden_size), classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Logits ``[N, classes]``; the arguments that peft passes along are taken and unused."""
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds
        ).last_hidden_state
        if attention_mask is None:
            pooled = hidden.mean(1)
        else:
            weight = attention_mask.to(hidden.dtype).unsqueeze(-1)
            pooled = (hidden * weight).sum(1) / weight.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(pooled))


def model_path(model: Model, task: Task) -> str:
    """The folder or hub id behind a model name."""
    if model.name == "fedpeft-tiny":
        return str(resources.files("fedpeft") / "models" / BUILT_IN[task])
    return model.name


def _explain(model: Model, error: Exception) -> FedpeftError:
    reason = str(error).strip().split("\n")[0]
    return FedpeftError(
        f"model.name={model.name!r} could not be loaded: {reason} Give 'fedpeft-tiny' (built in), "
        f"an existing local folder, or a Hugging Face id that is cached or reachable."
    )


def load_tokenizer(model: Model, task: Task) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises FedpeftError if it cannot be found."""
    try:
        found = AutoTokenizer.from_pretrained(
            model_path(model, task), revision=model.revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _explain(model, error) from error
    assert isinstance(found, PreTrainedTokenizerBase)
    return found


def _auto_class(task: Task, pooling: str) -> Any:
    if task == "causal_lm":
        return transformers.AutoModelForCausalLM
    return AutoModel if pooling == "mean" else transformers.AutoModelForSequenceClassification


def load_base(
    model: Model,
    task: Task,
    classes: int,
    pad: int,
    seed: int,
    device: torch.device | None = None,
) -> nn.Module:
    """The base model in float32 and eval mode; a new head is initialised from the seed.

    classes: labels of a classifier (ignored for language modelling). pad: the padding token, which
    decoders need to find the end of a text. device: where ``model.quantize`` puts the model
    (default: the CPU); its linear layers are quantised, the rest is float32.
    """
    place = device or torch.device("cpu")
    if model.quantize != "none":
        quantize.check(model, place)
    path, auto = model_path(model, task), _auto_class(task, model.pooling)
    verify(Path(path), "model.name")
    head = {"num_labels": classes} if task == "classification" and model.pooling != "mean" else {}
    revision = model.revision or "main"
    with torch.random.fork_rng():
        torch.manual_seed(streams.derive(seed, "model"))
        try:
            config = AutoConfig.from_pretrained(
                path, revision=revision, trust_remote_code=False, **head
            )
            config.pad_token_id = pad
            if model.random:
                base = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
            else:
                base = auto.from_pretrained(
                    path,
                    config=config,
                    revision=revision,
                    dtype=torch.float32,
                    use_safetensors=True,
                    trust_remote_code=False,
                    **quantize.load_arguments(model, auto, config, place),
                )
        except (OSError, ValueError) as error:
            raise _explain(model, error) from error
        if model.pooling == "mean" and task == "classification":
            base = MeanPoolClassifier(base, classes)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    assert isinstance(base, nn.Module)
    quantize.use_dequantised(base)
    return base.eval()


def adapter_kinds() -> dict[str, type[peft.PeftConfig]]:
    """Adapter kinds of the installed peft: ``lora``, ``ia3``, ... -> configuration class."""
    return {kind.value.lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def adapter_config(settings: Mapping[str, Any], task: Task) -> peft.PeftConfig:
    """peft's configuration from a recipe's ``adapter`` block, every key checked by name."""
    kinds = adapter_kinds()
    kind = str(settings.get("kind", "lora")).lower()
    if kind not in kinds:
        every = [*kinds, whole.KIND]
        raise FedpeftError(f"adapter.kind={kind!r} does not exist. {suggest(kind, every)}")
    own = {key: value for key, value in settings.items() if key not in ("kind", "start", "head")}
    if settings.get("head", "trained") not in ("trained", "frozen"):
        raise FedpeftError(
            f"adapter.head={settings['head']!r}: must be trained, or frozen as the seed drew it."
        )
    known = set(inspect.signature(kinds[kind]).parameters)
    for key in own:
        if key not in known:
            raise FedpeftError(
                f"adapter.{key} is not a setting of {kinds[kind].__name__}. {suggest(key, known)}"
            )
    tuners.check_start(own)
    own["task_type"] = "SEQ_CLS" if task == "classification" else "CAUSAL_LM"
    try:
        return kinds[kind](**own)
    except (ImportError, TypeError, ValueError) as error:
        raise FedpeftError(f"adapter {dict(settings)!r} is refused by peft: {error}") from error


def attach(base: nn.Module, settings: Mapping[str, Any], task: Task, seed: int) -> nn.Module:
    """Wraps ``base`` with the adapter, initialised from the seed; ``full`` leaves it as it is.

    ``settings["head"]`` says whether a classifier's new head is ``trained``, the default, or
    ``frozen`` as the seed drew it, the same for everybody. Raises FedpeftError when the base has
    none of the target modules.
    """
    if settings.get("kind") == whole.KIND:
        return whole.free(base, settings)
    config = adapter_config(settings, task)
    tuners.note_limits(config)
    if config.peft_type == peft.PeftType.XLORA:
        base.config.use_cache = False  # type: ignore[union-attr]
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft 0.21 still asks transformers by a name that it renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        torch.manual_seed(streams.derive(seed, "adapter"))
        try:
            model = peft.get_peft_model(base, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            leaves = {
                name.rsplit(".", 1)[-1]
                for name, module in base.named_modules()
                if isinstance(module, nn.Linear)
            }
            raise FedpeftError(
                f"adapter {settings.get('kind', 'lora')!r} does not fit the model: {error} "
                f"adapter.target_modules must name modules of the model; it has the linear modules "
                f"{', '.join(sorted(leaves)) or '(none)'}."
            ) from error
    if settings.get("head", "trained") == "frozen":
        _freeze_head(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    tuners.answer_task(model)
    return model


def _freeze_head(model: nn.Module) -> None:
    heads = [own for name, own in model.named_parameters() if ".modules_to_save." in name]
    if not heads:
        raise FedpeftError(
            "adapter.head=frozen, but peft trains no head beside this adapter: leave it out."
        )
    for parameter in heads:
        parameter.requires_grad_(False)


def set_mode(model: nn.Module, training: bool, base_dropout: bool) -> None:
    """Adapters' dropout follows ``training``; the frozen base's only with ``base_dropout``.

    Blocks that recompute their activations do so only in training.
    """
    model.train(training and base_dropout)
    for module in model.modules():
        if isinstance(module, tuners.ADAPTERS):
            module.train(training)
        elif isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = training  # its own flag: the dropout below it is the base's


def base_digest(model: nn.Module) -> str:
    """A short hash of the frozen base: names, shapes, 64 evenly spaced values of each tensor.

    Of quantised weights: 64 codes and all scales. Of a model without an adapter: all of it.
    """
    digest, adapted = hashlib.sha256(), isinstance(model, peft.PeftModel)
    for name, value in sorted(model.named_parameters()):
        if (adapted and value.requires_grad) or ".original_module." in name:
            continue
        digest.update(f"{name}{tuple(value.shape)}".encode())
        flat = value.detach().flatten()
        at = torch.linspace(0, len(flat) - 1, min(64, len(flat)), device=flat.device)
        at = at.long().clamp(max=len(flat) - 1)  # float32 rounds up beyond 2 ** 24
        digest.update(flat[at].float().cpu().numpy().tobytes())
        scales = quantize.statistics(value)
        if scales is not None:
            digest.update(scales.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def kind_of(name: str) -> str:
    """What a tensor is, for the byte ledger: ``head``, ``base`` (a change of it) or ``adapter``."""
    if name.rpartition(".")[2].startswith("fold_"):
        return "base"
    return "head" if ".modules_to_save." in name else "adapter"


@dataclass(frozen=True)
class Network:
    """A model with its adapter, and what the rest of fedpeft needs to know of it.

    initial: every trainable tensor as initialised, float32, on the CPU. scaling: LoRA layer ->
    alpha / r (or its variant), empty for other adapters. digest: of the frozen base.
    """

    model: nn.Module
    task: Task
    classes: int
    initial: Tree
    layout: Layout
    scaling: Mapping[str, float]
    digest: str
    device: torch.device

    def write(self, values: Tree) -> None:
        """Copies a tree of (some) trainable tensors into the model's own parameters."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)


def build_network(
    model: nn.Module, task: Task, classes: int, device: torch.device, start: str | None = None
) -> Network:
    """The network around a model with an adapter; ``start`` is an adapter folder to begin from."""
    digest = base_digest(model)
    if start is not None:
        load_start(model, start, digest)
    initial = tree.sort(
        {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
    )
    scaling = {
        name: float(module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and "default" in module.scaling
    }
    model.to(device)
    return Network(model, task, classes, initial, Layout.of(initial), scaling, digest, device)


def save_adapter(network: Network, values: Tree, folder: Path, base_name: str) -> None:
    """Writes a complete adapter in the format that ``peft.PeftModel.from_pretrained`` loads.

    Beside peft's files ``fedpeft.json`` names the base model's digest, ``fedpeft-manifest.json``
    the SHA-256 of every file. Where peft's file is not enough to go on training from, the trainable
    tensors lie in ``trainable.safetensors``; where peft would load another model than this, a
    warning says so. Without an adapter it is the model.
    """
    tree.check_same(network.initial, {n: v.cpu() for n, v in values.items()}, "the adapter")
    network.write(values)
    model = network.model
    if isinstance(model, peft.PeftModel):
        model.peft_config["default"].base_model_name_or_path = base_name
        model.save_pretrained(str(folder), save_embedding_layers=False)
        tuners.note_export(model.active_peft_config)
        if tuners.keeps_less(model.active_peft_config):
            save_file({n: v.cpu().contiguous() for n, v in values.items()}, folder / RAW)
    else:
        whole.save(model, folder)
    note = {"base_digest": network.digest, "base_model": base_name, "task": network.task}
    (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n")
    seal(folder)
