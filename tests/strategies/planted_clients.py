"""Small clients' halves, right as they stand and each wrong in ways of its own under ``bug``.

The faults are those that the seams of a cohort invite: rows, memory, messages, draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedpeft import tree
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.fedavg import State as Adapter
from fedpeft.strategies.ffa_lora import FfaLora, kaiming_a
from fedpeft.strategies.ffa_lora import State as Trained
from fedpeft.strategies.local import Local
from fedpeft.strategy import Cohort, Message, Messages, Problem, Replies, Strategy, weighted_mean
from fedpeft.streams import torch_stream
from fedpeft.tree import Tree
from tests.strategies.planted_servers import HEAD, A, Past

CACHE: dict[str, Tree] = {}


@dataclass(frozen=True)
class Clients(FedAvg):
    """FedAvg, with faults of the clients' half."""

    bug: str = ""

    def send(self, state: Adapter, round: int, clients: Sequence[str]) -> Messages:
        adapter = state.adapter
        if self.bug == "message from a cache":
            adapter = CACHE.setdefault(f"round {round}", adapter)
        return Messages.broadcast(clients, {"adapter": adapter})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        start, pull = messages.trees["adapter"], None
        if self.bug == "writes into the initial adapter":
            next(iter(cohort.initial.values())).add_(0.01)
        if self.bug == "adjust writes into the adapter":

            def pull(gradient: Tree, adapter: Tree, own: Mapping[str, Tree]) -> Tree:
                for value in adapter.values():
                    value.mul_(0.999)
                return gradient

        fit = cohort.fit(start, adjust=pull)
        adapter, loss, weight = fit.adapter, fit.loss, cohort.weights
        if self.bug == "losses asked in secret":
            loss = cohort.losses(adapter)
        if self.bug == "another client's weight":
            weight = weight.roll(1)
        if self.bug == "one loss for all":
            loss = loss[:1].expand(len(loss))
        if self.bug == "centred over the cohort":
            adapter = {n: x - 0.1 * (x - start[n]).mean(0) for n, x in adapter.items()}
        if self.bug == "replies in another order":
            return replace(
                messages.reply({"adapter": adapter}, weight=weight, loss=loss),
                clients=messages.clients[::-1],
            )
        return messages.reply({"adapter": adapter}, weight=weight, loss=loss)

    def expects(self, sent: Message) -> Mapping[str, Tree]:
        return {} if self.bug == "expects nothing" else sent.trees


@dataclass(frozen=True)
class Pulled(FedAvg):
    """FedProx with mu = 0.5, whose sign the kit cannot know."""

    bug: str = ""

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        start = messages.trees["adapter"]
        mu = -0.5 if self.bug == "pushes away" else 0.5

        def pull(gradient: Tree, adapter: Tree, own: Mapping[str, Tree]) -> Tree:
            return {n: g + mu * (adapter[n] - own["start"][n]) for n, g in gradient.items()}

        fit = cohort.fit(start, adjust=pull, own={"start": start})
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)


@dataclass(frozen=True)
class Frozen(FfaLora):
    """FFA-LoRA, with faults of what is frozen and how it is drawn."""

    bug: str = ""

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        if self.bug != "A trained though frozen":
            return super().train(messages, cohort)
        fit = cohort.fit(self.personal(messages, cohort))
        own = {n: fit.adapter[n] for n in messages.trees["adapter"]}
        return messages.reply({"adapter": own}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: Trained, replies: Replies) -> Trained:
        new = super().receive(state, replies)
        if self.bug != "mean in bfloat16":
            return new
        return replace(new, trained={n: x.bfloat16().to(x) for n, x in new.trained.items()})

    def _frozen(self, seed: int, like: Tree) -> Tree:
        seed = 42 if self.bug == "a seed of its own" else seed
        label = "layer" if self.bug == "one seed for all layers" else None
        return {
            n: kaiming_a(x.shape, torch_stream(seed, label or n)).to(x)
            for n, x in like.items()
            if A in n
        }


@dataclass(frozen=True)
class Table(Strategy[Past]):
    """The server keeps each client's last head and lets the client go on from it."""

    bug: str = ""

    def init(self, problem: Problem) -> Past:
        return Past(problem.initial, {})

    def send(self, state: Past, round: int, clients: Sequence[str]) -> Messages:
        default = tree.select(state.adapter, lambda n: HEAD in n)
        heads = tree.stack([state.kept.get(c, default) for c in clients])
        sent = Messages.broadcast(clients, {"adapter": state.adapter})
        return replace(sent, trees={**sent.trees, "head": heads})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit({**messages.trees["adapter"], **messages.trees["head"]})
        head = tree.select(fit.adapter, lambda n: HEAD in n)
        trees = {"adapter": fit.adapter, "head": head}
        return messages.reply(trees, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: Past, replies: Replies) -> Past:
        stacks = list(replies)
        now = {
            c: {n: x.clone() for n, x in tree.row(r.trees["head"], k).items()}
            for r in stacks
            for k, c in enumerate(r.clients)
        }
        kept = now if self.bug == "those away are dropped" else {**state.kept, **now}
        return Past(weighted_mean(stacks, "adapter"), dict(sorted(kept.items())))

    def adapter(self, state: Past) -> Tree:
        return state.adapter

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        return messages.trees["adapter"]


@dataclass(frozen=True)
class Private(Strategy[Past]):
    """Heads stay with their clients, who are also pulled to where they were; LoRA is averaged."""

    remembers: ClassVar[bool] = True
    shares: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    bug: str = ""

    def init(self, problem: Problem) -> Past:
        return Past(problem.initial)

    def send(self, state: Past, round: int, clients: Sequence[str]) -> Messages:
        return Messages.broadcast(clients, {"adapter": self._public(state.adapter)})

    def _public(self, adapter: Tree) -> Tree:
        leak = self.bug == "a head travels"
        return tree.select(adapter, lambda name: leak or HEAD not in name)

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        start = self.personal(messages, cohort)
        anchor = cohort.recall("anchor", start)

        def pull(gradient: Tree, adapter: Tree, own: Mapping[str, Tree]) -> Tree:
            to = anchor if self.bug == "anchors from outside" else own["anchor"]
            return {n: g + 0.1 * (adapter[n] - to[n]) for n, g in gradient.items()}

        fit = cohort.fit(start, adjust=pull, own={"anchor": anchor})
        cohort.remember("head", tree.select(fit.adapter, lambda n: HEAD in n))
        cohort.remember("anchor", {n: 0.5 * x for n, x in fit.adapter.items()})
        public = self._public(fit.adapter)
        return messages.reply({"adapter": public}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: Past, replies: Replies) -> Past:
        return Past({**state.adapter, **weighted_mean(replies, "adapter")})

    def adapter(self, state: Past) -> Tree:
        return tree.sort(state.adapter)

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        start = {
            n: x for n, x in tree.broadcast(cohort.initial, len(messages)).items() if HEAD in n
        }
        head = cohort.recall("head", start)
        if self.bug == "the neighbour's head":
            head = {n: x.roll(1, 0) for n, x in head.items()}
        return tree.sort({**messages.trees["adapter"], **head})


@dataclass(frozen=True)
class Alone(Local):
    """Local training that is evaluated without what was trained."""

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        return tree.broadcast(cohort.initial, len(messages))

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(cohort.recall("adapter", self.personal(messages, cohort)))
        cohort.remember("adapter", fit.adapter)
        return messages.reply({}, weight=cohort.weights, loss=fit.loss)
