"""Linear algebra on factors against numpy on the dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.lowrank import concatenate, is_a, is_b, lora_pairs, truncated_svd

SHAPES = [(6, 2, 9), (5, 3, 5), (9, 4, 3), (4, 12, 5), (4, 40, 40)]
"""d_out, R, d_in: wide, square, tall, and more factors than the matrix has rows."""


def factors(d_out: int, r: int, d_in: int, *lead: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*lead, d_out, r, generator=draw, dtype=torch.float64),
        torch.randn(*lead, r, d_in, generator=draw, dtype=torch.float64),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_of_products_is_one_product(shape: tuple[int, int, int]) -> None:
    b, a = factors(*shape, 3)
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    joined_b, joined_a = concatenate(b.float(), a.float(), weights)
    d_out, r, d_in = shape
    assert joined_b.shape == (d_out, 3 * r) and joined_a.shape == (3 * r, d_in)
    wanted = torch.einsum("k,kor,kri->oi", weights, b.float().double(), a.float().double())
    assert float((joined_b @ joined_a - wanted).abs().max()) <= 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 4, 7])
def test_the_truncated_svd_is_that_of_the_dense_product(
    shape: tuple[int, int, int], rank: int
) -> None:
    b, a = factors(*shape)
    u, s, vt = truncated_svd(b, a, rank)
    assert u.shape == (shape[0], rank) and s.shape == (rank,) and vt.shape == (rank, shape[2])
    wanted = np.linalg.svd((b @ a).numpy(), compute_uv=False)
    known = min(rank, *shape)
    assert np.allclose(s[:known], wanted[:known], atol=1e-10) and not bool(s[known:].any())
    tail = float(np.sqrt((wanted[rank:] ** 2).sum()))
    assert float(((u * s) @ vt - b @ a).norm()) == pytest.approx(tail, abs=1e-10)
    eye = torch.eye(known, dtype=torch.float64)
    assert float((vt[:known] @ vt[:known].T - eye).abs().max()) <= 1e-12
    assert float((u[:, :known].T @ u[:, :known] - eye).abs().max()) <= 1e-12
    assert bool((vt.gather(1, vt.abs().argmax(1, keepdim=True))[:known] > 0).all())


def test_equal_products_give_equal_factors() -> None:
    b, a = factors(6, 3, 5)
    mixed = torch.tensor([[1.0, 2, 0], [0, 1, 0], [1, 0, -3]], dtype=torch.float64)
    for left, right in zip(
        truncated_svd(b, a, 3),
        truncated_svd(b @ mixed, torch.linalg.inv(mixed) @ a, 3),
        strict=True,
    ):
        assert float((left - right).abs().max()) <= 1e-12


def test_a_product_of_zero_has_an_orthonormal_basis_of_as_rows_all_the_same() -> None:
    _, a = factors(6, 3, 5)
    _, s, vt = truncated_svd(torch.zeros(6, 3), a, 3)
    assert not bool(s.any())
    assert float((vt @ vt.T - torch.eye(3, dtype=torch.float64)).abs().max()) <= 1e-12
    assert float((vt - vt @ torch.linalg.pinv(a) @ a).abs().max()) <= 1e-12


def test_pairs_are_named_by_their_layer() -> None:
    tree = {
        "x.q.lora_A.default.weight": torch.ones(2, 3),
        "x.q.lora_B.default.weight": torch.ones(3, 2),
        "x.head.modules_to_save.default.weight": torch.ones(2, 2),
    }
    a, b, head = tree
    assert lora_pairs(tree, "flora") == {"x.q": (a, b)}
    assert [is_a(n) for n in tree] == [True, False, False]
    assert [is_b(n) for n in tree] == [False, True, False]
    assert not is_a(head)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x.q.lora_magnitude_vector.default.weight", (3,)),
        ("x.q.lora_embedding_A.default", (2, 3)),
        ("x.conv.lora_A.default.weight", (2, 3, 1, 1)),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(name: str, shape: tuple[int, ...]) -> None:
    tree = {
        "x.q.lora_A.default.weight": torch.ones(2, 3),
        "x.q.lora_B.default.weight": torch.ones(3, 2),
        name: torch.ones(shape),
    }
    if "lora_A" in name:
        tree[name.replace("lora_A", "lora_B")] = torch.ones(3, 2, 1, 1)
    with pytest.raises(FedpeftError, match=rf"'flora'.*also has '{name[:6]}.*adapter\.kind=lora"):
        lora_pairs(tree, "flora")
    with pytest.raises(FedpeftError, match=r"'flora'.*has neither"):
        lora_pairs({"x.ia3_l.default": torch.ones(2)}, "flora")
