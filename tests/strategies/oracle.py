"""What the rules in numpy share: local SGD on a Toy, and means by weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from fedpeft.tree import Tree
from tests.strategies.toy import LAYERS, Arrays, Present, Toy, a_of, arrays, b_of

Merge = Callable[[Arrays, Sequence[Arrays], np.ndarray], Arrays]
"""``(w, [w_1, ..., w_m], p) -> the new w``."""


def sgd(
    toy: Toy,
    client: str,
    start: Arrays,
    only: Iterable[str] | None = None,
    change: Callable[[Arrays], Arrays] = lambda gradient: gradient,
) -> Arrays:
    """The client's adapter after its steps; ``only`` names what is trained, by default all."""
    own, names = dict(start), set(start if only is None else only)
    for _ in range(toy.steps[client]):
        gradient = change(toy.gradient(client, own))
        own = {n: v - toy.lr * gradient[n] if n in names else v for n, v in own.items()}
    return own


def shares(toy: Toy, clients: Sequence[str]) -> np.ndarray:
    """p of these clients."""
    weight = np.array([toy.weights[c] for c in clients])
    return weight / weight.sum()


def average(owns: Sequence[Arrays], p: np.ndarray) -> Arrays:
    """sum_k p_k w_k."""
    return {n: sum(p[k] * own[n] for k, own in enumerate(owns)) for n in owns[0]}


def rounds_of(toy: Toy, rounds: int, present: Present, merge: Merge) -> Arrays:
    """Everybody there trains everything from w by SGD; then w = merge(w, [w_k], p)."""
    w = arrays(toy.initial)
    for t in range(1, rounds + 1):
        names = list(present(t, toy.clients))
        w = merge(w, [sgd(toy, c, w) for c in names], shares(toy, names))
    return w


def close(adapter: Tree, expected: Mapping[str, np.ndarray], bound: float = 1e-12) -> bool:
    """Equal to within ``bound``, factor by factor."""
    assert adapter.keys() == expected.keys()
    return all(abs(adapter[n].numpy() - v).max() <= bound for n, v in expected.items())


def dense(toy: Toy, w: Mapping[str, np.ndarray]) -> Arrays:
    """s B A of every layer, and the head."""
    whole = {layer: toy.scaling[layer] * w[b_of(layer)] @ w[a_of(layer)] for layer in LAYERS}
    return whole | {n: v for n, v in w.items() if "lora_" not in n}


def ideal(toy: Toy, clients: Sequence[str]) -> Arrays:
    """The mean by weight of the dense updates (and heads) that these clients trained last."""
    return average([dense(toy, arrays(toy.trained[c])) for c in clients], shares(toy, clients))


def off(found: Arrays, wanted: Arrays) -> float:
    """The largest difference relative to the largest entry."""
    most = max(abs(found[n] - v).max() for n, v in wanted.items())
    return float(most / max(abs(v).max() for v in wanted.values()))
