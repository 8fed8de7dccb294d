"""FFA-LoRA: all clients share one frozen random A; only B is trained and averaged.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024 (arXiv 2403.12313):
W = W_0 + s B A with A frozen as initialised, so that the average of the updates is the update of
the average, sum_k p_k s B_k A = s (sum_k p_k B_k) A. What travels is B and the head.

A is drawn from a seed of 8 bytes, in a stream of its own for every layer. Orthonormal rows hold
three times the energy of ``kaiming``: compare the two after tuning the learning rate for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy, weighted_mean
from fedpeft.streams import derive, torch_stream
from fedpeft.tree import Tree, broadcast, select, sort


@dataclass(frozen=True)
class State:
    """The global adapter: B and heads (trained), A (frozen), and the seed that A comes from."""

    trained: Tree
    frozen: Tree
    seed: int


@dataclass(frozen=True)
class FfaLora(Strategy[State]):
    """B <- sum_k p_k B_k under one frozen A.

    init_a: A's entries ~ U(-1/sqrt(d_in), 1/sqrt(d_in)) (``kaiming``, as in peft), or its rows
    ``orthonormal``, from the QR factors of a Gaussian matrix.
    """

    exact: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    init_a: Literal["kaiming", "orthonormal"] = "kaiming"

    def init(self, problem: Problem) -> State:
        check_adapter(problem.initial)
        seed = derive(problem.seed, "ffa_lora")
        trained = select(problem.initial, lambda name: not _is_a(name))
        return State(trained, self._frozen(seed, problem.initial), seed)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        seed = state.seed.to_bytes(8, "little")
        return Messages.broadcast(clients, {"adapter": state.trained}, blobs={"seed": seed})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(messages.trees["adapter"], fixed=self._received(messages, cohort))
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        return State(weighted_mean(replies, "adapter"), state.frozen, state.seed)

    def adapter(self, state: State) -> Tree:
        return sort(state.trained | state.frozen)

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        frozen = broadcast(self._received(messages, cohort), len(messages))
        return sort({**messages.trees["adapter"], **frozen})

    def _received(self, messages: Messages, cohort: Cohort) -> Tree:
        """A from the seed in the messages, the same for all clients."""
        (seed,) = set(messages.blobs["seed"])
        return self._frozen(int.from_bytes(seed, "little"), cohort.initial)

    def _frozen(self, seed: int, like: Tree) -> Tree:
        """A ``[r, d_in]`` of every LoRA layer in ``like``, drawn in float64 on the CPU."""
        draw = orthonormal_a if self.init_a == "orthonormal" else kaiming_a
        return {
            name: draw(tensor.shape, torch_stream(seed, "ffa_lora", name)).to(tensor)
            for name, tensor in like.items()
            if _is_a(name)
        }


def kaiming_a(shape: torch.Size, stream: torch.Generator) -> Tensor:
    """Independent entries ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), float64 ``[r, d_in]``."""
    uniform = torch.rand(shape, generator=stream, dtype=torch.float64)
    return (2 * uniform - 1) / math.sqrt(shape[1])


def orthonormal_a(shape: torch.Size, stream: torch.Generator) -> Tensor:
    """Orthonormal rows, uniform over all such matrices, float64 ``[r, d_in]``."""
    r, d_in = shape
    if r > d_in:
        raise FedpeftError(
            f"strategy.init_a='orthonormal': adapter.r={r} rows of {d_in} entries cannot be "
            f"orthonormal; set adapter.r to at most {d_in}, or strategy.init_a=kaiming."
        )
    gaussian = torch.randn(d_in, r, generator=stream, dtype=torch.float64)
    q, upper = torch.linalg.qr(gaussian)
    a: Tensor = q * upper.diagonal().sign()
    return a.mT


def check_adapter(initial: Tree) -> None:
    """Raises FedpeftError unless the adapter is LoRA, W + s B A, that starts from B = 0."""
    odd = [n for n in initial if "lora_" in n and not _is_a(n) and ".lora_B." not in n]
    if odd or not any(map(_is_a, initial)):
        raise FedpeftError(
            f"strategy.name='ffa_lora' freezes lora_A and averages lora_B; this adapter "
            f"{f'also has {odd[0]!r}' if odd else 'has neither'}: set adapter.kind=lora on linear "
            f"layers (not use_dora), or choose another strategy."
        )
    for name, tensor in initial.items():
        if ".lora_B." in name and bool(tensor.any()):
            raise FedpeftError(
                f"strategy.name='ffa_lora' draws A anew, so B must start from zero, but {name!r} "
                f"does not: leave adapter.init_lora_weights and adapter.start at their defaults."
            )


def _is_a(name: str) -> bool:
    return ".lora_A." in name and name.endswith(".weight")
