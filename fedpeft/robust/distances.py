"""Matrices of updates ``[n, P]``: checked, read in blocks of columns, and how far rows are apart.

Everything is computed in float64. No function copies a whole matrix: a block of columns at a time
is converted, so that 100 updates of 10 million numbers need little beside themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedpeft.errors import FedpeftError

BLOCK = 1 << 22
"""Numbers that are converted at a time."""


def blocks(updates: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The columns of ``[n, P]`` from left to right: where they lie, and ``[n, width]`` float64."""
    width = max(1, BLOCK // max(1, len(updates)))
    for start in range(0, updates.shape[1], width):
        part = slice(start, min(start + width, updates.shape[1]))
        yield part, updates[:, part].double()


def squared_norms(updates: Tensor) -> Tensor:
    """The squared Euclidean norm of every row, float64 ``[n]``; NaN or Inf where a row has any."""
    total = updates.new_zeros(len(updates), dtype=torch.float64)
    for _, block in blocks(updates):
        total += block.square().sum(dim=1)
    return total


def usable(updates: Tensor) -> Tensor:
    """Which rows the rules accept, bool ``[n]``: those whose squared norm is finite in float64.

    In float32 and below these are the rows without NaN and Inf. In float64 entries near 1e154 and
    above are out too: an attacker who is not left out here would have every rule refuse the round.
    """
    return torch.isfinite(squared_norms(updates))


def check(updates: Tensor) -> None:
    """Raises FedpeftError unless ``updates`` is ``[n, P]``, floating point, with usable rows."""
    if updates.dim() != 2 or not updates.is_floating_point():
        raise FedpeftError(
            f"updates of shape {tuple(updates.shape)} and dtype {updates.dtype}: give one row of "
            "floating point numbers per client, [n, P]."
        )
    bad = torch.nonzero(~usable(updates)).flatten().tolist()
    if bad:
        raise FedpeftError(
            f"updates has NaN, Inf or overflowing numbers in row {bad[0]} ({len(bad)} such rows): "
            "exclude these clients first; fedpeft.robust.distances.usable says which."
        )


def squared_distances(updates: Tensor) -> Tensor:
    """Squared Euclidean distances between all rows, float64 ``[n, n]``, zero on the diagonal.

    ||u - v||^2 = ||u||^2 + ||v||^2 - 2 <u, v>, from the Gram matrix: O(n^2 P) in matrix products.
    Give differences to the adapter that was sent, not adapters: the error is about 1e-16 of the
    squared norms, so what all rows share costs accuracy.
    """
    check(updates)
    gram = updates.new_zeros((len(updates),) * 2, dtype=torch.float64)
    for _, block in blocks(updates):
        gram += block @ block.T
    return _from_gram(gram)


def product_distances(
    pairs: Mapping[str, tuple[Tensor, Tensor]], scaling: Mapping[str, float]
) -> Tensor:
    """``sum_layers ||s (B_i A_i - B_j A_j)||_F^2`` between all clients, float64 ``[n, n]``.

    pairs: layer -> A ``[n, r, d_in]`` and B ``[n, d_out, r]``, the factors themselves and not their
    differences to what was sent, which cancels between clients. scaling: layer -> s. No product is
    formed: <B_i A_i, B_j A_j> = tr((B_i^T B_j)(A_j A_i^T)), O(n^2 r^2 (d_in + d_out)) per layer,
    and memory for two matrices ``[n r, n r]``. For other trainable tensors, such as a head, add
    ``squared_distances`` of these. Raises FedpeftError where the result is not finite.
    """
    if not pairs:
        raise FedpeftError("pairs is empty: distances between products need LoRA layers.")
    total = torch.zeros(())
    for layer, (a, b) in pairs.items():
        (n, r, _), rows, columns = a.shape, a.double().flatten(0, 1), b.double().mT.flatten(0, 1)
        inner = (rows @ rows.T) * (columns @ columns.T)
        total = total + scaling[layer] ** 2 * inner.view(n, r, n, r).sum((1, 3))
    if not bool(torch.isfinite(total).all()):
        raise FedpeftError(
            "pairs holds NaN, Inf or numbers whose products overflow: exclude these clients first."
        )
    return _from_gram(total)


def _from_gram(gram: Tensor) -> Tensor:
    square = gram.diagonal()
    found = (square[:, None] + square - 2 * gram).clamp_min(0)
    return found.fill_diagonal_(0)
