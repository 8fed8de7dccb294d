"""Compressed broadcasts: clients are sent how the model changed since the version that they hold.

The server keeps, beside the exact model w of the strategy, the one that clients have, r. In each
exchange ``r <- r + C(w - r)``: what a codec leaves out is in the next difference, so its error does
not pile up. Who holds the version before is sent C(w - r), everybody else r itself, uncompressed.
Clients train from r; what they reply is moved by ``w - r``, so that the strategy receives updates
of its own model.

With ``of: weights`` there is nothing to refer to: ``r = C(w)``, as in FLASC (Kuo et al., arXiv
2406.05233), whose clients start from the largest weights and zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedpeft.codecs import Codec, codec_id, encode
from fedpeft.codecs.wire import Header
from fedpeft.comms.payloads import Payloads, read, told
from fedpeft.comms.schema import Schema, applied, found
from fedpeft.errors import FedpeftError, PayloadError
from fedpeft.message import Messages, Replies
from fedpeft.postprocess import Kept, Postprocessor, flat
from fedpeft.streams import derive
from fedpeft.tree import Tree, broadcast, row, shared

PLAIN = Codec(codec="dense")
"""How a version is sent to who does not hold the one before."""


@dataclass(frozen=True)
class Held:
    """Of one schema: the newest version, its trees (unstacked), and client -> version it holds."""

    version: int
    trees: Mapping[str, Tree]
    clients: Mapping[str, int]


@dataclass
class Downlink(Postprocessor):
    """The codec of what clients are sent. It comes first of all that is done on the server.

    base: digest of the frozen base. For strategies that send all clients of a group the same.
    """

    codec: Codec
    seed: int
    base: str
    held: dict[str, Held] = field(default_factory=dict, init=False)
    waiting: list[tuple[str, int, tuple[str, ...]]] = field(default_factory=list, init=False)
    gaps: dict[str, Mapping[str, Tree]] = field(default_factory=dict, init=False)

    def announce(self, sent: Messages) -> Messages:
        one = {tree: row(own, 0) for tree, own in sent.trees.items()}
        self._check_alike(sent)
        schema = Schema.of(one)
        before = self.held.get(schema.digest, Held(0, {}, {}))
        ...
