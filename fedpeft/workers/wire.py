"""What crosses between the run and its workers: tensors as numpy arrays, exactly.

Ray moves numpy arrays through its object store without copying them into a pickle. torch's own
pickles would copy, and would send the whole storage behind a view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedpeft.comms.payloads import Counted
from fedpeft.strategy import Messages
from fedpeft.tree import Tree, broadcast, row, shared

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Array:
    """A tensor: the name of its dtype, and its bits as integers of the same width and shape."""

    dtype: str
    bits: np.ndarray


Arrays = dict[str, Array]
"""A tree as arrays."""


def pack(tree: Mapping[str, Tensor]) -> Arrays:
    """A tree as arrays of the CPU's memory."""
    return {name: _pack(tensor) for name, tensor in tree.items()}


def unpack(arrays: Mapping[str, Array]) -> Tree:
    """The tree that ``pack`` was given, on the CPU, in memory of its own."""
    return {name: _unpack(array) for name, array in arrays.items()}


def _pack(tensor: Tensor) -> Array:
    plain = tensor.detach().cpu().contiguous()
    bits = plain.view(_BITS[plain.element_size()]).numpy()
    return Array(str(plain.dtype).removeprefix("torch."), bits)


def _unpack(array: Array) -> Tensor:
    tensor = torch.from_numpy(np.array(array.bits))
    return tensor.view(getattr(torch, array.dtype))


@dataclass(frozen=True)
class Parcel:
    """Messages as arrays; of payloads of a codec, their lengths."""

    clients: tuple[str, ...]
    trees: dict[str, Arrays]
    scalars: Arrays
    blobs: dict[str, tuple[bytes, ...]]
    coded: Arrays | None = None


def pack_messages(messages: Messages) -> Parcel:
    """Messages as arrays."""
    trees = {part: pack(tree) for part, tree in messages.trees.items()}
    coded = None if messages.coded is None else pack(messages.coded.sizes())
    return Parcel(messages.clients, trees, pack(messages.scalars), dict(messages.blobs), coded)


def unpack_messages(parcel: Parcel) -> Messages:
    """The messages that ``pack_messages`` was given."""
    trees = {part: unpack(arrays) for part, arrays in parcel.trees.items()}
    coded = None if parcel.coded is None else Counted(unpack(parcel.coded))
    return Messages(parcel.clients, trees, unpack(parcel.scalars), parcel.blobs, coded)


@dataclass(frozen=True)
class Common:
    """What a round's messages have in common: unstacked trees, and blobs."""

    trees: dict[str, Arrays] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)


def split(messages: Messages) -> tuple[Common, Messages]:
    """What all clients are sent (views of one copy, equal blobs), and the rest, by client."""
    common = Common()
    trees: dict[str, Tree] = {}
    blobs: dict[str, tuple[bytes, ...]] = {}
    for part, tree in messages.trees.items():
        same = {name: tensor for name, tensor in tree.items() if shared(tensor)}
        common.trees[part] = pack(row(same, 0))
        trees[part] = {name: tensor for name, tensor in tree.items() if name not in same}
    for name, each in messages.blobs.items():
        if len(set(each)) == 1:
            common.blobs[name] = each[0]
        else:
            blobs[name] = each
    return common, Messages(messages.clients, trees, messages.scalars, blobs)


def join(common: Common, own: Messages) -> Messages:
    """Some of the messages that ``split`` was given: those of the clients in ``own``."""
    clients = len(own)
    trees = {}
    for part, tree in own.trees.items():
        same = broadcast(unpack(common.trees[part]), clients)
        whole = {**same, **tree}
        trees[part] = {name: whole[name] for name in sorted(whole)}
    blobs = {name: (blob,) * clients for name, blob in common.blobs.items()}
    return Messages(own.clients, trees, own.scalars, {**blobs, **own.blobs})


Kept = dict[str, dict[str, Arrays]]
"""Private memory as arrays: client -> name -> tree."""


def pack_memory(memory: Mapping[str, Mapping[str, Tree]]) -> Kept:
    """What clients keep as arrays; a tree that several share is packed once."""
    packed: dict[int, Arrays] = {}
    for own in memory.values():
        packed.update({id(t): pack(t) for t in own.values() if id(t) not in packed})
    return {client: {n: packed[id(t)] for n, t in own.items()} for client, own in memory.items()}


def unpack_memory(kept: Kept) -> dict[str, dict[str, Tree]]:
    """The memory that ``pack_memory`` was given; what was shared is shared."""
    found: dict[int, Tree] = {}
    for own in kept.values():
        found.update({id(a): unpack(a) for a in own.values() if id(a) not in found})
    return {client: {n: found[id(a)] for n, a in own.items()} for client, own in kept.items()}
