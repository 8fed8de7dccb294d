"""Messages as Flower's records: the round trip is exact, malformed records are refused by name."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedpeft.errors import ReplyError
from fedpeft.flower.records import BF16, NPY, Header, decode, encode, encode_stack
from fedpeft.strategy import Message, Messages

HEADER = Header(3, "ada", "base", "layout", "name: x\n")
EVERY_TYPE = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def message() -> Message:
    torch.manual_seed(0)
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    shaped = {"z": torch.randn(3, 4), "a": torch.randn(4, 3).T, "0": torch.tensor(1.5)}
    typed = {str(t): torch.randint(0, 2, (5,)).to(t) for t in EVERY_TYPE}
    first = {"odd": odd, "none": torch.zeros(0, 7)}
    return Message(
        {"second": shaped, "first": first, "types": typed, "": {}},
        {"weight": 0.1, "loss": float("nan")},
        {"payload": b"\x00\xff", "empty": b""},
    )


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def over_the_wire(content: RecordDict) -> RecordDict:
    """The records taken apart into bytes and put together again, as between processes."""
    objects = {key: value.deflate() for key, value in get_all_nested_objects(content).items()}
    assert {t.object_id for t in iterate_object_tree(get_object_tree(content))} == set(objects)
    found = inflate_object_from_contents(content.object_id, objects)
    assert isinstance(found, RecordDict)
    return found


def check_equal(found: Message, wanted: Message) -> None:
    assert list(found.trees) == list(wanted.trees)
    for name, tree in wanted.trees.items():
        assert list(found.trees[name]) == list(tree)
        for key, tensor in tree.items():
            other = found.trees[name][key]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert bits(other) == bits(tensor), (name, key)
    assert repr(dict(found.scalars)) == repr(dict(wanted.scalars))
    assert dict(found.blobs) == dict(wanted.blobs)


def test_round_trip_is_exact() -> None:
    sent = message()
    found, header = decode(over_the_wire(encode(sent, HEADER)))
    check_equal(found, sent)
    assert header == HEADER


def test_decoded_tensors_are_writable_and_their_own() -> None:
    content = encode(Message({"t": {"x": torch.ones(2)}}), HEADER)
    first, second = decode(content)[0], decode(content)[0]
    first.trees["t"]["x"].zero_()
    assert second.trees["t"]["x"].tolist() == [1.0, 1.0]


def test_a_stack_gives_each_client_its_row_and_a_broadcast_is_serialised_once() -> None:
    own = {"x": torch.arange(6.0).view(3, 2)}
    shared = Messages.broadcast(("a", "b", "c"), {"same": {"y": torch.ones(4)}}).trees
    stack = Messages(("a", "b", "c"), {"own": own, **shared}, {"k": torch.arange(3.0).double()})
    contents = encode_stack(stack, [replace(HEADER, client=name) for name in stack.clients])
    for k, content in enumerate(contents):
        found, header = decode(content)
        assert header.client == stack.clients[k]
        check_equal(found, stack[k])
    data = [content.array_records["tree.same"]["y"].data for content in contents]
    assert data[0] is data[1] is data[2]


def _array(value: np.ndarray, *, dtype: str | None = None, stype: str = NPY) -> Array:
    buffer = io.BytesIO()
    np.save(buffer, value)
    return Array(dtype or str(value.dtype), value.shape, stype, buffer.getvalue())


def _objects() -> Array:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return Array("object", (1,), NPY, buffer.getvalue())


def _headed(shape: tuple[int, ...], data: bytes = b"") -> Array:
    buffer = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return Array("float32", shape, NPY, buffer.getvalue() + data)


def _zip() -> Array:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.ones(2))
    return Array("float32", (2,), NPY, buffer.getvalue())


BAD_ARRAYS: dict[str, tuple[Callable[[], Array], str]] = {
    "objects": (_objects, "dtype object is not allowed"),
    "pickle": (lambda: Array("float32", (1,), NPY, pickle.dumps([1])), "no .npy data"),
    "archive": (_zip, "no .npy data"),
    "nothing": (lambda: Array("float32", (1,), NPY, b""), "no .npy data"),
    "truncated": (lambda: _headed((2,), b"\0" * 7), "7 bytes of data for shape (2,)"),
    "too long": (lambda: _headed((2,), b"\0" * 9), "9 bytes of data"),
    "huge": (lambda: _headed((2**40, 2**20)), "0 bytes of data"),
    "negative": (lambda: _headed((-1, -2), b"\0" * 8), "8 bytes of data"),
    "unknown stype": (lambda: _array(np.ones(2), stype="torch.save"), "'torch.save' is unknown"),
    "text": (lambda: _array(np.array(["x"])), "dtype <U1 is not allowed"),
    "complex": (lambda: _array(np.ones(2, complex)), "dtype complex128 is not allowed"),
    "uint16": (lambda: _array(np.ones(2, np.uint16)), "dtype uint16 is not allowed"),
    "false bf16": (lambda: _array(np.ones(2), dtype="bfloat16", stype=BF16), "float64 is not"),
    "false dtype": (lambda: _array(np.ones(2), dtype="float32"), "announced as ('float32'"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_refused_by_name(name: str) -> None:
    make, reason = BAD_ARRAYS[name]
    content = encode(message(), HEADER)
    content["tree.first"] = ArrayRecord({"layer.weight": make()})
    with pytest.raises(ReplyError) as caught:
        decode(content)
    assert "tree.first 'layer.weight'" in str(caught.value)
    assert reason in str(caught.value)


def test_an_array_that_lies_about_its_shape_is_refused() -> None:
    array = _array(np.ones((2, 3), np.float32))
    array.shape = (3, 2)
    content = encode(Message({"t": {}}), HEADER)
    content["tree.t"] = ArrayRecord({"x": array})
    with pytest.raises(ReplyError, match=r"announced as .*\(3, 2\).*holds .*\(2, 3\)"):
        decode(content)


def test_other_byte_orders_and_memory_orders_are_read() -> None:
    wanted = np.arange(6, dtype=np.float32).reshape(2, 3)
    big = _array(wanted.astype(">f4"), dtype="float32")
    record = ArrayRecord({"f": _array(np.asfortranarray(wanted)), "b": big})
    content = encode(Message({"t": {}}), HEADER)
    content["tree.t"] = record
    found = decode(content)[0].trees["t"]
    assert found["f"].tolist() == found["b"].tolist() == wanted.tolist()


Change = Callable[[RecordDict], object]


def _without(key: str) -> Change:
    return lambda content: content.pop(key)


def _with(key: str, record: ArrayRecord | MetricRecord | ConfigRecord) -> Change:
    def change(content: RecordDict) -> None:
        content.pop(key, None)
        content[key] = record

    return change


def _header(**fields: object) -> Change:
    def change(content: RecordDict) -> None:
        old = dict(content.config_records["header"]) | fields
        content["header"] = ConfigRecord({k: v for k, v in old.items() if v is not None})

    return change


BAD_RECORDS: dict[str, tuple[Change, str]] = {
    "no scalars": (_without("scalars"), "record 'scalars' is missing"),
    "no header": (_without("header"), "record 'header' is missing"),
    "unknown": (_with("extra", MetricRecord({"x": 1.0})), "record 'extra' of type MetricRecord"),
    "wrong kind": (_with("tree.first", MetricRecord()), "record 'tree.first' of type MetricRecord"),
    "arrays as blobs": (_with("blobs", ArrayRecord()), "record 'blobs' of type ArrayRecord"),
    "int scalar": (_with("scalars", MetricRecord({"w": 1})), "scalar 'w' is of type int"),
    "list": (_with("scalars", MetricRecord({"w": [1.0]})), "scalar 'w' is of type list"),
    "text blob": (_with("blobs", ConfigRecord({"b": "x"})), "blob 'b' is of type str"),
    "round as text": (_header(round="3"), "header field 'round' is str, should be int"),
    "no round": (_header(round=None), "header field 'round' is missing"),
    "more": (_header(admin=True), "header field 'admin' is bool, should be unknown"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records_are_refused_by_name(name: str) -> None:
    change, reason = BAD_RECORDS[name]
    content = encode(message(), HEADER)
    change(content)
    with pytest.raises(ReplyError) as caught:
        decode(content)
    assert reason in str(caught.value)
