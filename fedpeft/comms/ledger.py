"""The byte ledger: what every message costs, by kind, from the exact size formula.

The formula is Flower's ``count_bytes``: a tensor costs its ``.npy`` serialisation (header included,
bfloat16 as uint16) plus its name, a scalar 8 bytes plus its name, a blob its length plus its name;
a name costs a byte per character. A test proves it against what ``fedpeft.flower`` really
serialises. Not counted: the names of trees, and what transport adds to each message (round, client,
digests; in requests the recipe, about 2 kB; Flower's own metadata).
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch

from fedpeft.message import PAYLOAD, Message, Messages
from fedpeft.model import kind_of

Bytes = dict[str, int]
"""Bytes by kind: ``adapter``, ``head``, ``base``, ``scalar``, ``blob``.

Where a codec was at work also ``index`` and ``mask`` (which numbers were kept), ``scale``,
``seed``, ``schema`` (names and shapes, once per client) and ``header``. ``partial`` is what came of
replies that broke off, under a fleet's clock.
"""


@dataclass(frozen=True)
class Entry:
    """What each of these clients was sent, or sent, in an exchange: bytes by kind."""

    clients: tuple[str, ...]
    each: Bytes


def totals(entries: Iterable[Entry]) -> Bytes:
    """Bytes of all entries by kind."""
    found: Counter[str] = Counter()
    for entry in entries:
        found.update({kind: size * len(entry.clients) for kind, size in entry.each.items()})
    return dict(found)


PARTIAL = "partial"
"""The kind of what came of a reply that broke off."""


def messages(entries: Iterable[Entry]) -> int:
    """How many messages there were, without those that broke off."""
    return sum(len(entry.clients) for entry in entries if PARTIAL not in entry.each)


def grouped(entries: Iterable[Entry]) -> list[Entry]:
    """The same of one exchange: clients of equal bytes together, sorted, whoever trained them."""
    found: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for entry in entries:
        found.setdefault(tuple(sorted(entry.each.items())), []).extend(entry.clients)
    whole = [Entry(tuple(sorted(clients)), dict(each)) for each, clients in found.items()]
    return sorted(whole, key=lambda entry: entry.clients)


@cache
def _header(dtype: str, shape: tuple[int, ...]) -> int:
    out = io.BytesIO()
    described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, described)
    return out.tell()


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of one tensor as ``.npy``."""
    kind = "uint16" if tensor.dtype == torch.bfloat16 else str(tensor.dtype).removeprefix("torch.")
    return _header(kind, tuple(tensor.shape)) + tensor.numel() * tensor.element_size()


def message_bytes(message: Message) -> Bytes:
    """Bytes of one message by kind."""
    found: Counter[str] = Counter()
    for tree in message.trees.values():
        for name, tensor in tree.items():
            found[kind_of(name)] += tensor_bytes(tensor) + len(name)
    for name in message.scalars:
        found["scalar"] += 8 + len(name)
    for name, blob in message.blobs.items():
        found["blob"] += len(blob) + len(name)
    return dict(found)


def entries(messages: Messages) -> list[Entry]:
    """What the messages of a stack cost, clients of equal messages together.

    Trees that a codec was at are as long as it says.
    """
    if not len(messages):
        return []
    coded = messages.coded
    bare = replace(messages, trees={} if coded else messages.trees, coded=None, blobs={})
    common = Counter(message_bytes(bare[0]))
    sizes: dict[str, list[int]] = {}
    if messages.blobs:  # may differ in length from client to client
        names = sum(len(name) for name in messages.blobs)
        whole = zip(*messages.blobs.values(), strict=True)
        sizes["blob"] = [names + sum(len(blob) for blob in own) for own in whole]
    if coded is not None:
        common["header"] += len(PAYLOAD)
        sizes |= {kind: length.tolist() for kind, length in coded.sizes().items()}
    alike: dict[tuple[int, ...], list[str]] = {}
    for k, name in enumerate(messages.clients):
        alike.setdefault(tuple(length[k] for length in sizes.values()), []).append(name)
    return [
        Entry(tuple(clients), dict(common + Counter(dict(zip(sizes, own, strict=True)))))
        for own, clients in alike.items()
    ]


def stack_bytes(messages: Messages) -> Bytes:
    """Bytes of all messages of a stack by kind."""
    return totals(entries(messages))


@dataclass
class Ledger:
    """Running totals, both ways: downlink counts every participant, uplink what was delivered."""

    down: Bytes = field(default_factory=dict)
    up: Bytes = field(default_factory=dict)

    def add(self, down: Mapping[str, int], up: Mapping[str, int]) -> None:
        """Adds a round's bytes."""
        for total, more in ((self.down, down), (self.up, up)):
            for kind, size in more.items():
                total[kind] = total.get(kind, 0) + size
