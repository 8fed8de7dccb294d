"""The model of a workload: random weights of a known shape, LoRA, for a BERT a trained head."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.workload import CLASSES, SEED, Workload


class TokenZeroClassifier(nn.Module):
    """A BERT without pooler and a linear head on the first token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, CLASSES)

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
        """Logits ``[N, 4]``; the arguments that peft passes along are taken and unused."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return SequenceClassifierOutput(logits=self.classifier(hidden[:, 0]))


def build_base(workload: Workload) -> nn.Module:
    """The base model alone, on torch's current default device, float32."""
    torch.manual_seed(SEED)
    if workload.base == "bert":
        return TokenZeroClassifier(
            BertConfig(
                vocab_size=workload.vocabulary,
                hidden_size=workload.hidden,
                num_hidden_layers=workload.layers,
                num_attention_heads=workload.heads,
                intermediate_size=workload.feed_forward,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
    config = LlamaConfig(
        vocab_size=workload.vocabulary,
        hidden_size=workload.hidden,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads,
        num_key_value_heads=workload.kv_heads,
        intermediate_size=workload.feed_forward,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def build_model(workload: Workload) -> Any:
    """The peft model on the workload's device: LoRA, and the trained head of a classifier."""
    with torch.device(workload.device):
        base = build_base(workload)
    lora = peft.LoraConfig(
        r=workload.rank,
        lora_alpha=2 * workload.rank,
        target_modules=list(workload.targets),
        task_type="SEQ_CLS" if workload.task == "classification" else "CAUSAL_LM",
    )
    model = peft.get_peft_model(base, lora)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    hold_base(model, torch.bfloat16 if workload.precision == "bf16" else torch.float32)
    return model.to(workload.device)


def hold_base(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the frozen parameters in place."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def precision(workload: Workload) -> AbstractContextManager[object]:
    """The workload's autocast."""
    if workload.precision == "fp32":
        return nullcontext()
    return torch.autocast(workload.device, dtype=torch.bfloat16)


def mean_loss(workload: Workload, model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a batch: of its texts, or of the tokens that are predicted."""
    with precision(workload):
        logits = model(input_ids=tokens).logits
    if workload.task == "classification":
        return cross_entropy(logits.float(), labels)
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())
