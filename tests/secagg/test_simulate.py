"""The sum without masks is the protocol's, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fedpeft.errors import FedpeftError
from fedpeft.secagg.fixed import FixedPoint
from fedpeft.secagg.session import Stage
from fedpeft.secagg.simulate import masked_sum
from tests.secagg.network import World, losing


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("clients", [3, 4, 9])
def test_the_sum_equals_the_protocols_bit_for_bit(clients: int, bits: int) -> None:
    world = World(clients, bits, seed=clients)
    lost = {"client-2": Stage.MASK} if clients > 4 else {}
    total = world.run(world.session(), up=losing(lost)).total()
    rows = [world.vectors[name] for name in total.survivors]
    assert len(rows) == clients - len(lost)
    for vectors in (rows, reversed(rows), [np.stack(rows)], [rows[0], np.stack(rows[1:])]):
        assert masked_sum(vectors, world.fixed).tobytes() == total.values.tobytes()


def test_vectors_may_come_one_by_one() -> None:
    fixed = FixedPoint(32, 1.0, 50, 10)

    def vectors() -> Iterator[np.ndarray]:
        for k in range(50):
            yield np.full(10, k / 50)

    assert np.allclose(masked_sum(vectors(), fixed), sum(range(50)) / 50, atol=1e-6)


def test_what_the_protocol_refuses_is_refused() -> None:
    fixed = FixedPoint(32, 1.0, 4, 2)
    row = np.zeros(2)
    with pytest.raises(FedpeftError, match="2 clients cannot be summed securely"):
        masked_sum([row, row], fixed)
    with pytest.raises(FedpeftError, match="0 clients cannot be summed securely"):
        masked_sum([], fixed)
    with pytest.raises(FedpeftError, match="count is 5"):
        masked_sum([row] * 5, fixed)
    with pytest.raises(FedpeftError, match="not finite"):
        masked_sum([row, row, np.array([0.0, np.nan])], fixed)
