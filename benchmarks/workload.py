"""The two workloads: data, model, initial values and batch order, the same for every way.

Each client's batches of a round follow ``fedpeft.local.batch_plan``; everything else is drawn once
with NumPy's or torch's generator, seed 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput

from fedpeft.config import Local
from fedpeft.local import batch_plan

SEED = 0
CLASSES = 4
VOCABULARY = 8192


@dataclass(frozen=True)
class Workload:
    """One client: ``examples`` texts of ``tokens`` tokens, ``batch`` per step, one pass per round.

    The base is BERT-shaped with ``layers`` layers of width ``hidden``. There are ``population``
    clients; round r trains the ``cohort`` clients that follow those of the round before.
    """

    name: str
    hidden: int
    feed_forward: int
    examples: int
    tokens: int
    batch: int
    layers: int = 4
    cohort: int = 32
    population: int = 96

    @property
    def local(self) -> Local:
        """SGD 0.05, one pass, no shuffling beyond the batch plan."""
        return Local(optimizer="sgd", lr=0.05, epochs=1, batch_size=self.batch)

    @property
    def tokens_per_round(self) -> int:
        """Tokens that all clients of a round train on."""
        return self.cohort * self.examples * self.tokens


WORKLOADS = {
    w.name: w
    for w in (
        Workload("A", hidden=256, feed_forward=1024, examples=64, tokens=32, batch=8),
        Workload("B", hidden=64, feed_forward=256, examples=8, tokens=8, batch=1),
        Workload("tiny", 16, 32, examples=6, tokens=5, batch=2, layers=1, cohort=3, population=6),
    )
}
"""A: bound by arithmetic. B: bound by overhead. tiny: for tests of the benchmark itself."""


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


@dataclass(frozen=True)
class Texts:
    """The population's data: client c owns rows ``c * examples`` to ``(c + 1) * examples - 1``.

    tokens: int64 ``[population * examples, tokens]``. labels: int64 ``[population * examples]``.
    """

    workload: Workload
    tokens: Tensor
    labels: Tensor

    @staticmethod
    def draw(workload: Workload) -> Texts:
        """The workload's data; two calls give the same."""
        stream = np.random.default_rng(SEED)
        rows = workload.population * workload.examples
        tokens = stream.integers(VOCABULARY, size=(rows, workload.tokens))
        labels = stream.integers(CLASSES, size=rows)
        return Texts(workload, torch.from_numpy(tokens), torch.from_numpy(labels))

    def rows(self, client: int) -> np.ndarray:
        """The row numbers of a client."""
        own = self.workload.examples
        return np.arange(client * own, (client + 1) * own)

    def order(self, client: int, round: int) -> Tensor:
        """A client's rows in the order of its batches: int64 ``[steps, batch]``."""
        rows, local = self.rows(client), self.workload.local
        plan = batch_plan(rows, local, SEED, client_name(client), round)
        assert plan.min() >= 0, "every batch is full"
        return torch.from_numpy(plan)


def client_name(client: int) -> str:
    """A client's stable name."""
    return f"client-{client:03d}"


def clients_of(workload: Workload, round: int) -> list[int]:
    """The clients of a round, which counts from 1."""
    first = (round - 1) * workload.cohort % workload.population
    return list(range(first, first + workload.cohort))
