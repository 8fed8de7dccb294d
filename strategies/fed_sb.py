"""Fed-SB: two frozen bases per layer; only the small core between them is trained and averaged.

Singhal et al., 2025 (arXiv 2502.15436), with the start of LoRA-SB (Ponkshe et al., arXiv
2411.19557): W = W_0 + s B R A, B and A orthonormal and frozen, R (r x r) trained,
R <- sum_k p_k R_k. Exact, for all is linear in R; what travels per round is R and the heads,
whatever the width. The bases are sent once to each client, which keeps them, and are counted.

start says who computes them, on what. LoRA-SB: D = -eta_1 sign(G), U S V^T = svd(D) to rank r,
B = U, A = V^T, R_0 = S / s, with G the summed gradient of the full weights.
- ``random``: seeded; 8 bytes in place of the bases; R_0 = 0.
- ``public``: G of the server's own public data (``data.public``): nothing private in it.
- ``weights``: the leading singular vectors of W_0, which hold no private data; R_0 = 0.
- ``gradients``: in round 1 every client sends G_k, dense, of all its data, and nothing is trained;
  G = sum_k p_k G_k. Under privacy.unit=client a release like any other: clipped, noised, charged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedpeft.lowrank import fresh_pairs, is_a, leading_svd, lora_pairs, orthonormal_pairs
from fedpeft.message import Message, Messages, Replies, noted, weighted_mean
from fedpeft.strategy import Cohort, Problem, Strategy, group_by
from fedpeft.streams import derive
from fedpeft.tree import Tree, broadcast, row, select, sort


@dataclass(frozen=True)
class State:
    """Cores and heads; A and B (peft's own until ``known``), s by layer, who keeps A and B."""

    trained: Tree
    frozen: Tree
    known: bool
    scaling: dict[str, float]
    seed: int
    held: dict[str, int]


@dataclass(frozen=True)
class FedSB(Strategy[State]):
    """R <- sum_k p_k R_k. first_step: eta_1; 0 takes the subspaces of D alone, with R_0 = 0."""

    exact: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    start: Literal["random", "public", "weights", "gradients"] = "random"
    first_step: float = 0.0

    def init(self, problem: Problem) -> State:
        trained, frozen = dict(problem.initial), Tree()
        seed, known = derive(problem.seed, "fed_sb"), self.start != "gradients"
        for layer, (name_a, name_b) in fresh_pairs(problem.initial, "fed_sb").items():
            frozen |= {name: trained.pop(name) for name in (name_a, name_b)}
            a = frozen[name_a]
            trained[f"{layer}.lora_R"] = a.new_zeros(len(a), len(a))
            if self.start == "weights":
                u, _, vt = leading_svd(problem.weight(layer), len(a))
                frozen |= {name_a: vt.to(a), name_b: u.to(a)}
        if self.start == "random":
            frozen = orthonormal_pairs(frozen, "fed_sb", seed)
        state = State(sort(trained), frozen, known, dict(problem.scaling), seed, {})
        return self._stepped(state, problem.public_gradients()) if self.start == "public" else state

    def asks(self) -> frozenset[str]:
        return frozenset({"weight_gradients", "losses"} if self.start == "gradients" else ())

    def groups(self, state: State, clients: Sequence[str]) -> list[tuple[str, ...]]:
        sent = state.held if self.start != "random" else {}
        return group_by(clients, lambda client: -sent.get(client, 0))

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        trees, blobs = {"cores": state.trained}, {}
        if not state.known:
            trees["like"] = {f"{n}.like": t.new_empty(0, *t.shape) for n, t in state.frozen.items()}
        elif self.start == "random":
            blobs["seed"] = state.seed.to_bytes(8, "little")
        elif not any(state.held.get(client, 0) for client in clients):
            trees["bases"] = state.frozen
        return Messages.broadcast(clients, trees, blobs=blobs)

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        if "like" in messages.trees:
            at = self.personal(messages, cohort)
            own = {f"{n}.lora_G": g for n, g in cohort.weight_gradients(at).items()}
            return messages.reply({"gradients": own}, weight=cohort.weights, loss=cohort.losses(at))
        cores, frozen = messages.trees["cores"], self._received(messages, cohort)
        fit = cohort.fit(cores, fixed=select(frozen, is_a), expand=lambda t: expanded(t, frozen))
        return messages.reply({"cores": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        names: list[str] = []
        if state.known:
            trained = weighted_mean(noted(replies, names), "cores")
            return replace(state, trained=trained, held=state.held | dict.fromkeys(names, 1))
        gradient = weighted_mean(replies, "gradients")
        return self._stepped(state, {n.removesuffix(".lora_G"): g for n, g in gradient.items()})

    def _stepped(self, state: State, gradient: Tree) -> State:
        """Bases and cores from G, by layer ``[d_out, d_in]``."""
        trained, frozen = dict(state.trained), dict(state.frozen)
        for n, (name_a, name_b) in lora_pairs(frozen, "fed_sb").items():
            a = frozen[name_a]
            u, sigma, vt = leading_svd(-gradient[n].sign(), len(a))
            frozen |= {name_a: vt.to(a), name_b: u.to(a)}
            trained[f"{n}.lora_R"] = (self.first_step / state.scaling[n] * sigma).diag().to(a)
        return replace(state, trained=trained, frozen=frozen, known=True)

    def expects(self, sent: Message) -> dict[str, Tree]:
        if "like" not in sent.trees:
            return {"cores": sent.trees["cores"]}
        empty = sent.trees["like"].items()
        like = {n.removesuffix(".like"): t.new_empty(t.shape[1:]) for n, t in empty}
        pairs = lora_pairs(like, "fed_sb").items()
        return {"gradients": {f"{n}.lora_G": like[b] @ like[a] for n, (a, b) in pairs}}

    def adapter(self, state: State) -> Tree:
        return row(whole(broadcast(state.trained, 1), state.frozen), 0)

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        return whole(messages.trees["cores"], self._received(messages, cohort))

    def _received(self, messages: Messages, cohort: Cohort) -> Tree:
        """A and B, as sent now or before; peft's own while they are not known."""
        if "bases" in messages.trees:
            cohort.keep("bases", 1, row(messages.trees["bases"], 0))
        if "like" not in messages.trees and not messages.blobs:
            return cohort.kept("bases", 1)[1]
        frozen = select(cohort.initial, lambda name: ".lora_" in name)
        for seed in set(messages.blobs.get("seed", ())):
            frozen = orthonormal_pairs(frozen, "fed_sb", int.from_bytes(seed, "little"))
        device = next(iter(messages.trees["cores"].values())).device
        return {name: value.to(device) for name, value in frozen.items()}


def expanded(trained: Tree, frozen: Tree) -> Tree:
    """``lora_B = B R`` of every layer, ``[K, d_out, r]``; heads as they are."""
    made = select(trained, lambda name: ".lora_" not in name)
    for layer, (_, name_b) in lora_pairs(frozen, "fed_sb").items():
        made[name_b] = frozen[name_b] @ trained[f"{layer}.lora_R"]
    return made


def whole(trained: Tree, frozen: Tree) -> Tree:
    """The complete adapter of each client, stacked: B R, A and the heads."""
    made = expanded(trained, frozen)
    return sort(broadcast(frozen, len(next(iter(made.values())))) | made)
