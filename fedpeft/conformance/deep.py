"""The deep stage: the real engine on tiny random models; seconds where the toy takes milliseconds.

Every function here checks one property of a strategy; see ``finding.Property``.
"""

from __future__ import annotations

import hashlib
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from fedpeft import tree
from fedpeft.base import pretrained
from fedpeft.cohort.clients import Memory, RoundInfo, TorchCohort
from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import FoldLane, Lane, LoopLane
from fedpeft.cohort.shelf import Shelf
from fedpeft.config import Local
from fedpeft.conformance.finding import Property, require
from fedpeft.conformance.play import answered, require_close, sent_to
from fedpeft.data.clients import ClientData, Task
from fedpeft.data.examples import Examples, flatten
from fedpeft.local import Progress, Trainer
from fedpeft.model import Network, attach, build_network, set_mode
from fedpeft.pruning.anatomy import structure_of
from fedpeft.strategy import Messages, Problem, Strategy
from fedpeft.tree import Tree

SIZES = (5, 9, 3, 12)
WORDS, CLASSES, PAD, ROUNDS, SEED = 50, 3, 0, 2, 0
LOCAL = Local(optimizer="sgd", lr=0.2, batch_size=4)
WALK = Local(optimizer="sgd", lr=2e-3, batch_size=4, steps=3)

WIDE = 0.3
"""Standard deviation of the models' weights: at the usual 0.02 attention is flat, and its adapters
hardly move."""

LANES = 1e-4
"""How closely lanes agree, relative to a tensor: float32 sums in another order differ by 1e-6, and
a client half with an SVD enlarges that by its condition; rows that mix differ by 1e-1."""


class Federation:
    """Four unequal clients of random tokens on a tiny random model with LoRA (r = 2, s = 2)."""

    def __init__(
        self, task: Task, lane: type[Lane], pools: bool = False, walks: bool = False
    ) -> None:
        self.task, self.network = task, _network(task)
        self.local = WALK if walks else LOCAL
        self.examples = _examples(task)
        bounds = np.cumsum([0, sum(SIZES)] if pools else [0, *SIZES])
        none = np.zeros(0, dtype=np.int64)
        self.data = [
            ClientData(f"c{k}", np.arange(first, last, dtype=np.int64), none)
            for k, (first, last) in enumerate(pairwise(bounds))
        ]
        self.lane, self.memory = lane(self.network.model), dict[str, dict[str, Tree]]()
        self.shelf = Shelf()

    @property
    def problem(self) -> Problem:
        """What a strategy is told before round 1."""
        names = tuple(client.name for client in self.data)
        network, weight = self.network, partial(pretrained, self.network)

        def public() -> Tree:
            return {layer: weight(layer) for layer in network.scaling}

        known = network.initial, network.scaling, names, ROUNDS, SEED, weight, public
        structure = partial(structure_of, network.model, network.scaling)
        return Problem(*known, self.local.steps, self.local.lr, structure)

    def train(self, strategy: Strategy[Any], round: int, sent: Messages, size: int) -> Messages:
        """The clients' replies, trained in stacks of ``size``, at most 3 clients in flight."""
        set_mode(self.network.model, True, False)
        parts = [
            answered(strategy, part, self._cohort(round, part, min(3, size)))
            for part in sent.split(size)
        ]
        return Messages.stack(sent.clients, [part[k] for part in parts for k in range(len(part))])

    def _cohort(self, round: int, sent: Messages, width: int) -> TorchCohort:
        network, data = self.network, [c for c in self.data if c.name in sent.clients]
        weights = torch.tensor([len(c.train) for c in data], dtype=torch.float64)
        gradients = Gradients(self.lane, self.task, self.examples, self.local, network.device)
        info, kept = RoundInfo(Progress(round, ROUNDS), SEED), (self._own(sent), self.shelf)
        return TorchCohort(network, Trainer(gradients, width), data, info, weights, kept)

    def _own(self, sent: Messages) -> Memory:
        return {name: self.memory.setdefault(name, {}) for name in sent.clients}

    def frozen(self) -> str:
        """A hash of every frozen parameter and buffer of the model."""
        digest = hashlib.sha256()
        for name, value in self.network.model.state_dict().items():
            if name not in self.network.initial:
                digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
        return digest.hexdigest()


def _network(task: Task) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model: nn.Module = _encoder() if task == "classification" else _decoder()
    targets = ["query", "value"] if task == "classification" else ["c_attn"]
    settings = {"kind": "lora", "r": 2, "lora_alpha": 4, "target_modules": targets}
    if task == "causal_lm":
        settings["fan_in_fan_out"] = True
    adapted = attach(model.eval().requires_grad_(False), settings, task, SEED)
    return build_network(adapted, task, CLASSES, torch.device("cpu"))


def _encoder() -> nn.Module:
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=WIDE,
        pad_token_id=PAD,
    )
    config.num_labels = CLASSES
    return BertForSequenceClassification(config)


def _decoder() -> nn.Module:
    config = GPT2Config(
        vocab_size=WORDS,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=16,
        initializer_range=WIDE,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config)


def _examples(task: Task) -> Examples:
    stream, total = np.random.default_rng(SEED), sum(SIZES)
    rows = [stream.integers(1, WORDS, stream.integers(2, 9)).tolist() for _ in range(total)]
    labels = stream.integers(0, CLASSES, total).tolist() if task == "classification" else None
    return flatten(rows, labels, PAD)


def _batched_is_sequential(strategy: Strategy[Any], task: Task) -> str:
    lanes = FoldLane, LoopLane
    fold, loop = (Federation(task, lane, strategy.pools, strategy.walks) for lane in lanes)
    base = fold.frozen()
    state, most = strategy.init(loop.problem), 0.0
    tree.check_same(fold.network.initial, strategy.adapter(state), "the model and adapter(state)")
    for number in (n for n in range(1, ROUNDS + 1) for _ in range(strategy.exchanges)):
        replies = []
        for sent in sent_to(strategy, state, number, loop.problem.clients):
            one = fold.train(strategy, number, sent, len(sent))
            two = loop.train(strategy, number, sent, 1)
            for part, own in two.trees.items():
                what = f"round {number}, tree {part!r}, batched and one by one"
                most = max(most, require_close(one.trees[part], own, LANES, what))
            replies.append(two)
        for client, kept in loop.memory.items():
            for name, own in kept.items():
                what = f"round {number}, memory {name!r} of {client}, batched and one by one"
                most = max(most, require_close(fold.memory[client][name], own, LANES, what))
        state = strategy.receive(state, iter(replies))
        fold.memory = {c: dict(own) for c, own in loop.memory.items()}
        fold.shelf = Shelf.of(loop.shelf.memory())
    for federation in (fold, loop):
        require(federation.frozen() == base, "the frozen base model changed")
    return f"differs by {most:.0e}"


def batched_is_sequential_on_an_encoder(strategy: Strategy[Any]) -> str:
    """Clients of a tiny BERT that train in one batch reply as they do one by one, in 2 rounds.

    Within 1e-4 of each tensor, from the same messages and memory, three clients in flight of four;
    the frozen base keeps its bits.
    """
    return _batched_is_sequential(strategy, "classification")


def batched_is_sequential_on_conv1d(strategy: Strategy[Any]) -> str:
    """The same on a tiny GPT-2, whose layers store their weight as ``[d_in, d_out]`` (Conv1D)."""
    return _batched_is_sequential(strategy, "causal_lm")


PROPERTIES: tuple[Property, ...] = (
    batched_is_sequential_on_an_encoder,
    batched_is_sequential_on_conv1d,
)
"""The properties of this file."""
