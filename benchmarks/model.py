"""The model of a workload: a BERT of random weights, LoRA on query and value, a trained head."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.workload import CLASSES, SEED, VOCABULARY, Workload


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


def build_model(workload: Workload) -> Any:
    """The peft model: LoRA r 8, alpha 16 on query and value, and the trained head."""
    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=workload.hidden,
        num_hidden_layers=workload.layers,
        num_attention_heads=4,
        intermediate_size=workload.feed_forward,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    lora = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    return peft.get_peft_model(TokenZeroClassifier(config), lora)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
