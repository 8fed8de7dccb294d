"""What crosses arrives bit by bit, and what all clients share crosses once."""

from __future__ import annotations

import pickle

import pytest
import torch

from fedpeft.strategy import Messages
from fedpeft.tree import Tree, broadcast
from fedpeft.workers.wire import (
    join,
    pack,
    pack_memory,
    pack_messages,
    split,
    unpack,
    unpack_memory,
    unpack_messages,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def same(left: Messages, right: Messages) -> bool:
    def trees(messages: Messages) -> dict[str, Tree]:
        return {**messages.trees, "scalars": dict(messages.scalars)}

    one, two = trees(left), trees(right)
    return (
        left.clients == right.clients
        and left.blobs == right.blobs
        and {p: list(t) for p, t in one.items()} == {p: list(t) for p, t in two.items()}
        and all(torch.equal(one[p][n], two[p][n]) for p in one for n in one[p])
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_and_shape_arrive_bit_by_bit(dtype: torch.dtype) -> None:
    whole = (torch.arange(24).reshape(4, 6) * 1.37 - 9).to(dtype)
    sent = {"row": whole[1], "turned": whole.T, "one": whole[2, 3], "none": whole[:0]}
    arrays = pickle.loads(pickle.dumps(pack(sent)))
    for array in arrays.values():
        array.bits.flags.writeable = False  # as in Ray's object store
    found = unpack(arrays)
    for name, tensor in sent.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor)
        found[name].zero_()  # its memory is its own
    assert bool(whole.any())


def test_nan_keeps_its_bits_and_gradients_do_not_cross() -> None:
    odd = torch.tensor([0x7FC00001, -1], dtype=torch.int32).view(torch.float32)
    (found,) = unpack(pack({"x": odd.clone().requires_grad_()})).values()
    assert torch.equal(found.view(torch.int32), odd.view(torch.int32))
    assert not found.requires_grad


def mixed(clients: int) -> Messages:
    """A shared tree, a tree with a tensor of each client's own, scalars, both kinds of blob."""
    draw = torch.Generator().manual_seed(0)
    names = tuple(f"c{k}" for k in range(clients))
    own = torch.randn(clients, 3, generator=draw)
    shared = broadcast({"a": torch.randn(500, generator=draw), "z": torch.ones(2)}, clients)
    return Messages(
        names,
        {"adapter": shared, "mixed": {**broadcast({"b": torch.ones(4)}, clients), "a": own}},
        {"lr": torch.arange(clients, dtype=torch.float64)},
        {"seed": (b"12345678",) * clients, "own": tuple(bytes([k]) for k in range(clients))},
    )


@pytest.mark.parametrize("clients", [1, 2, 5])
def test_a_shard_gets_its_clients_messages(clients: int) -> None:
    messages = mixed(clients)
    common, own = split(messages)
    for shard in ([0], list(range(clients)), list(range(0, clients, 2))):
        part = unpack_messages(pickle.loads(pickle.dumps(pack_messages(own.rows(shard)))))
        found, wanted = join(pickle.loads(pickle.dumps(common)), part), messages.rows(shard)
        names = {p: dict(sorted(t.items())) for p, t in wanted.trees.items()}
        assert same(found, Messages(wanted.clients, names, wanted.scalars, wanted.blobs))


def test_what_all_clients_are_sent_crosses_once() -> None:
    messages = Messages.broadcast(
        [f"c{k}" for k in range(1000)], {"adapter": mixed(2)[0].trees["adapter"]}
    )
    scattered = messages.rows(range(0, 1000, 3))  # as after simulated failures
    common, own = split(scattered)
    assert len(pickle.dumps(common)) < 4000
    assert len(pickle.dumps(pack_messages(own))) < 20 * len(scattered)
    assert scattered.trees["adapter"]["a"].untyped_storage().nbytes() == 4 * 500


def test_private_memory_arrives_bit_by_bit() -> None:
    memory = {
        "c0": {"adapter": {"a": torch.randn(3)}},
        "c1": {"gate": {}, "x": {"b": torch.ones(2)}},
    }
    found = unpack_memory(pickle.loads(pickle.dumps(pack_memory(memory))))
    assert {c: list(own) for c, own in found.items()} == {c: list(own) for c, own in memory.items()}
    assert torch.equal(found["c0"]["adapter"]["a"], memory["c0"]["adapter"]["a"])
