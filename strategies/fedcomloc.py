"""FedComLoc on adapters: control variates, and a random number of local steps between meetings.

Scaffnew (Mishchenko et al., ICML 2022, arXiv 2202.09357) with compression as in algorithm 1 of
FedComLoc (Yi et al., TMLR 2025, arXiv 2403.09904). Client i steps x_i <- x_i - gamma (g_i - h_i);
after each step, with probability pi, all meet: x <- sum_k p_k x_k, and
h_i <- h_i + (pi / gamma) (x - x_i). One coin for all: a round is a geometric(pi) number of steps.

A client learns x only when it is sent it next, and clients may be away. So h_i is kept as the sum
that it is, h_i = (pi / gamma) (s_i - s): s_i is how far client i moved, x - x_i, over its rounds,
and s the mean of these over all clients (own completion; it keeps the sum of all h_i at zero, with
equal weights or everybody there). While nobody was ever away s is x_0 - x, which clients know, and
nothing but x travels; from then on s is sent as well.

Compression: ``Local`` is ``density`` here, ``Com`` the recipe's ``comms.up`` and ``Global`` its
``comms.down``; these code changes where the paper codes weights. As there, h_i goes by the x_i that
arrives: what a codec loses comes back through h_i, so that error feedback would count it twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedpeft.errors import FedpeftError
from fedpeft.strategy import Cohort, Message, Messages, Problem, Replies, Strategy
from fedpeft.streams import numpy_stream
from fedpeft.tree import RunningMean, Tree, add, finite_rows, scale, sub, zeros_like


@dataclass(frozen=True)
class State:
    """x and s; N, how many clients there are; whether all were in every round; the run's seed."""

    adapter: Tree
    moved: Tree
    clients: int
    complete: bool
    seed: int


@dataclass(frozen=True)
class FedComLoc(Strategy[State]):
    """Rounds of 1 / pi steps of plain SGD on average, the same number for all clients.

    pi: the probability of a meeting after a step. density: the share of the weights, the largest,
    at which gradients are taken; at the others they are taken at zero. The aggregate needs to know
    how many replied: not linear.
    """

    remembers: ClassVar[bool] = True

    pi: float = 0.1
    density: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("pi", self.pi), ("density", self.density)):
            if not 0 < value <= 1:
                raise FedpeftError(f"strategy.{name}={value!r}: must be above 0 and at most 1.")

    def asks(self) -> frozenset[str]:
        return frozenset({"steps"})

    def needs(self) -> Mapping[str, object]:
        plain = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
        local = {**plain, "warmup": 0.0, "steps": round(1 / self.pi)}
        return {f"local.{key}": x for key, x in local.items()} | {"comms.up.feedback": "never"}

    def init(self, problem: Problem) -> State:
        moved = zeros_like(problem.initial)
        return State(problem.initial, moved, len(problem.clients), True, problem.seed)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        steps = numpy_stream(state.seed, "fedcomloc", round).geometric(self.pi)
        trees = {"adapter": state.adapter}
        if not state.complete:
            trees["moved"] = state.moved
        return Messages.broadcast(clients, trees, {"steps": float(steps)})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        start = messages.trees["adapter"]
        known = {name: cohort.initial[name].to(x) - x for name, x in start.items()}
        mean = messages.trees.get("moved", known)
        before = cohort.recall("moved", zeros_like(start))
        per_move = self.pi / cohort.lr if cohort.lr else 0.0  # at rate 0 no correction moves
        own = {"control": scale(sub(before, mean), per_move)}
        fit = cohort.fit(
            start,
            adjust=lambda gradient, adapter, own: sub(gradient, own["control"]),
            own=own,
            expand=self._largest if self.density < 1 else None,
            steps=int(messages.scalars["steps"][0]),
        )
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def left(self, messages: Messages, reply: Messages, cohort: Cohort) -> None:
        start, after = messages.trees["adapter"], reply.trees["adapter"]
        counts = finite_rows(after)  # else the server excludes it
        moved = {
            name: torch.where(counts.view(-1, *[1] * (x.dim() - 1)), x - after[name], 0.0)
            for name, x in start.items()
        }
        cohort.remember("moved", add(cohort.recall("moved", zeros_like(start)), moved))

    def expects(self, sent: Message) -> Mapping[str, Tree]:
        return {"adapter": sent.trees["adapter"]}

    def receive(self, state: State, replies: Replies) -> State:
        mean, present = RunningMean(), 0
        for reply in replies:
            mean.add(reply.trees["adapter"], reply.scalars["weight"])
            present += len(reply)
        adapter, all_ = mean.result(), state.clients
        move = scale(sub(state.adapter, adapter), present / all_)
        complete = state.complete and present == all_
        return State(adapter, add(state.moved, move), all_, complete, state.seed)

    def adapter(self, state: State) -> Tree:
        return state.adapter

    def _largest(self, trained: Tree) -> Tree:
        """The weights with all but each row's largest at zero; gradients pass as if they were x."""
        sizes = [x.detach().abs().unsqueeze(-1).flatten(1) for x in trained.values()]
        every = torch.cat(sizes, dim=1)
        kept = math.ceil(self.density * every.shape[1])
        least = every.topk(kept, dim=1).values[:, -1]
        found = {}
        for name, x in trained.items():
            small = x.detach().abs() < least.view(-1, *[1] * (x.dim() - 1))
            found[name] = x - torch.where(small, x.detach(), 0.0)
        return found
