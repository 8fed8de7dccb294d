"""Small random BERT and Llama with any adapter, their examples, and gradients by the plain loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedpeft.data.clients import Task
from fedpeft.data.examples import Examples, flatten
from fedpeft.model import Network, attach, build_network
from fedpeft.tree import Tree, row

WORDS = 61
CLASSES = 3
LORA: dict[str, Any] = {"kind": "lora", "r": 2, "lora_alpha": 8}


def base(task: Task) -> nn.Module:
    """Width 16, random weights, no dropout in either mode."""
    common = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "vocab_size": WORDS,
        "pad_token_id": 0,
        "num_hidden_layers": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if task == "classification":
            model: nn.Module = BertForSequenceClassification(
                BertConfig(
                    num_labels=CLASSES,
                    initializer_range=0.2,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                    **common,
                )
            )
        else:
            model = LlamaForCausalLM(
                LlamaConfig(num_key_value_heads=1, initializer_range=0.2, **common)
            )
    return model.eval().requires_grad_(False)


def network(task: Task, adapter: Mapping[str, Any] = LORA) -> Network:
    model = attach(base(task), adapter, task, 0)
    return build_network(model, task, CLASSES, torch.device("cpu"))


def examples(task: Task, count: int = 10) -> Examples:
    """Example i has 2 + i % 6 tokens; the last token of example i is 50 + i % 11, there only."""
    rows = [[1 + (7 * j + i) % 48 for j in range(1 + i % 6)] + [50 + i % 11] for i in range(count)]
    labels = [i % CLASSES for i in range(count)] if task == "classification" else None
    return flatten(rows, labels, 0)


def stacked(net: Network, clients: int = 3, spread: float = 0.1) -> Tree:
    """Different adapters for the clients, away from the start."""
    stream = torch.Generator().manual_seed(1)
    return {
        name: value + spread * torch.randn((clients, *value.shape), generator=stream)
        for name, value in net.initial.items()
    }


def loss(net: Network, data: Examples, number: int) -> Tensor:
    """One example's own loss by the plain model: no batch, no padding."""
    tokens = data.tokens[data.starts[number] : data.starts[number + 1]].long()[None]
    logits = net.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    if data.labels is not None:
        return cross_entropy(logits, data.labels[number : number + 1])
    return cross_entropy(logits[0, -tokens.shape[1] :][:-1], tokens[0, 1:])


def alone(net: Network, values: Tree, data: Examples, number: int) -> Tensor:
    """Its gradient at an adapter (unstacked), flat ``[P]`` in the order of names."""
    net.write(values)
    own = dict(net.model.named_parameters())
    found = torch.autograd.grad(
        loss(net, data, number), [own[n] for n in sorted(values)], allow_unused=True
    )
    flat = [
        torch.zeros(values[n].numel()) if g is None else g.flatten()
        for n, g in zip(sorted(values), found, strict=True)
    ]
    return torch.cat(flat)


def clipped(net: Network, values: Tree, data: Examples, numbers: list[int], c: float) -> Tensor:
    """The sum of a client's gradients, each clipped, one after another; ``values[name][k]``."""
    total = torch.zeros(sum(v.numel() for v in values.values()))
    for number in numbers:
        g = alone(net, values, data, number)
        total += g * min(1.0, c / max(float(g.norm()), 1e-30))
    return total


def sums(net: Network, values: Tree, data: Examples, index: Any, c: float) -> Tensor:
    """``clipped`` for each client: ``[K, P]``."""
    return torch.stack(
        [
            clipped(net, row(values, k), data, [int(i) for i in own if i >= 0], c)
            for k, own in enumerate(index)
        ]
    )


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
