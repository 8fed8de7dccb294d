"""Spoilt inputs for every parser of ``targets``: its own error or a sound result, nothing else."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

TOKENS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\0", b"\xff", b"1e999", b"-1", b"NaN"]
TOKENS += [b"null", b"true", b"[" * 2000, b"9" * 5000, b"/", b"..", b"&a ", b"*a", b"${x}", b"!!x "]


def spoil(seed: bytes, draw: random.Random) -> bytes:
    """One to four changes: bytes, tokens, pieces moved or cut."""
    data = seed
    for _ in range(draw.randint(1, 4)):
        at, size = draw.randint(0, len(data)), draw.randint(0, 12)
        match draw.randint(0, 5):
            case 0:
                data = data[:at] + draw.randbytes(size) + data[at + size :]
            case 1:
                data = data[:at] + draw.choice(TOKENS) + data[at + size :]
            case 2:
                data = data[:at] + draw.choice(TOKENS) + data[at:]
            case 3:
                data = data[:at] + data[at + size :]
            case 4:
                other = draw.randint(0, len(data))
                data = data[:at] + data[other : other + 4 * size] + data[at:]
            case _:
                data = data[:at]
    return data


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_takes_its_seeds(name: str) -> None:
    target, seeds = TARGETS[name]
    made = seeds()
    assert made
    for seed in made:
        target(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_spoilt_inputs_crash_no_parser(name: str) -> None:
    target, seeds = TARGETS[name]
    made, draw = seeds(), random.Random(name)
    for _ in range(60 if name == "adapter" else 300):
        data = spoil(draw.choice(made), draw)
        try:
            target(data)
        except Exception as error:
            raise AssertionError(f"{name}: {data!r:.2000}") from error


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_crash_no_parser(name: str) -> None:
    target, _ = TARGETS[name]

    @settings(max_examples=30, deadline=None, database=None, derandomize=True)
    @given(st.binary(max_size=200))
    def any_bytes(data: bytes) -> None:
        target(data)

    any_bytes()
