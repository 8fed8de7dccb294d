"""Schemas: what both ends must mean, and what a hostile one may not do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fedpeft.codecs import wire
from fedpeft.codecs.settings import Codec
from fedpeft.comms.downlink import Downlink
from fedpeft.comms.schema import Schema
from fedpeft.errors import PayloadError
from fedpeft.tree import broadcast

BASE = "0123456789abcdef"
TREES = {
    "adapter": {
        "a": torch.ones(2, 3),
        "b": torch.arange(4, dtype=torch.int32),
        "c.modules_to_save.default.weight": torch.ones(5, dtype=torch.float64),
        "none": torch.zeros(0, 7),
    },
    "empty": {},
}


def test_a_schema_survives_the_wire() -> None:
    schema = Schema.of(TREES)
    again = Schema.parse(schema.text)
    assert again == schema and again.digest == schema.digest
    assert [(p.kind, p.size) for p in schema.parts] == [("adapter", 6), ("head", 5)]
    assert [e.name for e in schema.exact] == ["b"] and schema.dense == 24 + 16 + 40


def test_trees_are_put_together_again() -> None:
    schema = Schema.of(TREES)
    stacked = {tree: broadcast(own, 2) for tree, own in TREES.items()}
    rows = [part.pack(stacked) for part in schema.parts]
    found = schema.join(rows, schema.untouched(stacked))
    assert found.keys() == TREES.keys()
    for tree, own in TREES.items():
        assert found[tree].keys() == own.keys()
        for name, value in own.items():
            assert torch.equal(found[tree][name].to(value.dtype), stacked[tree][name])


def texts() -> list[bytes]:
    entry = ["adapter", "a", [2, 3], "float32"]
    wrong: list[object] = [
        entry,
        [[entry]],
        [[entry], [], 1],
        [[[*entry, 1]], []],
        [[["adapter", 1, [2], "float32"]], []],
        [[["adapter", "a", [-2], "float32"]], []],
        [[["adapter", "a", [2.0], "float32"]], []],
        [[["adapter", "a", [True], "float32"]], []],
        [[["adapter", "a", [2**31], "float32"]], []],
        [[["adapter", "a", [1] * 9, "float32"]], []],
        [[["adapter", "a", [2], "complex64"]], []],
        [[["adapter", "a", [2], "load"]], []],
        [[entry, entry], []],
        [[["b", "a", [2], "int8"], ["a", "a", [2], "int8"]], []],
        None,
    ]
    compact = [json.dumps(text, separators=(",", ":")).encode() for text in wrong]
    return [*compact, b"", b"[", b"\xff", b"[" * 5000, Schema.of(TREES).text + b" "]


@pytest.mark.parametrize("text", texts(), ids=lambda text: text[:40].decode(errors="replace"))
def test_what_is_no_schema_is_refused(text: bytes) -> None:
    with pytest.raises(PayloadError, match="schema"):
        Schema.parse(text)


def test_spoilt_schemas_are_refused_or_read() -> None:
    """Never anything but PayloadError."""
    text, stream = Schema.of(TREES).text, np.random.default_rng(0)
    for _ in range(3000):
        spoilt = bytearray(text)
        for at in stream.integers(0, len(text), stream.integers(1, 4)):
            spoilt[at] = stream.integers(256)
        try:
            Schema.parse(bytes(spoilt))
        except PayloadError:
            continue


def test_a_schema_alone_makes_no_room_for_more_than_the_model_needs() -> None:
    vast = Schema.parse(b'[[["adapter","a",[2147483647,2147483647],"float32"]],[]]')
    header = wire.Header("none", BASE, vast.digest)
    payload = wire.write(header, {"schema": np.frombuffer(vast.text, dtype=np.uint8)})
    client = Downlink(Codec("topk"), 0, BASE, {"a": torch.zeros(100)})
    with pytest.raises(PayloadError, match="are declared, and at most 1074176 are allowed"):
        client.read(payload, {})


def test_several_payloads_are_told_apart() -> None:
    one = wire.write(wire.Header("dense", BASE, BASE), {"0.values": np.zeros(5, np.uint8)})
    two = wire.write(wire.Header("topk", BASE, BASE), {"0.values": np.zeros(9, np.uint8)})
    assert list(wire.pieces(one + two, 10_000)) == [one, two] and not list(wire.pieces(b"", 1))
    with pytest.raises(PayloadError, match="at most 10 are allowed"):
        list(wire.pieces(one, 10))
    with pytest.raises(PayloadError, match="truncated: 3 bytes are left over"):
        list(wire.pieces(one + b"abc", 10_000))
    (first, torn) = wire.pieces(one + two[:-1], 10_000)
    assert first == one
    with pytest.raises(PayloadError, match="truncated"):
        wire.read(torn, 10_000)
