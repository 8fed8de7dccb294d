"""Which clients take part in a round, and which of them drop out; both fixed by the seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import numpy as np

from fedpeft import streams
from fedpeft.config import Sampling
from fedpeft.errors import FedpeftError
from fedpeft.names import Roster


def check(sampling: Sampling, clients: int) -> None:
    """Raises FedpeftError when a fixed-size cohort asks for more clients than there are."""
    if sampling.kind == "fixed" and sampling.size > clients:
        raise FedpeftError(
            f"rounds.sampling.size={sampling.size} but there are only {clients} clients: lower it, "
            f"raise partition.clients, or use rounds.sampling.kind=uniform."
        )
    if sampling.kind == "cyclic" and sampling.groups > clients:
        raise FedpeftError(
            f"rounds.sampling.groups={sampling.groups} but there are only {clients} clients: lower "
            f"it, or raise partition.clients."
        )


def expected(sampling: Sampling, clients: int) -> float:
    """The expected number of clients per round."""
    if sampling.kind == "uniform":
        return float(max(1, round(sampling.fraction * clients)))
    if sampling.kind == "fixed":
        return float(min(sampling.size, clients))
    if sampling.kind == "cyclic":
        return clients / sampling.groups
    return sampling.rate * clients


def draw(
    sampling: Sampling,
    clients: Collection[str],
    seed: int,
    round_: int,
    secret: Callable[[int], np.ndarray] | None = None,
) -> tuple[str, ...]:
    """The clients of a round, sorted. Poisson sampling may draw none.

    Of a ``Roster`` no more names are read than are drawn. secret: draws in place of the seed's
    stream, ``count -> float64 [count]`` in (0, 1), where nobody may know who takes part.
    """
    names = clients.names if isinstance(clients, Roster) else sorted(clients)
    stream = streams.numpy_stream(seed, "sampling", round_)
    if sampling.kind == "poisson":
        index = np.flatnonzero((secret or stream.random)(len(names)) < sampling.rate)
    elif sampling.kind == "cyclic":
        check(sampling, len(names))
        order = streams.numpy_stream(seed, "sampling groups").permutation(len(names))
        index = np.sort(order[(round_ - 1) % sampling.groups :: sampling.groups])
    else:
        check(sampling, len(names))
        size = int(expected(sampling, len(names)))
        index = np.sort(stream.choice(len(names), size=size, replace=False))
    return tuple(names[i] for i in index.tolist())


def measured(most: int, clients: Collection[str], seed: int) -> tuple[str, ...]:
    """The clients that are measured at the end: all, or ``most`` of them, drawn by the seed."""
    size = min(most or len(clients), len(clients))
    return draw(Sampling("fixed", size=size), clients, seed, 0)


def draw_failures(rate: float, clients: Iterable[str], seed: int, round_: int) -> set[str]:
    """The clients that drop out of a round, each with probability ``rate``, from its own stream."""
    return {
        name
        for name in clients
        if rate > 0 and streams.numpy_stream(seed, "failure", round_, name).random() < rate
    }
