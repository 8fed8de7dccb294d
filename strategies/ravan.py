"""RAVAN: several frozen random heads per layer; a small core and a scale per head are trained.

Raje et al., NeurIPS 2025 (arXiv 2506.05568): W = W_0 + s sum_i c_i B_i H_i A_i with B_i and A_i
frozen, cores H_i (r_i x r_i, start 0) and scales c_i (start 1) trained. Clients send c_i H_i, the
server H_i <- sum_k p_k c_ki H_ki, and every c_i begins at 1 again: exact, for all is linear in
c_i H_i, and of rank up to sum_i r_i for sum_i r_i^2 numbers a layer.

The adapter is LoRA of rank r = sum_i r_i, whose A holds the rows of all A_i and whose B is
[B_1 (c_1 H_1), ..., B_h (c_h H_h)]. A_i and B_i come from a seed of 8 bytes. Open in our sources:
how the paper draws them; here the rows of all A_i together are orthonormal, and so are the columns
of all B_i. Not here: clients that train some of the heads only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.lowrank import fresh_pairs, lora_pairs, orthonormal_pairs
from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy, weighted_mean
from fedpeft.streams import derive
from fedpeft.tree import Tree, broadcast, select, sort


@dataclass(frozen=True)
class State:
    """The cores (and classifier heads) trained, the adapter's A and B basis, and their seed."""

    trained: Tree
    frozen: Tree
    seed: int


@dataclass(frozen=True)
class Ravan(Strategy[State]):
    """H_i <- sum_k p_k c_ki H_ki.

    heads: per layer; their ranks share adapter.r as equally as they can (the paper's budget for r
    is heads * r_i). A layer of smaller rank than ``heads`` has one head per rank.
    """

    exact: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    heads: int = 4

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise FedpeftError(f"strategy.heads={self.heads}: at least one head per layer.")

    def init(self, problem: Problem) -> State:
        pairs = fresh_pairs(problem.initial, "ravan")
        trained = select(problem.initial, lambda name: ".lora_" not in name)
        for layer, (name_a, _) in pairs.items():
            for i, r in enumerate(self._ranks(problem.initial[name_a])):
                trained[_core(layer, i)] = problem.initial[name_a].new_zeros(r, r)
        seed = derive(problem.seed, "ravan")
        return State(sort(trained), orthonormal_pairs(problem.initial, "ravan", seed), seed)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        seed = state.seed.to_bytes(8, "little")
        return Messages.broadcast(clients, {"cores": state.trained}, blobs={"seed": seed})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        cores, frozen = messages.trees["cores"], self._received(messages, cohort)
        like = next(iter(cores.values()))
        scales = {
            _scales(layer): like.new_ones(len(messages), len(self._ranks(cohort.initial[name_a])))
            for layer, (name_a, _) in lora_pairs(frozen, "ravan").items()
        }
        fixed = select(frozen, lambda name: ".lora_A." in name)
        fit = cohort.fit(cores | scales, fixed=fixed, expand=lambda t: self._expand(t, frozen))
        scaled = {name: _scaled(fit.adapter, name) for name in cores}
        return messages.reply({"cores": scaled}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        return State(weighted_mean(replies, "cores"), state.frozen, state.seed)

    def adapter(self, state: State) -> Tree:
        one = self._expand(broadcast(state.trained, 1), state.frozen)
        frozen = select(state.frozen, lambda name: ".lora_A." in name)
        return sort(frozen | {name: value[0] for name, value in one.items()})

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        frozen = self._received(messages, cohort)
        shared = broadcast(select(frozen, lambda name: ".lora_A." in name), len(messages))
        return sort(shared | self._expand(messages.trees["cores"], frozen))

    def _expand(self, trained: Tree, frozen: Tree) -> Tree:
        """B [B_i (c_i H_i)] of every layer, ``[K, d_out, r]``; classifier heads as they are."""
        made = select(trained, lambda name: ".lora_" not in name)
        for layer, (name_a, name_b) in lora_pairs(frozen, "ravan").items():
            parts = frozen[name_b].split(self._ranks(frozen[name_a]), dim=1)
            blocks = [b @ _scaled(trained, _core(layer, i)) for i, b in enumerate(parts)]
            made[name_b] = torch.cat(blocks, dim=2)
        return made

    def _ranks(self, a: Tensor) -> list[int]:
        """The heads' ranks in a layer of factor A ``[r, d_in]``."""
        return [len(part) for part in torch.arange(len(a)).tensor_split(min(self.heads, len(a)))]

    def _received(self, messages: Messages, cohort: Cohort) -> Tree:
        (seed,) = set(messages.blobs["seed"])
        drawn = orthonormal_pairs(cohort.initial, "ravan", int.from_bytes(seed, "little"))
        device = next(iter(messages.trees["cores"].values())).device
        return {name: value.to(device) for name, value in drawn.items()}


def _core(layer: str, head: int) -> str:
    return f"{layer}.lora_H.{head}"


def _scales(layer: str) -> str:
    return f"{layer}.lora_c"


def _scaled(trained: Tree, name: str) -> Tensor:
    """c_i H_i where there are scales; H_i itself, and any other tensor, as it is."""
    layer, _, head = name.partition(".lora_H.")
    scales = trained.get(_scales(layer))
    return trained[name] if scales is None else scales[:, int(head), None, None] * trained[name]
