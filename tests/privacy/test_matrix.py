"""Banded noise against matrices and brute force, and the table of the specification."""

from __future__ import annotations

import itertools
import math
from collections import deque

import numpy as np
import pytest
import torch

from fedpeft.errors import FedpeftError
from fedpeft.privacy.matrix import (
    best_bands,
    coefficients,
    correlated,
    prefix_error,
    sensitivity,
)


def banded(bands: int, rounds: int) -> np.ndarray:
    """C as a matrix."""
    matrix = np.zeros((rounds, rounds))
    for row, column in itertools.product(range(rounds), repeat=2):
        k = row - column
        if 0 <= k < bands:
            matrix[row, column] = math.comb(2 * k, k) / 4**k
    return matrix


def test_all_bands_are_the_square_root_of_prefix_sums() -> None:
    c = banded(40, 40)
    assert np.allclose(c @ c, np.tril(np.ones((40, 40))), atol=1e-12)
    assert np.allclose(coefficients(40), c[:, 0], rtol=1e-14)
    assert coefficients(1).tolist() == [1.0]
    assert coefficients(4).tolist() == [1.0, 1 / 2, 3 / 8, 5 / 16]


TABLE = {1: (2.236, 15.89), 5: (2.796, 8.47), 10: (2.993, 6.80), 20: (3.175, 5.79),
         50: (4.248, 6.59), 100: (4.818, 7.18)}  # fmt: skip


@pytest.mark.parametrize("bands", TABLE)
def test_the_table_of_100_rounds_separation_20_and_5_participations(bands: int) -> None:
    sens, error = TABLE[bands]
    assert sensitivity(bands, 100, 20, 5) == pytest.approx(sens, abs=6e-4)
    assert prefix_error(bands, 100, 20, 5) == pytest.approx(error, abs=6e-3)


@pytest.mark.parametrize(("bands", "rounds"), [(1, 9), (4, 9), (9, 9), (3, 30), (20, 7)])
def test_the_prefix_error_is_that_of_the_matrices(bands: int, rounds: int) -> None:
    noise = np.tril(np.ones((rounds, rounds))) @ np.linalg.inv(banded(bands, rounds))
    rms = math.sqrt(np.mean(np.sum(noise**2, axis=1)))
    expected = rms * sensitivity(bands, rounds, 4, 2)
    assert prefix_error(bands, rounds, 4, 2) == pytest.approx(expected, rel=1e-12)


def brute_force(bands: int, rounds: int, separation: int, participations: int) -> float:
    """Over every schedule that the promise allows, and every sign of the client's updates."""
    c, worst = banded(bands, rounds), 0.0
    for k in range(1, participations + 1):
        for times in itertools.combinations(range(rounds), k):
            if any(b - a < separation for a, b in itertools.pairwise(times)):
                continue
            for signs in itertools.product((1.0, -1.0), repeat=k - 1):
                column = c[:, list(times)] @ np.array([1.0, *signs])
                worst = max(worst, float(np.linalg.norm(column)))
    return worst


@pytest.mark.parametrize(
    ("bands", "rounds", "separation", "participations"),
    [(1, 8, 2, 3), (3, 9, 3, 3), (3, 8, 3, 3), (2, 9, 4, 2), (5, 9, 2, 3), (9, 9, 1, 4),
     (4, 10, 3, 2), (6, 6, 2, 9), (8, 5, 3, 1), (3, 4, 9, 5)],
)  # fmt: skip
def test_the_sensitivity_is_the_worst_of_all_schedules(
    bands: int, rounds: int, separation: int, participations: int
) -> None:
    found = sensitivity(bands, rounds, separation, participations)
    assert found == pytest.approx(brute_force(bands, rounds, separation, participations), rel=1e-12)


@pytest.mark.parametrize(("bands", "separation"), [(1, 1), (4, 4), (3, 10), (10, 10)])
def test_bands_that_do_not_overlap_have_the_closed_form(bands: int, separation: int) -> None:
    for participations in (1, 2, 7):
        rounds = separation * participations
        closed = math.sqrt(participations * float(np.sum(coefficients(bands) ** 2)))
        assert sensitivity(bands, rounds, separation, participations) == pytest.approx(
            closed, rel=1e-13
        )


@pytest.mark.parametrize("bands", [1, 2, 7, 30])
def test_the_recurrence_is_the_inverse_of_the_matrix(bands: int) -> None:
    rounds = 30
    z = torch.randn(rounds, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept: deque[torch.Tensor] = deque(maxlen=bands - 1)
    everything: list[torch.Tensor] = []
    c = coefficients(bands).tolist()
    for t in range(rounds):
        before = z[t].clone()
        y = correlated(z[t], kept, c)
        assert torch.equal(y, correlated(z[t], everything, c))  # more than is needed does no harm
        assert torch.equal(z[t], before) and y.data_ptr() != z[t].data_ptr()
        kept.append(y)
        everything.append(y)
    expected = np.linalg.solve(banded(bands, rounds), z.reshape(rounds, -1).numpy())
    found = torch.stack(everything).reshape(rounds, -1).numpy()
    assert np.abs(found - expected).max() < 1e-12


def test_the_best_bands_have_the_least_error() -> None:
    assert best_bands(100, 20) == 20
    assert best_bands(50, 1) == 1
    for rounds, separation in ((30, 7), (12, 40), (60, 30)):
        best = best_bands(rounds, separation)
        most = math.ceil(rounds / separation)
        errors = [
            prefix_error(b, rounds, separation, most) for b in range(1, min(rounds, separation) + 1)
        ]
        assert prefix_error(best, rounds, separation, most) == min(errors)
        assert min(errors) < errors[0] * 0.9


@pytest.mark.parametrize("value", [0, -1, 1.0, True])
def test_counts_must_be_counts(value: int) -> None:
    for arguments in ((value, 9, 2, 2), (2, value, 2, 2), (2, 9, value, 2), (2, 9, 2, value)):
        with pytest.raises(FedpeftError, match="whole number from 1"):
            sensitivity(*arguments)
    with pytest.raises(FedpeftError, match="bands="):
        coefficients(value)
    with pytest.raises(FedpeftError, match="separation="):
        best_bands(10, value)
