"""The byte ledger's formula is the size of what is really serialised."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from flwr.app import RecordDict

from fedpeft.comms.ledger import Ledger, message_bytes, stack_bytes, tensor_bytes
from fedpeft.flower.records import Header, decode, encode
from fedpeft.model import kind_of
from fedpeft.strategy import Message, Messages

HEAD = "base_model.model.classifier.modules_to_save.default.weight"
LAYER = "base_model.model.layer.0.query.lora_A.default.weight"


def serialised(content: RecordDict) -> int:
    """Flower's own count of everything but the header."""
    return sum(record.count_bytes() for key, record in content.items() if key != "header")


def example(blob: bytes = b"12345678") -> Message:
    torch.manual_seed(0)
    adapter = {
        LAYER: torch.randn(8, 384),
        HEAD: torch.randn(77, 384).T,
        "schräg": torch.randn(3),
        "scalar": torch.tensor(1.0),
        "nothing": torch.zeros(0, 1000000),
    }
    other = {
        f"{LAYER}.{dtype}": torch.ones(1, 10, 100, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool)
    }
    return Message({"adapter": adapter, "other": other}, {"weight": 3.0, "é": 0.5}, {"seed": blob})


@pytest.mark.parametrize(
    "message",
    [example(), Message(), Message({"adapter": {}}), Message(scalars={"weight": 1.0})],
    ids=["all", "empty", "empty tree", "scalar"],
)
def test_message_bytes_is_what_flower_serialises(message: Message) -> None:
    content = encode(message, Header(1, "ada", "b", "l", "r"))
    assert sum(message_bytes(message).values()) == serialised(content)
    assert message_bytes(decode(content)[0]) == message_bytes(message)


def test_bytes_are_counted_by_kind() -> None:
    message = example()
    content = encode(message, Header())
    wanted: Counter[str] = Counter()
    for record in content.array_records.values():
        for name, array in record.items():
            wanted[kind_of(name)] += len(array.data) + len(name)
    wanted["scalar"] = content.metric_records["scalars"].count_bytes()
    wanted["blob"] = content.config_records["blobs"].count_bytes()
    assert message_bytes(message) == wanted
    assert wanted["head"] > 77 * 384 * 4
    assert wanted["scalar"] == 8 + len("weight") + 8 + len("é")


@pytest.mark.parametrize("dims", range(9))
def test_tensor_bytes_for_every_length_of_header(dims: int) -> None:
    for size in (1, 2, 10):
        tensor = torch.zeros((size,) * min(dims, 4) + (1,) * max(0, dims - 4), dtype=torch.int8)
        content = encode(Message({"t": {"x": tensor}}), Header())
        assert tensor_bytes(tensor) == len(content.array_records["tree.t"]["x"].data)


def test_a_stack_costs_the_sum_of_its_messages() -> None:
    singles = [example(b"x" * size) for size in (1, 0, 30)]
    total: Counter[str] = Counter()
    for one in singles:
        total.update(message_bytes(one))
    assert stack_bytes(Messages.stack(("a", "b", "c"), singles)) == total
    assert stack_bytes(Messages(())) == {}


def test_the_ledger_adds_rounds_by_direction_and_kind() -> None:
    ledger = Ledger()
    ledger.add({"adapter": 10, "head": 1}, {"adapter": 5})
    ledger.add({"adapter": 10}, {"scalar": 2})
    assert ledger.down == {"adapter": 20, "head": 1}
    assert ledger.up == {"adapter": 5, "scalar": 2}
