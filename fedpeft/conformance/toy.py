"""A federation in which every number is known, so that strategies are checked without a model.

Client k has a target for every LoRA layer's update and for every other tensor; its loss is
1/2 sum_layers ||s B A - M_k||^2 + 1/2 sum_others ||w - T_k||^2. Local training is plain SGD with a
number of steps per client; the gradient is written by hand, for torch and numpy alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft import tree
from fedpeft.cohort.shelf import Shelf
from fedpeft.conformance import toy_structure
from fedpeft.philox import normals
from fedpeft.pruning.structure import Structure
from fedpeft.strategy import Adjust, Cohort, Expand, Fit, Problem, Route, Walk
from fedpeft.tree import Tree

Arrays = dict[str, np.ndarray]
"""A tree in numpy."""

LAYERS = {
    "base_model.model.bert.layer.0.query": (4, 2, 5, 2.0),
    "base_model.model.bert.layer.1.query": (4, 3, 4, 0.5),
    "base_model.model.bert.layer.1.value": (4, 3, 4, 1.5),
    "base_model.model.transformer.h.0.attn.c_attn": (6, 2, 3, 0.8),
}
"""LoRA layer -> d_out, r, d_in, s: one wide, two square of equal shape, one tall; no s is 1."""

FAN_IN_FAN_OUT = ("base_model.model.transformer.h.0.attn.c_attn",)
"""Layers whose frozen weight is stored as ``[d_in, d_out]`` (``Conv1D``); their A and B are not."""

OTHERS = {
    "base_model.model.classifier.modules_to_save.default.weight": (3, 4),
    "base_model.model.classifier.modules_to_save.default.bias": (3,),
}
"""The head's tensors -> shape."""

STEPS = 4
"""Steps of a walk."""


def a_of(layer: str) -> str:
    """The name of a layer's A ``[r, d_in]``."""
    return f"{layer}.lora_A.default.weight"


def b_of(layer: str) -> str:
    """The name of a layer's B ``[d_out, r]``."""
    return f"{layer}.lora_B.default.weight"


@dataclass
class Toy:
    """The clients, and what became of them.

    initial: every trainable tensor. scaling: LoRA layer -> s. targets: client -> what it fits.
    weights, steps: client -> aggregation weight, local steps. lr: of everybody's SGD; stride: of
    everybody's walks, whose steps along random directions must be shorter.
    pretraining: which pretrained weights there are. memory:
    client -> the private memory that the strategy keeps there. trained, bases: client -> its whole
    adapter after its last local training, and the change of the base that it trained on. moved:
    names of the model's tensors that local trainings were asked to train so far. shelf: what
    clients were given once and keep. asked: what of their data they were asked for beside ``fit``
    and ``walk``. walked: whether they were asked for that.
    """

    initial: Tree
    scaling: dict[str, float]
    targets: dict[str, Tree]
    weights: dict[str, float]
    steps: dict[str, int]
    lr: float = 0.05
    stride: float = 1e-3
    pretraining: int = 0
    memory: dict[str, dict[str, Tree]] = field(default_factory=dict)
    trained: dict[str, Tree] = field(default_factory=dict)
    bases: dict[str, Tree] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)
    shelf: Shelf = field(default_factory=Shelf)
    asked: set[str] = field(default_factory=set)
    walked: bool = False
    there: dict[str, Tree] = field(default_factory=dict)

    @property
    def clients(self) -> tuple[str, ...]:
        """All clients' names."""
        return tuple(self.targets)

    def problem(self, rounds: int = 3, seed: int = 7) -> Problem:
        """What a strategy is told before round 1."""
        known = self.initial, self.scaling, self.clients, rounds, seed
        given = self.weight, self.public_gradients
        structure = partial(toy_structure.make, self.initial, self.scaling, self.weight)
        return Problem(*known, *given, STEPS, self.stride, structure)

    def weight(self, layer: str) -> Tensor:
        """A pretrained weight ``[d_out, d_in]``; the losses do not depend on it."""
        d_out, d_in = len(self.initial[b_of(layer)]), self.initial[a_of(layer)].shape[1]
        draw = torch.Generator().manual_seed(100 * self.pretraining + list(LAYERS).index(layer))
        return torch.randn(d_out, d_in, generator=draw)

    def public_gradients(self) -> Tree:
        """The gradient by the frozen weights of a loss on data of the server's own."""
        like = self.initial[a_of(next(iter(self.scaling)))]
        return {layer: self.weight(layer).to(like).mT.flip(0).mT for layer in self.scaling}

    def cohort(self, clients: Sequence[str]) -> ToyCohort:
        """A cohort of these clients."""
        return ToyCohort(self, clients)

    def errors(self, client: str, adapter: Any, base: Any = None) -> Any:
        """What a client's adapter (torch or numpy) lacks: s B A - M of layers, w - T of others.

        base: change of the frozen weights, by layer, in addition. ``there``: 0 where it is pruned.
        """
        plain, found = type(next(iter(adapter.values()))) is not Tensor, {}
        for name, target in self.targets[client].items():
            there = self.there.get(client, {}).get(name)
            error = adapter[name] if name not in self.scaling else self.update(adapter, name)
            error = error + (base[name] if base and name in base else 0.0)
            error = error - (target.numpy() if plain else target)
            found[name] = error if there is None else error * (there.numpy() if plain else there)
        return found

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

    def update(self, adapter: Any, layer: str) -> Any:
        """The dense update s B A of a layer, of an adapter or of every row of a stacked one."""
        return self.scaling[layer] * adapter[b_of(layer)] @ adapter[a_of(layer)]


class ToyCohort(Cohort):
    """The clients of a Toy, one after another in plain Python.

    It is as strict as a real cohort, and raises ValueError where one would compute nonsense.
    """

    def __init__(self, toy: Toy, clients: Sequence[str]) -> None:
        self.clients = tuple(clients)
        self.weights = torch.tensor([toy.weights[c] for c in clients], dtype=torch.float64)
        self.initial = toy.initial
        self.lr = toy.lr
        self._toy = toy

    def _whole(self, stacked: Tree, fixed: Tree | None, expand: Expand | None) -> list[Tree]:
        shared, k = fixed or {}, len(self.clients)
        for name, value in stacked.items():
            if value.shape[:1] != (k,):
                raise ValueError(
                    f"{name} was given as {tuple(value.shape)}; for {k} clients it is ({k}, ...)"
                )
        stacked = stacked if expand is None else expand(stacked)
        named = {*stacked, *shared}
        if named != set(self.initial) or len(stacked) + len(shared) != len(named):
            raise ValueError(
                f"start and fixed must name every trainable tensor once: missing "
                f"{sorted(set(self.initial) - named)[:3]}, unknown "
                f"{sorted(named - set(self.initial))[:3]}, twice {sorted({*stacked} & {*shared})}"
            )
        for name, like in self.initial.items():
            want = (k, *like.shape) if name in stacked else tuple(like.shape)
            got = tuple((stacked if name in stacked else shared)[name].shape)
            if got != want:
                raise ValueError(f"{name} was given as {got}; for {k} clients it is {want}")
        return [{**shared, **tree.row(stacked, i)} for i in range(k)]

    def fit(
        self,
        start: Tree,
        *,
        fixed: Tree | None = None,
        adjust: Adjust | None = None,
        own: Mapping[str, Tree] | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
        steps: int | None = None,
    ) -> Fit:
        toy, now = self._toy, {name: t.clone() for name, t in start.items()}
        shared = {"fixed": fixed or {}, "base": base or {}}
        before = {part: {n: t.clone() for n, t in own.items()} for part, own in shared.items()}
        counts, loss = self._counts(steps), torch.zeros(len(self.clients), dtype=torch.float64)
        for step in range(int(counts.max())):
            losses = self._losses(now, fixed, expand, base)
            loss += torch.where(step < counts, losses, 0.0)
            gradient = self._gradients(now, fixed, expand, base)
            if adjust is not None:
                active = torch.nonzero(step < counts).flatten().tolist()
                gradient = self._adjusted(adjust, gradient, now, own or {}, active)
            for name, value in now.items():
                move = torch.where((step < counts).view(-1, *[1] * (value.dim() - 1)), 1.0, 0.0)
                value -= toy.lr * (move * gradient[name]).to(value.dtype)
        for part, tensors in shared.items():
            _unwritten(f"the trees given as {part}", before[part], tensors)
        self._note(now, fixed, expand, base)
        return Fit(now, loss / counts, counts)

    def _note(
        self, now: Tree, fixed: Tree | None, expand: Expand | None, base: Tree | None
    ) -> None:
        """Writes down what was trained, and by whom."""
        toy = self._toy
        toy.moved |= self.initial.keys() - (fixed or {}).keys()
        for client, whole in zip(self.clients, self._whole(now, fixed, expand), strict=True):
            toy.trained[client] = {n: t.clone() for n, t in whole.items()}
            toy.bases[client] = {n: t.clone() for n, t in (base or {}).items()}

    def walk(
        self,
        start: Tree,
        route: Route,
        *,
        fixed: Tree | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
    ) -> Walk:
        now, seeds, reach = start, route.seeds, route.reach
        rates = torch.ones(seeds.shape) if route.factors is None else route.factors
        moves, losses = [], []
        for t in range(seeds.shape[1]):
            z = {
                name: normals(seeds[:, t], i, start[name][0].numel()).to(now[name])
                for i, name in enumerate(sorted(start))
            }
            z = {name: value.view(now[name].shape) for name, value in z.items()}
            both = [{n: x + s * z[n] for n, x in now.items()} for s in (reach, -reach)]
            ends = [self._losses(end, fixed, expand, base) for end in both]
            apart = ends[0] - ends[1]
            taken = torch.isfinite(apart) & (apart.abs() <= route.cap)
            step = (self._toy.stride * rates[:, t] * apart / (2 * reach)).to(ends[0])
            moves.append(torch.where(taken, step, 0.0))
            losses.append(torch.where(taken, (ends[0] + ends[1]) / 2, math.nan))
            own = {n: moves[t].view(-1, *[1] * (x.dim() - 1)) for n, x in now.items()}
            now = {n: x - (own[n] * z[n]).to(x) for n, x in now.items()}
        self._note(now, fixed, expand, base)
        self._toy.walked = True
        return Walk(now, torch.stack(moves, 1), torch.stack(losses, 1).nanmean(1))

    def _counts(self, steps: int | None) -> Tensor:
        """Steps of every client, ``[K]``."""
        if steps is None:
            return torch.tensor([self._toy.steps[c] for c in self.clients])
        self._toy.asked.add("steps")
        return torch.full((len(self.clients),), steps)

    def _adjusted(
        self,
        adjust: Adjust,
        gradient: Tree,
        now: Tree,
        own: Mapping[str, Tree],
        active: Sequence[int],
    ) -> Tree:
        """``adjust`` on two clients at a time that still step, in reverse.

        Rows in flight are not the cohort's; what adjust is given must not be written to.
        """
        found = {name: torch.zeros_like(g) for name, g in gradient.items()}
        for last in range(len(active), 0, -2):
            rows = list(reversed(active[max(last - 2, 0) : last]))
            trees = [tree.rows(t, rows) for t in (gradient, now, *own.values())]
            kept = [{n: x.clone() for n, x in t.items()} for t in trees[1:]]
            changed = adjust(trees[0], trees[1], dict(zip(own, trees[2:], strict=True)))
            for before, after in zip(kept, trees[1:], strict=True):
                _unwritten("the adapter, or own, that adjust was given", before, after)
            tree.check_same(changed, trees[0], "what adjust returned and the gradient")
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
        self._toy.asked.add("gradients")
        return self._gradients(at, fixed, expand, base)

    def _gradients(
        self, at: Tree, fixed: Tree | None, expand: Expand | None, base: Tree | None
    ) -> Tree:
        whole = zip(self.clients, self._whole(at, fixed, expand), strict=True)
        outer = tree.stack([self._toy.gradient(client, own, base) for client, own in whole])
        if expand is None:
            return {name: outer[name] for name in at}
        leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
        made = {n: x for n, x in expand(leaves).items() if x.requires_grad}
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
        most: int | None = None,
    ) -> Tensor:
        self._toy.asked.add("losses")
        return self._losses(at, fixed, expand, base)

    def structure(self) -> Structure:
        return self._toy.problem().structure()

    def pruned(self, alive: Tree) -> AbstractContextManager[None]:
        self._toy.asked.add("pruned")
        return toy_structure.pruned(self._toy.there, self.clients, self.structure(), alive)

    def _losses(
        self, at: Tree, fixed: Tree | None, expand: Expand | None, base: Tree | None
    ) -> Tensor:
        found = []
        for client, whole in zip(self.clients, self._whole(at, fixed, expand), strict=True):
            errors = self._toy.errors(client, whole, base).values()
            found.append(torch.stack([0.5 * e.square().sum() for e in errors]).sum())
        return torch.stack(found)

    def weight_gradients(self, at: Tree, *, fixed: Tree | None = None) -> Tree:
        self._toy.asked.add("weight_gradients")
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


def _unwritten(what: str, before: Tree, after: Tree) -> None:
    for name, value in before.items():
        if not torch.equal(value.nan_to_num(), after[name].nan_to_num()):
            raise ValueError(f"the strategy wrote into {what}: {name} changed")


def make(clients: int = 5, dtype: torch.dtype = torch.float64, lora: bool = True) -> Toy:
    """Unequal clients: own targets, weights 1, 2.5, ..., and 1 to 4 local steps.

    With ``lora`` the adapter is LoRA on four layers with B = 0, and a head; else it is IA3-like
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
