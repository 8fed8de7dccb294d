"""FedKSeed: steps along directions from a few public seeds; a client sends scalars, not tensors.

Qin et al., ICML 2024 (arXiv 2312.06353). All know K candidate seeds s_j, and z(s) ~ N(0, I) of the
model's size. At each of tau steps client k draws j and moves w <- w - eta rho z(s_j) with
rho = (l(w + eps z(s_j)) - l(w - eps z(s_j))) / (2 eps); it sends the pairs (j, eta rho). The server
adds, a_j <- a_j + sum_k p_k sum_t eta rho, and sends a; everybody's model is then
w = w_0 - sum_j a_j z(s_j), the weighted mean of the clients' models, at 18 kB a client and round.

draw says how j is drawn: ``uniform``; ``pro`` (FedKSeed-Pro), by softmax of the mean |rho| of each
seed, clipped at 1000, begun with one 0 and scaled to [0, 1]; ``unbiased``, as ``pro``, with steps
divided by K p_j. The probabilities p cost as much again as a.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedpeft.directions import displaced
from fedpeft.errors import FedpeftError
from fedpeft.strategy import Cohort, Message, Messages, Problem, Replies, Route, Strategy
from fedpeft.streams import derive, numpy_stream
from fedpeft.tree import RunningMean, Tree, broadcast, select

MOST = 1000.0
"""What |rho| counts at most in the history of a seed."""


@dataclass(frozen=True)
class State:
    """w_0, the seed of s_1 (others follow), tau, eta, a ``[K]``; of each seed, draws and |rho|."""

    initial: Tree
    seed: int
    steps: int
    lr: float
    sums: Tensor
    counts: Tensor
    totals: Tensor


@dataclass(frozen=True)
class FedKSeed(Strategy[State]):
    """w <- w_0 - sum_j a_j z(s_j). candidates: K; reach: eps.

    cap: steps whose two losses differ by more are skipped (0: none is).
    """

    keeps: ClassVar[bool] = True
    walks: ClassVar[bool] = True
    codable: ClassVar[bool] = False

    candidates: int = 4096
    reach: float = 5e-4
    cap: float = 0.0
    draw: Literal["uniform", "pro", "unbiased"] = "uniform"

    def __post_init__(self) -> None:
        for name, least in (("candidates", 1), ("reach", 1e-12), ("cap", 0)):
            if not vars(self)[name] >= least:
                raise FedpeftError(f"strategy.{name}={vars(self)[name]}: must be >= {least}.")

    def init(self, problem: Problem) -> State:
        if not (problem.steps > 0 and problem.lr > 0):
            raise FedpeftError(
                f"strategy.name='fedkseed': local.steps={problem.steps}, local.lr={problem.lr}; "
                f"both must be above 0, as every client takes the same number of equal steps."
            )
        like = next(iter(problem.initial.values()))
        sums, seed = like.new_zeros(self.candidates), derive(problem.seed, "fedkseed") >> 1
        history = torch.zeros(self.candidates, dtype=torch.float64)
        return State(problem.initial, seed, problem.steps, problem.lr, sums, history + 1, history)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        sums = {"a": state.sums}
        if self.draw != "uniform":
            sums["p"] = probabilities(state).to(state.sums)
        seed = {"s": state.seed.to_bytes(8, "little")}
        return Messages.broadcast(clients, {"sums": sums}, {"t": round, "n": state.steps}, seed)

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        start, seeds = self._model(messages, cohort)
        sent, even = messages[0], torch.full((self.candidates,), 1 / self.candidates)
        p = sent.trees["sums"].get("p", even).double().cpu()
        drawn, shares = [], (p / p.sum()).numpy()
        for client in cohort.clients:
            stream = numpy_stream(int(seeds[0]), "draws", client, int(sent.scalars["t"]))
            drawn.append(stream.choice(self.candidates, int(sent.scalars["n"]), p=shares))
        j = torch.from_numpy(np.stack(drawn))
        route = Route(seeds[j], self.reach, self._factors(p)[j], self.cap or math.inf)
        walk = cohort.walk(broadcast(start, len(messages)), route)
        pairs = {"j": j.to(self._index), "m": walk.moves}
        return messages.reply({"walk": pairs}, weight=cohort.weights, loss=walk.loss)

    def receive(self, state: State, replies: Replies) -> State:
        counts, totals = state.counts.clone(), state.totals.clone()
        factors, running = self._factors(probabilities(state)), RunningMean()
        for reply in replies:
            j = reply.trees["walk"]["j"].cpu().long() % self.candidates  # whatever a client sent
            moves = reply.trees["walk"]["m"].cpu().double()
            own = moves.new_zeros(len(reply), self.candidates).scatter_add_(1, j, moves)
            running.add({"a": own}, reply.scalars["weight"])
            slopes = (moves / factors[j] / state.lr).abs().clamp(max=MOST)
            totals.index_add_(0, j.flatten(), slopes.flatten())
            counts += j.flatten().bincount(minlength=self.candidates)
        sums = (state.sums.double() + running.result()["a"]).to(state.sums)
        return replace(state, sums=sums, counts=counts, totals=totals)

    def expects(self, sent: Message) -> dict[str, Tree]:
        moves = sent.trees["sums"]["a"].new_empty(int(sent.scalars["n"]))
        return {"walk": {"j": moves.to(self._index), "m": moves}}

    def adapter(self, state: State) -> Tree:
        return displaced(state.initial, state.seed + torch.arange(self.candidates), -state.sums)

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        return broadcast(self._model(messages, cohort)[0], len(messages))

    def _model(self, messages: Messages, cohort: Cohort) -> tuple[Tree, Tensor]:
        """w and s_1 ... s_K: from w_0 and a alone, or from the last w kept here and what came."""
        sums = messages.trees["sums"]["a"][0]
        (seed,) = set(messages.blobs["s"])
        seeds = int.from_bytes(seed, "little") + torch.arange(self.candidates, device=sums.device)
        version, held = cohort.kept("model", 0)
        if not version:
            held = {n: x.to(sums) for n, x in cohort.initial.items()} | {"a": 0 * sums}
        model = displaced(select(held, lambda n: n != "a"), seeds, held["a"] - sums)
        cohort.keep("model", int(messages[0].scalars["t"]), model | {"a": sums})
        return model, seeds

    def _factors(self, p: Tensor) -> Tensor:
        """What steps along each seed are multiplied by, float64 ``[K]``."""
        return 1 / (self.candidates * p) if self.draw == "unbiased" else torch.ones_like(p)

    @property
    def _index(self) -> torch.dtype:
        return torch.int16 if self.candidates <= 2**15 else torch.int32


def probabilities(state: State) -> Tensor:
    """p of the seeds, float64 ``[K]``: they differ by at most a factor of e."""
    mean = state.totals / state.counts
    scaled = (mean - mean.min()) / (mean.max() - mean.min() + 1e-10)
    return scaled.softmax(0)
