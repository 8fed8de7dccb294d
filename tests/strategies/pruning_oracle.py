"""Pruned clients of the toy in plain numpy: masks, importances, which groups go, local SGD."""

from __future__ import annotations

import math

import numpy as np
import torch

from fedpeft.pruning.structure import Part
from tests.strategies.toy import LAYERS, Arrays, Toy, a_of, arrays, b_of

Alive = dict[str, np.ndarray]


def mask_of(parts: tuple[Part, ...], alive: Alive) -> Arrays:
    """Layer -> 1 where its update acts."""
    found = {layer: np.ones((o, i)) for layer, (o, _, i, _) in LAYERS.items()}
    for part in parts:
        for member in part.members:
            own = alive[part.name].astype(float)
            found[member.layer] *= own[:, None] if member.side == "rows" else own[None]
    return found


def cut(w: Arrays, rank: int) -> Arrays:
    found = {n: v[:rank] if "lora_A" in n else v for n, v in w.items()}
    return {n: v[:, :rank] if "lora_B" in n else v for n, v in found.items()}


def covers(w: Arrays, parts: tuple[Part, ...], alive: Alive, rank: int) -> Arrays:
    """Name -> which entries of the factors a client of this rank has."""
    found = {}
    for layer, (o, r, i, _) in LAYERS.items():
        there = mask_of(parts, alive)[layer]
        ranks = (np.arange(r) < rank).astype(float)
        found[a_of(layer)] = ranks[:, None] * there.max(0)[None]
        found[b_of(layer)] = there.max(1)[:, None] * ranks[None]
        assert found[a_of(layer)].shape == (r, i) and found[b_of(layer)].shape == (o, r)
    return found


def scored(toy: Toy, parts: tuple[Part, ...], x: Arrays, g: Arrays) -> Alive:
    found = {}
    for part in parts:
        value = np.zeros(part.groups)
        for m in part.members:
            a, b, ga, gb = (w[n(m.layer)] for w in (x, g) for n in (a_of, b_of))
            whole = toy.weight(m.layer).numpy() + toy.scaling[m.layer] * b @ a
            s = np.abs((gb @ a + b @ ga - gb @ ga) * whole)
            value += s.sum(1 if m.side == "rows" else 0)
        found[part.name] = value / (np.linalg.norm(value) + 1e-8)
    return found


def pruned(part: Part, alive: np.ndarray, score: np.ndarray, share: float) -> np.ndarray:
    gone = min(math.floor(share * part.groups + 1e-9), part.groups - 1)
    order = sorted(range(part.groups), key=lambda g: (bool(alive[g]), score[g], g))
    found = alive.copy()
    found[order[:gone]] = False
    return found


def trained(
    toy: Toy, parts: tuple[Part, ...], client: str, start: Arrays, alive: Alive, ema: Alive
) -> Arrays:
    """Changes ``ema``."""
    x, like = start, arrays(toy.initial)
    toy.there[client] = {n: torch.from_numpy(m) for n, m in mask_of(parts, alive).items()}
    for _ in range(toy.steps[client]):
        g = toy.gradient(client, {n: padded(v, like[n]) for n, v in x.items()})
        g = {n: v[tuple(slice(k) for k in x[n].shape)] for n, v in g.items()}
        for name, value in scored(toy, parts, x, g).items():
            ema[name] = 0.9 * ema[name] + 0.1 * value
        x = {n: x[n] - toy.lr * g[n] for n in x}
    toy.there.clear()
    return {n: padded(v, like[n]) for n, v in x.items()}


def padded(value: np.ndarray, like: np.ndarray) -> np.ndarray:
    found = np.zeros_like(like)
    found[tuple(slice(k) for k in value.shape)] = value
    return found
