"""Linear algebra on LoRA's factors; no function here forms a dense update.

A layer's update is s B A with A ``[r, d_in]`` and B ``[d_out, r]``; stacked over clients they carry
a leading ``[K]``. Results are float64: who needs another dtype casts once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.streams import torch_stream
from fedpeft.tree import Tree

EXACT = 2048
"""Size up to which a dense matrix is decomposed in full."""


def is_a(name: str) -> bool:
    """Whether a tensor of this name is the factor A of a LoRA layer."""
    return ".lora_A." in name and name.endswith(".weight")


def is_b(name: str) -> bool:
    """Whether a tensor of this name is the factor B of a LoRA layer."""
    return ".lora_B." in name and name.endswith(".weight")


def lora_pairs(initial: Tree, strategy: str) -> dict[str, tuple[str, str]]:
    """Layer -> names of its A and B, for an adapter that is plain LoRA on linear layers.

    The layer is the prefix of both names, as in ``Problem.scaling``. Other trainable tensors, such
    as heads, are passed over. Raises FedpeftError, in the name of ``strategy``, for an adapter
    without LoRA, or with factors that are not matrices, or with a magnitude or an embedding.
    """
    pairs = {n.split(".lora_A.")[0]: (n, n.replace(".lora_A.", ".lora_B.")) for n in initial}
    pairs = {layer: pair for layer, pair in pairs.items() if is_a(pair[0])}
    known = {name for pair in pairs.values() for name in pair if initial[name].dim() == 2}
    odd = [name for name in initial if "lora_" in name and name not in known]
    if odd or not pairs:
        raise FedpeftError(
            f"strategy.name='{strategy}' works on lora_A and lora_B of linear layers; this adapter "
            f"{f'also has {odd[0]!r}' if odd else 'has neither'}: set adapter.kind=lora on linear "
            f"layers (not use_dora), or choose another strategy."
        )
    return pairs


def ranks_of(adapter: Tree, strategy: str) -> dict[str, int]:
    """Layer -> its rank r. Raises FedpeftError as ``lora_pairs``."""
    pairs = lora_pairs(adapter, strategy)
    return {layer: len(adapter[name_a]) for layer, (name_a, _) in pairs.items()}


def fresh_pairs(initial: Tree, strategy: str) -> dict[str, tuple[str, str]]:
    """``lora_pairs`` for strategies that draw factors of their own: B must start from zero."""
    pairs = lora_pairs(initial, strategy)
    for _, name in pairs.values():
        if bool(initial[name].any()):
            raise FedpeftError(
                f"strategy.name='{strategy}' draws its own factors, so B must start from zero, but "
                f"{name!r} does not: leave adapter.init_lora_weights and adapter.start at their "
                f"defaults."
            )
    return pairs


def concatenate(b: Tensor, a: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of ``sum_k w_k B_k A_k``: ``[d_out, K r]`` and ``[K r, d_in]``, float64.

    b ``[K, d_out, r]``, a ``[K, r, d_in]``, weights ``[K]``, which go to one side only.
    """
    weighted = b.double() * weights.to(b.device, torch.float64)[:, None, None]
    return weighted.transpose(0, 1).flatten(1), a.double().flatten(0, 1)


def truncated_svd(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``rank`` singular triples of B A: U ``[d_out, rank]``, S, V^T ``[rank, d_in]``.

    From QR of both factors and the SVD of their small core, O((d_in + d_out) R^2 + R^3) for inner
    dimension R. U and V span the columns of B and the rows of A also where S is zero. Every row of
    V^T has its largest entry positive, so that equal products give equal factors. Triples that a
    matrix of this size cannot have are zero.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    u, s, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    u, s, vt = q_b @ u[:, :rank], s[:rank], vt[:rank] @ q_a.mT
    sign = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True)).sign()
    missing = rank - len(s)
    pad = torch.nn.functional.pad
    return pad(u * sign.mT, (0, missing)), pad(s, (0, missing)), pad(vt * sign, (0, 0, 0, missing))


def orthonormal(rows: int, columns: int, stream: torch.Generator) -> Tensor:
    """Orthonormal rows, uniform over all such matrices, float64 ``[rows, columns]``, on the CPU.

    Raises FedpeftError where there are more rows than columns.
    """
    if rows > columns:
        raise FedpeftError(
            f"adapter.r={rows}: so many vectors of {columns} entries cannot be orthonormal; set "
            f"adapter.r to at most {columns}."
        )
    gaussian = torch.randn(columns, rows, generator=stream, dtype=torch.float64)
    q, upper = torch.linalg.qr(gaussian)
    a: Tensor = q * upper.diagonal().sign()
    return a.mT


def orthonormal_pairs(initial: Tree, strategy: str, seed: int) -> Tree:
    """A with orthonormal rows and B with orthonormal columns for every LoRA layer of ``initial``.

    Each in a stream of its own under ``seed``; names, shapes, dtype and device of ``initial``.
    """
    found = {}
    for name_a, name_b in lora_pairs(initial, strategy).values():
        (r, d_in), d_out, like = initial[name_a].shape, len(initial[name_b]), initial[name_a]
        found[name_a] = orthonormal(r, d_in, torch_stream(seed, strategy, name_a)).to(like)
        up = orthonormal(r, d_out, torch_stream(seed, strategy, name_b))
        found[name_b] = up.to(like).mT.contiguous()
    return found


def squared_norms(adapter: Tree, scaling: Mapping[str, float]) -> Tensor:
    """``sum_layers ||s B_k A_k||_F^2`` of a stacked adapter, ``[K]`` float64; through Grams."""
    found = []
    for layer, s in scaling.items():
        a, b = (adapter[f"{layer}.lora_{x}.default.weight"].double() for x in "AB")
        found.append(s**2 * ((b.mT @ b) * (a @ a.mT)).sum((1, 2)))
    return torch.stack(found).sum(0)


def leading_svd(dense: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples of a matrix: U ``[d_out, rank]``, S, V^T ``[rank, d_in]``.

    float64, signs as ``truncated_svd``. Above EXACT rows and columns by a random sketch of fixed
    seed with 8 more columns and 10 power iterations (Halko et al., arXiv 0909.4061).
    """
    if min(dense.shape) <= EXACT:
        u, s, vt = torch.linalg.svd(dense.double(), full_matrices=False)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(dense.double(), q=rank + 8, niter=10)
        vt = v.mT
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    sign = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True)).sign()
    return u * sign.mT, s, vt * sign
