"""Flower's records over the site's socket: exactly what they were, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedpeft.flower import wire
from fedpeft.flower.records import encode_tree
from fedpeft.site.frames import Frame, FrameError


def records() -> RecordDict:
    tree = {"b": torch.randn(2, 3), "a": torch.tensor([], dtype=torch.int8)}
    half = {"x": torch.ones(3, dtype=torch.bfloat16), "s": torch.tensor(1.5, dtype=torch.float64)}
    numbers = {"f": 0.1, "i": 3, "inf": float("inf"), "list": [1.0, 2.5], "none": []}
    texts = {
        **{"s": "ü", "i": 2, "f": 2.0, "b": True, "bytes": b"\x00\xff", "empty": b""},
        **{"texts": ["a", "b"], "blobs": [b"1", b"", b"3"], "flags": [True, False]},
    }
    return RecordDict(
        {
            "tree.up": encode_tree(tree),
            "tree.half": encode_tree(half),
            "tree.none": ArrayRecord(),
            "scalars": MetricRecord(numbers),
            "blobs": ConfigRecord(texts),
        }
    )


def test_records_come_back_as_they_were() -> None:
    """Names, values, their types and their order."""
    content = records()
    frame = wire.pack({"kind": "train"}, content)
    assert frame.head["kind"] == "train"
    assert records_of(wire.unpack(frame)) == records_of(content)


def records_of(content: RecordDict) -> Any:
    """Everything, with the types of the values."""
    return [
        (name, type(record), [(k, type(v), v) for k, v in record.items()])
        for name, record in content.items()
    ]


@pytest.mark.parametrize(
    "found",
    [
        None,
        {"a": 1},
        [["x", "arrays", [["n", "float32", [1], "numpy.ndarray", [0, 9]]]]],
        [["x", "arrays", [["n", "float32", [1], "numpy.ndarray", [-1, 1]]]]],
        [["x", "arrays", [["n", "float32", [1], "numpy.ndarray", [5, -1]]]]],
        [["x", "arrays", [["n", "float32", ["1"], "numpy.ndarray", [0, 1]]]]],
        [["x", "arrays", [["n", "float32", [1]]]]],
        [["x", "metrics", [["n", "text"]]]],
        [["x", "config", [["n", {"at": "x"}]]]],
        [["x", "config", [["n", None]]]],
        [["x", "config", [["n", [[1]]]]]],
        [["x", "pickles", []]],
        [[1, "config", []]],
        [["x", "config"]],
    ],
)
def test_what_is_no_record_is_refused(found: Any) -> None:
    with pytest.raises(FrameError, match="on the site's socket"):
        wire.unpack(Frame({"records": found}, b"12345678"))


def test_an_array_is_not_interpreted_on_the_way() -> None:
    """Whatever its bytes say; who decodes it checks them."""
    hostile = Array("float32", (10**13,), "numpy.ndarray", np.random.default_rng(0).bytes(99))
    content = RecordDict({"tree.x": ArrayRecord({"a": hostile})})
    assert wire.unpack(wire.pack({}, content)) == content
