"""Spoilt payloads: a PayloadError, or numbers that the codec can make; never anything else."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.codecs.wire import Header, read, write
from fedpeft.errors import PayloadError
from tests.codecs.vandal import BASE, LIMIT, SCHEMA, payloads, receive, sealed, spoil


@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_spoilt_payloads_are_refused_or_harmless(seed: int) -> None:
    draw, refused, taken = np.random.default_rng(seed), 0, 0
    for _ in range(1000):
        settings, data = payloads()[int(draw.integers(len(payloads())))]
        bad = spoil(data, draw)
        seal = draw.random() < 0.8
        try:
            receive(settings, sealed(bad) if seal else bad)
            taken += 1
            assert seal or bad == data  # without a new checksum nothing gets through
        except PayloadError as error:
            refused += 1
            assert str(error).startswith("payload: ")
    assert refused > 250 and taken > 50, (refused, taken)


def section(data: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A section with some bytes, bits or its length changed."""
    found = data.copy()
    if len(found) == 0 or draw.random() < 0.2:
        return np.concatenate([found[: int(draw.integers(len(found) + 1))], found[:3]])
    places = draw.integers(0, min(len(found), int(draw.choice([8, 10_000]))), draw.integers(1, 5))
    match int(draw.integers(3)):
        case 0:
            found[places] ^= (1 << draw.integers(0, 8, len(places))).astype(np.uint8)
        case 1:
            found[places] = draw.integers(0, 256, len(places))
        case _:
            found[places[0] : places[0] + 9] = draw.choice([0, 127, 128, 255])
    return found


@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_payloads_with_spoilt_sections_are_refused_or_harmless(seed: int) -> None:
    draw, refused, taken = np.random.default_rng(1000 + seed), 0, 0
    for _ in range(1000):
        settings, data = payloads()[int(draw.integers(len(payloads())))]
        _, arrays = read(data, LIMIT)
        name = sorted(arrays)[int(draw.integers(len(arrays)))]
        arrays[name] = section(arrays[name], draw)
        try:
            receive(settings, write(Header(settings.codec, BASE, SCHEMA, 5), arrays))
            taken += 1
        except PayloadError as error:
            refused += 1
            assert str(error).startswith("payload: ")
    assert refused > 250 and taken > 250, (refused, taken)


def test_payloads_read_with_other_settings_are_refused_or_harmless() -> None:
    draw = np.random.default_rng(9)
    for _ in range(1000):
        settings, _ = payloads()[int(draw.integers(len(payloads())))]
        _, data = payloads()[int(draw.integers(len(payloads())))]
        try:
            receive(settings, data)
        except PayloadError as error:
            assert str(error).startswith("payload: ")
