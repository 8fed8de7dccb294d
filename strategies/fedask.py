"""FedASK: two exchanges a round bring the mean of the clients' updates to the server as sketches.

NeurIPS 2025 (arXiv 2507.09990). With a random O ``[d_in, r + o]`` that all draw from one seed:
1. clients train and send Y_k = s B_k (A_k O); the server takes Q = qr(sum_k p_k Y_k);
2. clients send Z_k = s A_k^T (B_k^T Q); U S V^T = svd((sum_k p_k Z_k)^T),
   B <- Q U_r S_r^1/2 / s^1/2, A <- S_r^1/2 V_r^T / s^1/2.

Both are means, so a server needs no client's own update. Q Q^T M = M for the mean M as soon as
r + o reaches its rank; what is lost then is the tail of M's spectrum beyond r, as in FlexLoRA.
With ``train_a=False`` (the paper's private mode: A is the same for all) M has rank r, nothing is
lost, and the rows of A span what they spanned at the start. Between the exchanges a client keeps
its factors, and the loss that it tells. A layer whose mean is zero keeps its factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.lowrank import is_a, lora_pairs, truncated_svd
from fedpeft.strategy import Cohort, Message, Messages, Problem, Replies, Strategy, weighted_mean
from fedpeft.streams import derive, torch_stream
from fedpeft.tree import Tree, broadcast, row, select


@dataclass(frozen=True)
class State:
    """The global adapter, s by layer, the run's seed; Q by layer between the two exchanges."""

    adapter: Tree
    scaling: dict[str, float]
    seed: int
    basis: Tree


@dataclass(frozen=True)
class FedASK(Strategy[State]):
    """A, B <- the rank-r factors of sum_k p_k s B_k A_k, from its sketches; heads <- their mean.

    oversampling: o. train_a: whether clients train A too.
    """

    linear: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    exchanges: ClassVar[int] = 2

    oversampling: int = 2
    train_a: bool = True

    def __post_init__(self) -> None:
        if self.oversampling < 0:
            raise FedpeftError(f"strategy.oversampling={self.oversampling}: must be >= 0.")

    def init(self, problem: Problem) -> State:
        lora_pairs(problem.initial, "fedask")
        seed = derive(problem.seed, "fedask")
        return State(problem.initial, dict(problem.scaling), seed, {})

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        if not state.basis:
            blobs = {"seed": derive(state.seed, round).to_bytes(8, "little")}
            return Messages.broadcast(clients, {"adapter": state.adapter}, state.scaling, blobs)
        like = {}
        for layer, (name_a, _) in lora_pairs(state.adapter, "fedask").items():
            a, q = state.adapter[name_a], state.basis[f"{layer}.lora_Q"]
            like[f"{layer}.lora_Z"] = a.new_empty(0, a.shape[1], q.shape[1])
        return Messages.broadcast(clients, {"basis": state.basis, "like": like}, state.scaling)

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        if "basis" in messages.trees:
            return self._answer(messages, cohort)
        start, s = messages.trees["adapter"], messages[0].scalars
        fixed = {} if self.train_a else row(select(start, is_a), 0)
        fit = cohort.fit(select(start, lambda name: name not in fixed), fixed=fixed)
        own = {**start, **fit.adapter}
        cohort.remember("own", select(own, _lora) | {"loss": fit.loss})
        (seed,) = set(messages.blobs["seed"])
        sketch = {}
        for layer, (name_a, name_b) in lora_pairs(cohort.initial, "fedask").items():
            omega = self._omega(layer, own[name_a], int.from_bytes(seed, "little"))
            sketch[f"{layer}.lora_Y"] = s[layer] * own[name_b] @ (own[name_a] @ omega)
        heads = select(own, lambda name: not _lora(name))
        return messages.reply({"sketch": sketch | heads}, weight=cohort.weights, loss=fit.loss)

    def _answer(self, messages: Messages, cohort: Cohort) -> Messages:
        """The second exchange, from the factors that the clients kept."""
        basis, s, k = messages.trees["basis"], messages[0].scalars, len(messages)
        like = next(iter(basis.values()))
        empty = broadcast(select(cohort.initial, _lora), k) | {"loss": cohort.weights}
        own = cohort.recall("own", {name: value.to(like) for name, value in empty.items()})
        cohort.remember("own", {})
        core = {}
        for layer, (name_a, name_b) in lora_pairs(cohort.initial, "fedask").items():
            reduced = own[name_b].mT @ basis[f"{layer}.lora_Q"]
            core[f"{layer}.lora_Z"] = s[layer] * own[name_a].mT @ reduced
        return messages.reply({"core": core}, weight=cohort.weights, loss=own["loss"])

    def receive(self, state: State, replies: Replies) -> State:
        if not state.basis:
            sketch = weighted_mean(replies, "sketch")
            heads = select(sketch, lambda name: not name.endswith(".lora_Y"))
            pairs = lora_pairs(state.adapter, "fedask")
            found = {n: torch.linalg.qr(sketch[f"{n}.lora_Y"].double()).Q for n in pairs}
            basis = {f"{n}.lora_Q": q.to(sketch[f"{n}.lora_Y"]) for n, q in found.items()}
            return replace(state, adapter={**state.adapter, **heads}, basis=basis)
        core, adapter = weighted_mean(replies, "core"), dict(state.adapter)
        for layer, (name_a, name_b) in lora_pairs(adapter, "fedask").items():
            q, z, a = state.basis[f"{layer}.lora_Q"], core[f"{layer}.lora_Z"], adapter[name_a]
            if bool(z.any()):
                u, sigma, vt = truncated_svd(q, z.mT, len(a))
                root = (sigma / state.scaling[layer]).sqrt()
                adapter |= {name_a: (root[:, None] * vt).to(a), name_b: (u * root).to(a)}
        return replace(state, adapter=adapter, basis={})

    def expects(self, sent: Message) -> dict[str, Tree]:
        if "basis" in sent.trees:
            like = sent.trees["like"].items()
            return {"core": {n: t.new_empty(t.shape[1:]) for n, t in like}}
        adapter = sent.trees["adapter"]
        found = select(adapter, lambda name: not _lora(name))
        for layer, (name_a, name_b) in lora_pairs(adapter, "fedask").items():
            rows, rank = adapter[name_b].shape
            found[f"{layer}.lora_Y"] = adapter[name_a].new_empty(rows, rank + self.oversampling)
        return {"sketch": found}

    def adapter(self, state: State) -> Tree:
        return state.adapter

    def _omega(self, layer: str, a: Tensor, seed: int) -> Tensor:
        """O ``[d_in, r + o]`` of a layer; a: its stacked A."""
        shape = a.shape[2], a.shape[1] + self.oversampling
        stream = torch_stream(seed, "fedask", layer)
        return torch.randn(shape, generator=stream, dtype=torch.float64).to(a)


def _lora(name: str) -> bool:
    return ".lora_" in name
