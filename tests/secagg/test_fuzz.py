"""Bytes changed on their way: an error or an exclusion, never a crash, never a wrong sum."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.errors import FedpeftError
from fedpeft.secagg.session import Stage
from tests.secagg.network import World, unchanged

STAGES = [stage for stage in Stage if stage is not Stage.DONE]


class Vandal:
    """Changes one client's messages of one stage; knows what it has seen pass."""

    def __init__(self, seed: int, stage: Stage, victims: int) -> None:
        self._draw = np.random.default_rng(seed)
        self._stage = stage
        self._victims = {f"client-{k}" for k in self._draw.permutation(5)[:victims]}
        self._seen: list[bytes] = [b"", b"\x00" * 100]
        self.changed = 0

    def __call__(self, stage: Stage, client: str, blob: bytes) -> bytes | None:
        hit = stage is self._stage and client in self._victims
        result = self._damage(blob) if hit else blob
        self.changed += result != blob
        self._seen.append(blob)
        return result

    def _damage(self, blob: bytes) -> bytes:
        at = int(self._draw.integers(len(blob)))
        size = int(self._draw.integers(1, 9))
        match int(self._draw.integers(7)):
            case 0 | 1:  # a byte, anywhere or in the head
                at = at if self._draw.random() < 0.6 else int(self._draw.integers(60))
                return (
                    blob[:at]
                    + bytes([blob[at] ^ int(self._draw.integers(1, 256))])
                    + blob[at + 1 :]
                )
            case 2:
                return blob[:at]
            case 3:
                return blob[:at] + self._draw.bytes(size) + blob[at:]
            case 4:
                return blob[:at] + blob[at + size :]
            case 5:
                return blob[:at] + self._draw.bytes(min(size, len(blob) - at)) + blob[at + size :]
            case _:  # another message that passed
                return self._seen[int(self._draw.integers(len(self._seen)))]


def wrecked(stage: Stage, way: str, seeds: range) -> None:
    sums = changed = 0
    for seed in seeds:
        world = World(5, seed=seed % 7)
        vandal = Vandal(seed, stage, victims=1 + seed % 3)
        session = world.session()
        try:
            if way == "down":
                world.run(session, vandal, unchanged)
            else:
                world.run(session, unchanged, vandal)
        except FedpeftError:
            pass
        else:
            total = session.total()
            assert np.array_equal(total.values, world.expected(total.survivors))
            sums += 1
        changed += vandal.changed
    assert changed > len(seeds)
    assert sums > len(seeds) // 6  # one client of five may be lost, two may not


@pytest.mark.parametrize("way", ["down", "up"])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.value)
def test_changed_bytes_never_give_a_wrong_sum(stage: Stage, way: str) -> None:
    wrecked(stage, way, range(9))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["down", "up"])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.value)
def test_many_changed_bytes_never_give_a_wrong_sum(stage: Stage, way: str) -> None:
    wrecked(stage, way, range(100, 400))
