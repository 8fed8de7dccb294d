"""The prunable parts of transformers' models: BERT, RoBERTa, Llama, Mistral and GPT-2.

Read from the modules themselves, by the class of a block. Embeddings, norms, heads of tasks and the
hidden size are never pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedpeft.errors import FedpeftError
from fedpeft.fleet.flops import token_weights
from fedpeft.pruning.structure import Member, Part, Structure

Reader = Callable[[nn.Module, str], tuple[Part, Part]]


def structure_of(model: nn.Module, scaling: Mapping[str, float]) -> Structure:
    """The structure of a model with or without LoRA; scaling: its LoRA layers' s.

    Raises FedpeftError for a model without blocks that are known here.
    """
    parts: list[Part] = []
    for name, module in model.named_modules():
        reader = READERS.get(type(module).__name__)
        if reader is not None:
            parts.extend(reader(model, name))
    if not parts:
        config = getattr(model, "config", None)
        raise FedpeftError(
            f"pruning knows the blocks of {', '.join(READERS)}, and model.name="
            f"{getattr(config, 'model_type', type(model).__name__)} has none of them: choose "
            f"another model, or a strategy that does not prune."
        )
    weights = token_weights(model)
    return Structure(tuple(parts), scaling, lambda layer: weight_of(model, layer), weights)


def weight_of(model: nn.Module, layer: str) -> Tensor:
    """The frozen weight of a linear layer as ``[d_out, d_in]``: a view, not a copy.

    Raises FedpeftError where it is not held as a matrix of floating point numbers.
    """
    found = inner(model.get_submodule(layer))
    weight = found.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise FedpeftError(
            f"pruning reads the weight of {layer!r}, which is quantised: set model.quantize=none."
        )
    return weight.detach().mT if isinstance(found, Conv1D) else weight.detach()


def inner(module: nn.Module) -> nn.Module:
    """The layer itself, below its LoRA."""
    found = module.get_base_layer() if isinstance(module, LoraLayer) else module
    assert isinstance(found, nn.Module)
    return found


def _part(
    model: nn.Module,
    name: str,
    groups: int,
    members: tuple[Member, ...],
    gate: Member | None = None,
) -> Part:
    """name: of the block, a dot, and the kind. gate: the last member but one, if not said."""
    weights = 0
    for member in members:
        rows, columns = weight_of(model, member.layer).shape
        weights += member.width * int(columns if member.side == "rows" else rows)
    kind: Literal["heads", "channels"] = "heads" if name.endswith(".heads") else "channels"
    return Part(name, kind, groups, members, gate or members[-2], weights)


def _bert(model: nn.Module, name: str) -> tuple[Part, Part]:
    attention = model.get_submodule(f"{name}.attention.self")
    heads, size = attention.num_attention_heads, attention.attention_head_size
    assert isinstance(heads, int) and isinstance(size, int)
    at = f"{name}.attention"
    rows = tuple(Member(f"{at}.self.{x}", "rows", size) for x in ("query", "key", "value"))
    columns = Member(f"{at}.output.dense", "columns", size)
    up, down = f"{name}.intermediate", f"{name}.output.dense"
    ffn = (Member(f"{up}.dense", "rows", 1), Member(down, "columns", 1))
    channels = len(weight_of(model, f"{up}.dense"))
    return (
        _part(model, f"{name}.heads", heads, (*rows, columns)),
        _part(model, f"{name}.channels", channels, ffn, Member(up, "rows", 1)),
    )


def _llama(model: nn.Module, name: str) -> tuple[Part, Part]:
    at, ffn = f"{name}.self_attn", f"{name}.mlp"
    size = model.get_submodule(at).head_dim
    assert isinstance(size, int)
    groups = len(weight_of(model, f"{at}.k_proj")) // size
    wide = len(weight_of(model, f"{at}.q_proj")) // groups
    heads = (
        Member(f"{at}.q_proj", "rows", wide),
        Member(f"{at}.k_proj", "rows", size),
        Member(f"{at}.v_proj", "rows", size),
        Member(f"{at}.o_proj", "columns", wide),
    )
    channels = (
        Member(f"{ffn}.gate_proj", "rows", 1),
        Member(f"{ffn}.up_proj", "rows", 1),
        Member(f"{ffn}.down_proj", "columns", 1),
    )
    count = len(weight_of(model, f"{ffn}.up_proj"))
    return (
        _part(model, f"{name}.heads", groups, heads),
        _part(model, f"{name}.channels", count, channels),
    )


def _gpt2(model: nn.Module, name: str) -> tuple[Part, Part]:
    at, ffn = f"{name}.attn", f"{name}.mlp"
    attention = model.get_submodule(at)
    heads, size, width = attention.num_heads, attention.head_dim, attention.embed_dim
    assert isinstance(heads, int) and isinstance(size, int) and isinstance(width, int)
    rows = tuple(Member(f"{at}.c_attn", "rows", size, k * width) for k in range(3))
    columns = Member(f"{at}.c_proj", "columns", size)
    channels = (Member(f"{ffn}.c_fc", "rows", 1), Member(f"{ffn}.c_proj", "columns", 1))
    count = len(weight_of(model, f"{ffn}.c_fc"))
    return (
        _part(model, f"{name}.heads", heads, (*rows, columns)),
        _part(model, f"{name}.channels", count, channels, Member(f"{ffn}.act", "rows", 1)),
    )


READERS: dict[str, Reader] = {
    "BertLayer": _bert,
    "RobertaLayer": _bert,
    "LlamaDecoderLayer": _llama,
    "MistralDecoderLayer": _llama,
    "GPT2Block": _gpt2,
}
"""Class of a block -> what reads its parts."""
