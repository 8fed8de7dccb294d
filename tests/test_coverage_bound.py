"""What the theory of masked averaging says, on quadratics: where it ends.

Zhou et al. (arXiv 2310.08670): ||grad F||^2 settles at a floor of the order of delta^2 / Gamma_min.
Ten clients with one quadratic in 80 dimensions, noisy gradients and static masks by quarters of the
optimum's magnitude; five problems at once.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.coverage import Coverage, reduction
from fedpeft.masks import Ask, choose

SIZE, PROBLEMS, CLIENTS, STEPS, ROUNDS, LAST, RATE = 80, 5, 10, 5, 400, 50, 0.5


def problems(dense: bool) -> tuple[Tensor, Tensor]:
    """Hessians with eigenvalues from 0.1 to 1, ``[P, d, d]``, and optima ``[P, d]``."""
    hessians, optima = [], []
    for seed in range(PROBLEMS):
        rng, values = np.random.default_rng(100 + seed), np.linspace(0.1, 1, SIZE)
        turn = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0] if dense else np.eye(SIZE)
        hessians.append(turn * values @ turn.T)
        optima.append(rng.normal(size=SIZE))
    return torch.from_numpy(np.stack(hessians)), torch.from_numpy(np.stack(optima))


def floor(code: str, dense: bool = True, noise: float = 0.2) -> tuple[float, float, int]:
    """||grad F||^2 in the last rounds, delta^2 there, and Gamma_min."""
    hessian, optimum = problems(dense)
    names, types = tuple("abcdefghij"), tuple(float(kind) for kind in code)
    parts = [choose("quartile", own.abs(), Ask(names, types, 0, 0), "") for own in optimum]
    mask = torch.stack(parts, dim=1)  # [K, P, d]
    draw = torch.Generator().manual_seed(1)
    x = torch.zeros(PROBLEMS, SIZE, dtype=torch.float64)
    ends, noises, least = [], [], CLIENTS
    for t in range(ROUNDS):
        if t >= ROUNDS - LAST:
            masks = [{"x": mask[:, p]} for p in range(PROBLEMS)]
            noises.append([float(reduction({"x": x[p]}, m).max()) for p, m in enumerate(masks)])
        own = torch.where(mask, x, 0.0)
        for _ in range(STEPS):
            gradient = torch.einsum("kpd,pde->kpe", own - optimum, hessian)
            gradient += noise * torch.randn(own.shape, generator=draw, dtype=torch.float64)
            own = own - RATE * torch.where(mask, gradient, 0.0)
        cover = Coverage({"x": x})
        cover.add({"x": own}, {"x": mask}, torch.ones(CLIENTS))
        x, least = cover.mean()["x"], min(least, cover.least())
        if t >= ROUNDS - LAST:
            gradient = torch.einsum("pd,pde->pe", x - optimum, hessian)
            ends.append(float(gradient.square().sum(1).mean()))
    return float(np.mean(ends)), float(np.mean(noises)), least


def test_the_floor_beyond_that_of_full_masks_falls_with_gamma_at_equal_reduction() -> None:
    """1111444444 is left out of the ratios: its delta^2 is too small for a stable one."""
    codes = {"1444777777": 1, "2233445677": 5, "1234556677": 5, "1111223344": 8}
    full, none, ten = floor("1111111111")
    assert none == 0.0 and ten == 10
    ratios = {}
    for code, gamma in codes.items():
        own, reduced, least = floor(code)
        assert least == gamma and 0 < reduced < 1 and own > full
        ratios[code] = (own - full) / reduced
    assert full < floor("1111444444")[0]
    one, five, other, eight = (ratios[code] for code in codes)
    assert one > 1.5 * max(five, other) and min(five, other) > 2 * eight


@pytest.mark.parametrize("code", ["1111223344", "1444777777", "2233445677"])
def test_without_noise_and_coupling_the_optimum_is_reached_exactly(code: str) -> None:
    own, reduced, _ = floor(code, dense=False, noise=0.0)
    assert own < 1e-20 and reduced > 0.01
    assert floor(code, dense=True, noise=0.0)[0] > 1e-3, "coupled, masks leave an error"
