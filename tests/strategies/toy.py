"""A federation in which every number is known, so that strategies are tested without a model.

Client k has a target for every LoRA layer's update and for every other tensor; its loss is
1/2 sum_layers ||s B A - M_k||^2 + 1/2 sum_others ||w - T_k||^2. Local training is plain SGD with a
number of steps per client; the gradient is written by hand, for torch and numpy alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft import tree
from fedpeft.cohort.shelf import Shelf
from fedpeft.strategy import (
    Adjust,
    Cohort,
    Expand,
    Fit,
    Messages,
    Problem,
    Strategy,
    addressed,
)
from fedpeft.tree import Tree

Arrays = dict[str, np.ndarray]

LAYERS = {
    "base_model.model.bert.layer.0.query": (4, 2, 5, 2.0),
    "base_model.model.bert.layer.1.query": (4, 3, 4, 0.5),
    "base_model.model.bert.layer.1.value": (4, 3, 4, 1.5),
}
"""LoRA layer -> d_out, r, d_in, s: one wide, two square of equal shape; no s is 1."""

OTHERS = {
    "base_model.model.classifier.modules_to_save.default.weight": (3, 4),
    "base_model.model.classifier.modules_to_save.default.bias": (3,),
}


def a_of(layer: str) -> str:
    return f"{layer}.lora_A.default.weight"


def b_of(layer: str) -> str:
    return f"{layer}.lora_B.default.weight"


@dataclass
class Toy:
    """The clients: targets, weights, local steps; what they keep; what they last trained, on what
    base."""

    initial: Tree
    scaling: dict[str, float]
    targets: dict[str, Tree]
    weights: dict[str, float]
    steps: dict[str, int]
    lr: float = 0.05
    memory: dict[str, dict[str, Tree]] = field(default_factory=dict)
    trained: dict[str, Tree] = field(default_factory=dict)
    bases: dict[str, Tree] = field(default_factory=dict)
    shelf: Shelf = field(default_factory=Shelf)

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(self.targets)

    def problem(self, rounds: int = 3, seed: int = 7) -> Problem:
        return Problem(self.initial, self.scaling, self.clients, rounds, seed, self.weight)

    def weight(self, layer: str) -> Tensor:
        """A pretrained weight; the losses do not depend on it."""
        d_out, _, d_in, _ = LAYERS[layer]
        draw = torch.Generator().manual_seed(len(layer) + d_in)
        return torch.randn(d_out, d_in, generator=draw)

    def cohort(self, clients: Sequence[str]) -> ToyCohort:
        return ToyCohort(self, clients)

    def errors(self, client: str, adapter: Any, base: Any = None) -> Any:
        """What a client's adapter (torch or numpy) lacks: s B A - M of layers, w - T of others.

        base: change of the frozen weights, by layer, in addition.
        """
        kind = type(next(iter(adapter.values())))
        return {
            name: (
                self.scaling[name] * adapter[b_of(name)] @ adapter[a_of(name)]
                + (base[name] if base else 0.0)
                if name in self.scaling
                else adapter[name]
            )
            - (target if kind is Tensor else target.numpy())
            for name, target in self.targets[client].items()
        }

    def gradient(self, client: str, adapter: Any, base: Any = None) -> Any:
        """The gradient of a client's loss, for torch or numpy."""
        found = {}
        for name, error in self.errors(client, adapter, base).items():
            if name in self.scaling:
                s, a, b = self.scaling[name], adapter[a_of(name)], adapter[b_of(name)]
                found[a_of(name)] = s * b.T @ error
                found[b_of(name)] = s * error @ a.T
            else:
                found[name] = error
        return found

    def update(self, adapter: Tree, layer: str) -> Tensor:
        """The dense update s B A of a layer, of an adapter or of every row of a stacked one."""
        return self.scaling[layer] * adapter[b_of(layer)] @ adapter[a_of(layer)]


class ToyCohort(Cohort):
    """The clients of a Toy, one after another in plain Python."""

    def __init__(self, toy: Toy, clients: Sequence[str]) -> None:
        self.clients = tuple(clients)
        self.weights = torch.tensor([toy.weights[c] for c in clients], dtype=torch.float64)
        self.initial = toy.initial
        self._toy = toy

    def _whole(self, stacked: Tree, fixed: Tree | None, expand: Expand | None) -> list[Tree]:
        shared = fixed or {}
        stacked = stacked if expand is None else expand(stacked)
        assert not stacked.keys() & shared.keys()
        assert stacked.keys() | shared.keys() == self.initial.keys()
        assert all(t.shape[0] == len(self.clients) for t in stacked.values())
        return [{**shared, **tree.row(stacked, k)} for k in range(len(self.clients))]

    def fit(
        self,
        start: Tree,
        *,
        fixed: Tree | None = None,
        adjust: Adjust | None = None,
        own: Mapping[str, Tree] | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
    ) -> Fit:
        toy, now = self._toy, {name: t.clone() for name, t in start.items()}
        steps = torch.tensor([toy.steps[c] for c in self.clients])
        loss = torch.zeros(len(self.clients), dtype=torch.float64)
        for step in range(int(steps.max())):
            losses = self.losses(now, fixed=fixed, expand=expand, base=base)
            loss += torch.where(step < steps, losses, 0.0)
            gradient = self.gradients(now, fixed=fixed, expand=expand, base=base)
            if adjust is not None:
                active = torch.nonzero(step < steps)[:, 0].tolist()
                gradient = self._adjusted(adjust, gradient, now, own or {}, active)
            for name, value in now.items():
                move = torch.where((step < steps).view(-1, *[1] * (value.dim() - 1)), 1.0, 0.0)
                value -= toy.lr * (move * gradient[name]).to(value.dtype)
        for k, whole in enumerate(self._whole(now, fixed, expand)):
            toy.trained[self.clients[k]] = {n: t.clone() for n, t in whole.items()}
            toy.bases[self.clients[k]] = base or {}
        return Fit(now, loss / steps, steps)

    def _adjusted(
        self,
        adjust: Adjust,
        gradient: Tree,
        now: Tree,
        own: Mapping[str, Tree],
        active: Sequence[int],
    ) -> Tree:
        """``adjust`` on two clients at a time that still step, in reverse: not all the cohort's."""
        found = {name: torch.zeros_like(g) for name, g in gradient.items()}
        for last in range(len(active), 0, -2):
            rows = list(reversed(active[max(last - 2, 0) : last]))
            trees = [tree.rows(t, rows) for t in (gradient, now, *own.values())]
            changed = adjust(trees[0], trees[1], dict(zip(own, trees[2:], strict=True)))
            for name, value in changed.items():
                found[name][rows] = value
        return found

    def gradients(
        self,
        at: Tree,
        *,
        fixed: Tree | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
    ) -> Tree:
        rows = [
            self._toy.gradient(client, whole, base)
            for client, whole in zip(self.clients, self._whole(at, fixed, expand), strict=True)
        ]
        outer = tree.stack(rows)
        if expand is None:
            return {name: outer[name] for name in at}
        leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
        made = expand(leaves)
        found = torch.autograd.grad(
            list(made.values()), list(leaves.values()), [outer[name] for name in made]
        )
        return dict(zip(leaves, found, strict=True))

    def losses(
        self,
        at: Tree,
        *,
        fixed: Tree | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
    ) -> Tensor:
        found = []
        for client, whole in zip(self.clients, self._whole(at, fixed, expand), strict=True):
            errors = self._toy.errors(client, whole, base).values()
            found.append(torch.stack([0.5 * e.square().sum() for e in errors]).sum())
        return torch.stack(found)

    def weight_gradients(self, at: Tree, *, fixed: Tree | None = None) -> Tree:
        rows = zip(self.clients, self._whole(at, fixed, None), strict=True)
        errors = [self._toy.errors(client, whole) for client, whole in rows]
        return tree.stack([{n: e[n] for n in self._toy.scaling} for e in errors])

    def recall(self, name: str, default: Tree) -> Tree:
        kept = [self._toy.memory.get(c, {}).get(name) for c in self.clients]
        return tree.stack([own or tree.row(default, k) for k, own in enumerate(kept)])

    def remember(self, name: str, value: Tree) -> None:
        for k, client in enumerate(self.clients):
            own = {n: t.clone() for n, t in tree.row(value, k).items()}
            self._toy.memory.setdefault(client, {})[name] = own

    def keep(self, name: str, version: int, value: Tree) -> None:
        self._toy.shelf.keep(self.clients, name, version, value)

    def kept(self, name: str, since: int) -> tuple[int, Tree]:
        return self._toy.shelf.kept(self.clients, name, since)


def make(clients: int = 5, dtype: torch.dtype = torch.float64, lora: bool = True) -> Toy:
    """Unequal clients: own targets, weights 1, 2.5, ..., and 1 to 4 local steps.

    With ``lora`` the adapter is LoRA on three layers with B = 0, and a head; else it is IA3-like
    vectors and the head.
    """
    draw = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    shapes: dict[str, tuple[int, ...]] = dict(OTHERS)
    initial = {name: normal(*shape) for name, shape in OTHERS.items()}
    for layer, (d_out, r, d_in, _) in LAYERS.items():
        if lora:
            shapes[layer] = (d_out, d_in)
            initial[a_of(layer)] = normal(r, d_in) / d_in**0.5
            initial[b_of(layer)] = torch.zeros(d_out, r, dtype=torch.float64)
        else:
            shapes[f"{layer}.ia3_l.default"] = (d_out, 1)
            initial[f"{layer}.ia3_l.default"] = torch.ones(d_out, 1, dtype=torch.float64)
    names = [f"client-{k}" for k in range(clients)]
    return Toy(
        initial=tree.sort({n: t.to(dtype) for n, t in initial.items()}),
        scaling={layer: s for layer, (*_, s) in LAYERS.items()} if lora else {},
        targets={c: {n: normal(*shape).to(dtype) for n, shape in shapes.items()} for c in names},
        weights={c: 1.0 + 1.5 * k for k, c in enumerate(names)},
        steps={c: 1 + k % 4 for k, c in enumerate(names)},
    )


@dataclass(frozen=True)
class Played:
    """A run: states before round 1 and after each round, messages both ways, who took part."""

    states: list[Any]
    sent: list[Messages]
    replies: list[Messages]
    present: list[tuple[str, ...]]


Present = Callable[[int, tuple[str, ...]], Iterable[str]]


def everyone(round: int, clients: tuple[str, ...]) -> Iterable[str]:
    return clients


def some(round: int, clients: tuple[str, ...]) -> Iterable[str]:
    """Every other client in round 1, the next two in round 2, all in round 3; a lone one always."""
    if len(clients) == 1:
        return clients
    return {1: clients[::2], 2: clients[1:3]}.get(round, clients)


def play(
    strategy: Strategy[Any], toy: Toy, rounds: int = 3, present: Present = everyone, size: int = 99
) -> Played:
    """Runs ``rounds`` rounds, training in stacks of ``size`` clients."""
    played = Played([strategy.init(toy.problem(rounds))], [], [], [])
    for number in range(1, rounds + 1):
        names = tuple(present(number, toy.clients))
        stacks = addressed(strategy, played.states[-1], number, names)
        parts = [
            strategy.train(p, toy.cohort(p.clients)) for sent in stacks for p in sent.split(size)
        ]
        played.states.append(strategy.receive(played.states[-1], iter(parts)))
        played.sent.extend(stacks)
        played.present.append(names)
        played.replies.extend(parts)
    return played


def arrays(adapter: Tree) -> Arrays:
    """A tree as numpy arrays that share nothing with it."""
    return {name: t.numpy().copy() for name, t in adapter.items()}


def distance(left: Tree, right: Tree) -> float:
    """The largest difference, relative to the largest entry of ``right``; same names and dtypes."""
    tree.check_same(left, right)
    most = max(float((left[n].double() - right[n].double()).abs().max()) for n in left)
    return most / max(float(t.double().abs().max()) for t in right.values())


def meaning(toy: Toy, adapter: Tree, base: Tree) -> Tree:
    """What an adapter on a changed base does: dense updates of layers, other tensors themselves."""
    found = tree.select(adapter, lambda name: ".lora_" not in name)
    for layer in toy.scaling:
        update = toy.update(adapter, layer)
        found[layer] = update + base[layer] if layer in base else update
    return tree.sort(found)


def equal(left: Tree, right: Tree) -> bool:
    """Bit-equal trees."""
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
