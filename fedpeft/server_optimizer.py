"""A server that takes the clients' mean move as a gradient: what adaptive rules have in common.

Algorithm 2 of Reddi et al., ICLR 2021 (arXiv 2003.00295): with D the weighted mean of the clients'
moves w_k - w, first moment m <- beta1 m + (1 - beta1) D, a rule's own second moment v, and
w <- w + lr m / (sqrt(v) + tau), elementwise and without bias correction. Moments are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.strategy import Replies, weighted_mean
from fedpeft.tree import Tree


@dataclass(frozen=True)
class State:
    """The global adapter and the first and second moment of its moves."""

    adapter: Tree
    first: Tree
    second: Tree


def start(initial: Tree, lr: float, tau: float, betas: Sequence[float]) -> State:
    """The state before round 1: m = 0, v = tau^2.

    Raises FedpeftError unless lr and tau are positive and finite, and 0 <= beta < 1.
    """
    for name, value in (("lr", lr), ("tau", tau)):
        if not 0 < value < math.inf:
            raise FedpeftError(f"strategy.{name}={value!r}: must be a finite number > 0.")
    for number, beta in enumerate(betas, start=1):
        if not 0 <= beta < 1:
            raise FedpeftError(
                f"strategy.beta{number}={beta!r}: the share of the past in a running mean must be "
                f">= 0 and < 1."
            )
    zero = {name: 0.0 * tensor.double() for name, tensor in initial.items()}
    return State(initial, zero, {name: tensor + tau**2 for name, tensor in zero.items()})


def adaptive_step(
    state: State,
    replies: Replies,
    second: Callable[[Tensor, Tensor], Tensor],
    beta1: float,
    lr: float,
    tau: float,
) -> State:
    """The state after a round, by the replies' trees ``adapter`` and their scalars ``weight``.

    second: from v and D of a tensor, float64, the new v.
    """
    mean = weighted_mean(replies, "adapter")
    adapter, m, v = {}, {}, {}
    for name, before in state.adapter.items():
        move = mean[name].double() - before.double()
        m[name] = beta1 * state.first[name] + (1 - beta1) * move
        v[name] = second(state.second[name], move)
        step = lr * m[name] / (v[name].sqrt() + tau)
        adapter[name] = (before.double() + step).to(before.dtype)
    return State(adapter, m, v)
