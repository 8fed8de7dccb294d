"""What a receiver refuses before it reads: sizes, counts, names; and any bytes in an array."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.config import Recipe
from fedpeft.errors import FedpeftError, ReplyError
from fedpeft.flower import records
from fedpeft.flower.federation import FlowerFederation, Patience
from fedpeft.flower.records import BF16, NPY, Header, decode, encode
from fedpeft.strategy import Message
from tests.flower.nodes import InProcess


def content(trees: int = 1) -> RecordDict:
    found = {f"t{n}": {"w": torch.zeros(4, 4)} for n in range(trees)}
    return encode(Message(found, {"weight": 1.0}, {"blob": b"12345678"}), Header(1, "ada"))


def test_the_limit_counts_tensors_and_blobs_together() -> None:
    sent = content(trees=2)
    size = sum(len(a.data) for t in ("tree.t0", "tree.t1") for a in sent[t].values())
    header = sum(len(v) if isinstance(v, str) else 8 for v in sent["header"].values())
    whole = size + len(b"12345678") + 8 + header
    assert len(decode(sent, whole)[0].trees) == 2
    with pytest.raises(ReplyError, match=f"more than {whole - 1} bytes"):
        decode(sent, whole - 1)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "x" * 513])
def test_names_are_printable_and_bounded(name: str) -> None:
    sent = content()
    sent["tree.t0"] = ArrayRecord({name: Array(np.zeros(1, np.float32))})
    with pytest.raises(ReplyError, match="names are printable"):
        decode(sent)
    sent = content()
    sent[f"tree.{name}"] = ArrayRecord({"w": Array(np.zeros(1, np.float32))})
    with pytest.raises(ReplyError, match="names are printable"):
        decode(sent)


def test_counts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReplyError, match="67 records"):
        decode(content(trees=64))
    monkeypatch.setattr(records, "MAX_ENTRIES", 9)
    sent = content()
    sent["blobs"] = ConfigRecord({f"b{n}": b"" for n in range(10)})
    with pytest.raises(ReplyError, match="'blobs' has 10 entries"):
        decode(sent)


def test_texts_of_the_header_are_bounded() -> None:
    for field in ("client", "base", "run", "nonce"):
        with pytest.raises(ReplyError, match=f"header field {field!r} is too long"):
            decode(encode(Message(), Header(**{field: "x" * 513})))  # type: ignore[arg-type]
    with pytest.raises(ReplyError, match="'recipe' is too long"):
        decode(encode(Message(), Header(recipe="x" * 65_537)))


def npy(shape: str, data: bytes = b"", kind: str = "<f4") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "shape", ["(10000000000000,)", "(0, 99999999999999999999)", f"({'1, ' * 65})", "(-1, 0)"]
)
def test_shapes_that_cannot_be_are_refused_before_anything_is_made(shape: str) -> None:
    sent = content()
    said = tuple(eval(shape))
    sent["tree.t0"] = ArrayRecord({"w": Array("float32", said, NPY, npy(shape))})
    with pytest.raises(ReplyError, match="bytes of data for shape"):
        decode(sent)


HOSTILE = {
    "strategy: {name: antigravity}": "strategy.name='antigravity' does not ship with fedpeft",
    "name: ${oc.env:HF_TOKEN}": "are not allowed in a recipe",
    "a: &a [1]\nb: *a": "anchors and aliases",
    "model: {name: x, trust_remote_code: true}": "unknown key 'model.trust_remote_code'",
}


@pytest.mark.usefixtures("flower_task")
@pytest.mark.parametrize("text", HOSTILE)
def test_a_real_node_refuses_a_hostile_recipe(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_Qcanary")
    grid = InProcess({1: {"client": "c0"}})
    federation = FlowerFederation(grid, Recipe(), nodes=1, patience=Patience(join=0.05))
    federation._recipe = text
    with pytest.raises(FedpeftError, match=HOSTILE[text]) as caught:
        federation.clients()
    assert "Qcanary" not in str(caught.value) and "antigravity" not in sys.modules


SAVED = io.BytesIO()
np.save(SAVED, np.arange(6, dtype=np.float32).reshape(2, 3))
GOOD = SAVED.getvalue()


@settings(max_examples=500, deadline=None)
@given(
    st.integers(0, len(GOOD)),
    st.binary(max_size=24),
    st.integers(0, 24),
    st.sampled_from([NPY, BF16, "other"]),
    st.sampled_from(["float32", "bfloat16", "object", ""]),
    st.lists(st.integers(-2, 2**64), max_size=4).map(tuple) | st.just((2, 3)),
)
def test_any_bytes_are_the_announced_numbers_or_a_reply_error(
    at: int, new: bytes, gone: int, stype: str, dtype: str, shape: tuple[int, ...]
) -> None:
    sent = content()
    data = GOOD[:at] + new + GOOD[at + gone :]
    sent["tree.t0"] = ArrayRecord({"w": Array(dtype, shape, stype, data)})
    try:
        found = decode(sent)[0].trees["t0"]["w"]
    except ReplyError:
        return
    assert tuple(found.shape) == shape
    assert str(found.dtype) == f"torch.{dtype}"
