"""Faults 1 to 20: what is in a client's update."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict

from fedpeft.flower import records
from fedpeft.flower.records import NPY, Header, encode
from fedpeft.message import Message
from tests.faults.federated import (
    Spoil,
    changes_nothing,
    costs_c1_alone,
    faulty_client,
    grid_of,
    play,
    recipe_of,
    same,
)
from tests.faults.register import fault

FIRST = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight"


def tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """Another first tensor in place of c1's."""

    def spoil(content: RecordDict, message: Message, header: Header) -> RecordDict:
        adapter = dict(message.trees["adapter"])
        return encode(
            Message({"adapter": adapter | {FIRST: change(adapter[FIRST])}}, message.scalars), header
        )

    return spoil


def entry(value: float) -> Spoil:
    def change(own: torch.Tensor) -> torch.Tensor:
        changed = own.clone()
        changed[1, 3] = value
        return changed

    return tensor(change)


def arrays(change: Callable[[dict[str, Array]], Any]) -> Spoil:
    """The arrays as they travel, changed in place."""

    def spoil(content: RecordDict, message: Message, header: Header) -> RecordDict:
        found = dict(content.array_records["tree.adapter"])
        change(found)
        content["tree.adapter"] = ArrayRecord(found)
        return content

    return spoil


def payload(data: bytes, dtype: str = "float32") -> Spoil:
    def change(found: dict[str, Array]) -> None:
        found[FIRST] = Array(dtype, found[FIRST].shape, NPY, data)

    return arrays(change)


def npy(value: np.ndarray, allow_pickle: bool = False) -> bytes:
    out = io.BytesIO()
    np.save(out, value, allow_pickle=allow_pickle)
    return out.getvalue()


def npz() -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, x=np.zeros(1000))
    return out.getvalue()


def header_of(shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, described)
    return out.getvalue()


def costs(tiny: Path, spoil: Spoil, reason: str) -> None:
    costs_c1_alone(faulty_client(spoil), recipe_of(tiny), reason)


@fault(1, "X")
def test_nan_in_one_entry(tiny: Path) -> None:
    costs(tiny, entry(math.nan), f"NaN or Inf in tensor {FIRST!r}")


@fault(2, "X")
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_in_one_entry(tiny: Path, value: float) -> None:
    costs(tiny, entry(value), f"NaN or Inf in tensor {FIRST!r}")


@fault(3, "X")
def test_a_finite_update_that_is_too_long(tiny: Path) -> None:
    recipe = recipe_of(tiny, reject_norm=50.0)
    reason = "norm 1000, above rounds.reject_norm=50"
    costs_c1_alone(faulty_client(entry(1000.0)), recipe, reason)
    honest, _ = play(grid_of(), recipe)
    assert same(honest, play(grid_of(), recipe_of(tiny))[0])  # the bound touches nobody else


@fault(4, "X")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_overflow_in_transit(tiny: Path, dtype: torch.dtype) -> None:
    costs(tiny, tensor(lambda own: (own * 0 + 3e38 * 2).to(dtype).float()), "NaN or Inf in tensor")


@fault(5, "K")
def test_a_zero_update_is_taken_and_counted(tiny: Path) -> None:
    """The reply is what was sent: c1's second reply is replaced by its own request."""
    recipe = recipe_of(tiny)
    grid = grid_of()

    def unmoved(request: Any, answer: Any) -> Any:
        def spoil(content: RecordDict, message: Message, header: Header) -> RecordDict:
            sent, _ = records.decode(request.content)
            return encode(Message(sent.trees, message.scalars), header)

        return faulty_client(spoil)(request, answer)

    grid.reply = unmoved
    adapter, reports = play(grid, recipe)
    assert [report.zeros for report in reports.values()] == [(), ("c1",), ()]
    assert [report.replied for report in reports.values()] == [4, 4, 4]
    assert all(bool(torch.isfinite(value).all()) for value in adapter.values())


@fault(6, "X")
def test_a_missing_tensor(tiny: Path) -> None:
    costs(tiny, arrays(lambda found: found.pop(FIRST)), f"tensor {FIRST!r} is missing")


def renamed(found: dict[str, Array]) -> None:
    found["more"] = found[FIRST]


@fault(7, "X")
def test_a_tensor_too_many(tiny: Path) -> None:
    costs(tiny, arrays(renamed), "tensor 'more' of tree 'adapter' was not asked for")


@fault(8, "K")
def test_tensors_in_another_order_are_taken_by_name(tiny: Path) -> None:
    def turn(found: dict[str, Array]) -> None:
        turned = dict(reversed(found.items()))
        found.clear()
        found.update(turned)

    changes_nothing(faulty_client(arrays(turn)), recipe_of(tiny))


@fault(9, "X")
def test_another_shape(tiny: Path) -> None:
    costs(tiny, tensor(lambda own: own[:, :7].clone()), f"tensor {FIRST!r} has shape (2, 7)")


@fault(10, "X")
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_shape_that_would_broadcast(tiny: Path, shape: tuple[int, ...]) -> None:
    costs(tiny, tensor(lambda own: torch.ones(shape)), f"tensor {FIRST!r} has shape {shape}")


@fault(11, "X")
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float16, torch.bool])
def test_another_dtype(tiny: Path, dtype: torch.dtype) -> None:
    """None is cast, though float to float could be: a client knows what it was sent."""
    costs(tiny, tensor(lambda own: own.to(dtype)), f"tensor {FIRST!r} has dtype {dtype}")


@fault(11, "X")
def test_complex_numbers(tiny: Path) -> None:
    data = npy(np.ones((2, 16), np.complex64))
    costs(tiny, payload(data, "complex64"), "dtype complex64 is not allowed")


@fault(12, "X")
@pytest.mark.parametrize("kind", ["text", "objects"])
def test_text_and_objects(tiny: Path, kind: str) -> None:
    value = np.array(
        ["x"] if kind == "text" else [{"a": 1}], dtype=None if kind == "text" else object
    )
    costs(tiny, payload(npy(value, allow_pickle=True), str(value.dtype)), "is not allowed")


@fault(13, "K")
def test_another_memory_order_gives_the_same_bits(tiny: Path) -> None:
    def turn(found: dict[str, Array]) -> None:
        value = np.load(io.BytesIO(found[FIRST].data))
        found[FIRST] = Array("float32", value.shape, NPY, npy(np.asfortranarray(value)))

    changes_nothing(faulty_client(arrays(turn)), recipe_of(tiny))


@fault(14, "X")
def test_an_archive_is_not_opened(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an archive was opened")

    monkeypatch.setattr("zipfile.ZipFile", opened)
    data = np.frombuffer(b"PK\x03\x04" + b"\0" * 60, np.uint8).tobytes()
    costs(tiny, payload(data), "no .npy data")


@fault(14, "X")
def test_a_real_archive(tiny: Path) -> None:
    costs(tiny, payload(npz()), "no .npy data")


@fault(15, "X")
@pytest.mark.parametrize("data", [b"", b"garbage", npy(np.ones((2, 16), np.float32))[:-5]])
def test_garbage_and_broken_off_bytes(tiny: Path, data: bytes) -> None:
    costs(tiny, payload(data), f"tree.adapter {FIRST!r}")


@fault(16, "X")
@pytest.mark.parametrize("shape", [(10**13,), (2**40, 2**20)])
def test_a_header_that_promises_terabytes_allocates_nothing(
    tiny: Path, shape: tuple[int, ...]
) -> None:
    def promise(found: dict[str, Array]) -> None:
        found[FIRST] = Array("float32", shape, NPY, header_of(shape) + b"\0" * 8)

    costs(tiny, arrays(promise), "8 bytes of data for shape")


@fault(17, "X")
def test_a_shape_that_is_announced_and_not_there(tiny: Path) -> None:
    def lie(found: dict[str, Array]) -> None:
        own = found[FIRST]
        found[FIRST] = Array("float32", (16, 2), NPY, own.data)

    costs(tiny, arrays(lie), "announced as")


@fault(18, "X")
@pytest.mark.parametrize("most", ["20 kB", "3 MB"])
@pytest.mark.parametrize("what", ["tensor", "blob"])
def test_an_update_larger_than_it_can_be(tiny: Path, what: str, most: str) -> None:
    """Far above the bound nothing of it is read; else it is read and refused."""

    def spoil(content: RecordDict, message: Message, header: Header) -> RecordDict:
        trees = {part: dict(tree) for part, tree in message.trees.items()}
        if what == "tensor":
            trees["adapter"]["large"] = torch.zeros(2**20)
            return encode(Message(trees, message.scalars), header)
        return encode(Message(trees, message.scalars, {"large": b"\0" * 2**22}), header)

    unread, refused = "40000 bytes of tensors and blobs: none is read", "of rounds.max_reply"
    recipe = recipe_of(tiny, max_reply=most)
    costs_c1_alone(faulty_client(spoil), recipe, unread if most == "20 kB" else refused)


@fault(19, "X")
def test_no_tensors_at_all(tiny: Path) -> None:
    costs(tiny, arrays(lambda found: found.clear()), "is missing from tree 'adapter'")


@fault(19, "X")
def test_two_sets_of_tensors(tiny: Path) -> None:
    def spoil(content: RecordDict, message: Message, header: Header) -> RecordDict:
        content["tree.second"] = content["tree.adapter"]
        return content

    costs(tiny, spoil, "tree 'second' was not asked for")


@fault(20, "X")
def test_a_tensor_of_the_base_smuggled_in(tiny: Path) -> None:
    base = "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.weight"

    def smuggle(found: dict[str, Array]) -> None:
        found[base] = Array("float32", (16, 16), NPY, npy(np.ones((16, 16), np.float32)))

    costs(tiny, arrays(smuggle), f"tensor {base!r} of tree 'adapter' was not asked for")
