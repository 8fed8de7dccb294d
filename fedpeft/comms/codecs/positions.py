"""Which numbers are kept, and how a payload says so.

Sections: ``bitmask``, a bit for every number; or the gaps before each kept number, the first one
counted from the start, as Golomb-Rice codes (``golomb``) or LEB128 (``varint``); or the places
themselves, uint32 (``coo``). ``count``, uint32, is there only where it is not the number expected.
Where all or no numbers are kept there is nothing to say.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft.comms import bits
from fedpeft.comms.codecs.symbols import Part, Sections, count_true
from fedpeft.errors import PayloadError

WAYS = ("bitmask", "golomb", "varint", "coo")


def largest(keys: Tensor, count: int) -> Tensor:
    """The ``count`` largest of each row of ``[K, d]``, of equal ones the first: bool ``[K, d]``."""
    size = keys.shape[1]
    if count in (0, size):
        return torch.full_like(keys, count == size, dtype=torch.bool)
    if keys.device.type == "cpu":  # three times as fast as torch's kthvalue there
        ordered = np.partition(keys.numpy(), size - count, axis=1)
        least = torch.from_numpy(ordered[:, size - count, None])
    else:
        least = keys.kthvalue(size - count + 1, dim=1, keepdim=True).values
    found = keys >= least
    tied = (count_true(found) > count).nonzero()[:, 0]
    if len(tied):
        own, edge = keys[tied], least[tied]
        above, equal = own > edge, own == edge
        spare = count - above.sum(dim=1, keepdim=True)
        found[tied] = above | (equal & (equal.cumsum(dim=1) <= spare))
    return found


@dataclass(frozen=True)
class Kept:
    """Places of the kept numbers of K rows of d.

    index: int64 ``[K, most]``, ascending; d beyond a row's count. counts: int64 ``[K]``. even:
    whether all rows keep as many.
    """

    index: Tensor
    counts: Tensor
    size: int
    even: bool

    @staticmethod
    def of(mask: Tensor, count: int | None = None) -> Kept:
        """The places that a mask ``[K, d]`` holds; count: in every row, where that is known."""
        rows, size = mask.shape
        if count is not None:
            index = _flat(mask).view(rows, count)
            index -= size * torch.arange(rows, device=mask.device)[:, None]
            return Kept(index, index.new_full((rows,), count), size, True)
        row, place = mask.nonzero(as_tuple=True)
        counts = count_true(mask)
        rank = torch.arange(len(row), device=mask.device) - (counts.cumsum(0) - counts)[row]
        most = int(counts.max()) if rows else 0
        index = torch.full((rows, most), size, device=mask.device)
        index[row, rank] = place
        return Kept(index, counts, size, False)

    def gather(self, matrix: Tensor) -> Tensor:
        """The kept numbers ``[K, most]`` of ``[K, d]``; zero beyond a row's count."""
        return (matrix if self.even else F.pad(matrix, (0, 1))).gather(1, self.index)

    def scatter(self, kept: Tensor) -> Tensor:
        """``[K, d]`` with the numbers of ``[K, most]`` at their places, zero elsewhere."""
        wide = kept.new_zeros(len(kept), self.size if self.even else self.size + 1)
        return wide.scatter_(1, self.index, kept)[:, : self.size].contiguous()

    def gaps(self) -> Tensor:
        """Numbers before each kept one since the last, int64 ``[K, most]``; 0 beyond the count."""
        found = self.index.diff(dim=1, prepend=self.index.new_full((len(self.index), 1), -1)) - 1
        if not self.even:
            found.masked_fill_(self.index == self.size, 0).clamp_(min=0)
        return found

    def rows(self, index: Tensor) -> Kept:
        """The same of the rows in ``index``."""
        return Kept(self.index[index], self.counts[index], self.size, self.even)

    def places(self, k: int) -> np.ndarray:
        """Row k's places, int64."""
        return self.index[k, : int(self.counts[k])].cpu().numpy()


def _flat(mask: Tensor) -> Tensor:
    """Where a contiguous mask is true, counted through all rows."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero()[:, 0]


@dataclass(frozen=True)
class Positions(Part):
    """The sections that say where the kept numbers are.

    expected: the count that a reader knows already. sizes: bytes of each way, int64 ``[K]``.
    way: which of WAYS each client has, int64 ``[K]``; -1 for none.
    """

    kept: Kept
    expected: int
    sizes: dict[str, Tensor]
    way: Tensor

    @staticmethod
    def of(kept: Kept, expected: int, wanted: str) -> Positions:
        """Chooses for each client, of equal sizes the first; wanted: ``auto`` or one of WAYS."""
        found = {name: _size(name, kept) for name in WAYS if wanted in ("auto", name)}
        best = torch.stack(list(found.values())).min(dim=0).indices
        way = best if wanted == "auto" else torch.full_like(best, WAYS.index(wanted))
        needed = (kept.counts > 0) & (kept.counts < kept.size)
        return Positions(kept, expected, found, torch.where(needed, way, -1))

    def without(self, clients: Tensor) -> Positions:
        """The same where some clients, bool ``[K]``, send all numbers and need none of this."""
        return Positions(self.kept, self.expected, self.sizes, torch.where(clients, -2, self.way))

    def lengths(self) -> dict[str, Tensor]:
        found = {n: torch.where(self.way == WAYS.index(n), s, -1) for n, s in self.sizes.items()}
        if not self.kept.even:
            told = (self.kept.counts != self.expected) & (self.way != -2)
            found["count"] = torch.where(told, 4, -1)
        return found

    def total(self) -> Tensor:
        """Bytes of all of it, int64 ``[K]``."""
        return torch.stack([size.clamp(min=0) for size in self.lengths().values()]).sum(dim=0)

    def arrays(self, k: int) -> dict[str, np.ndarray]:
        way, places = int(self.way[k]), self.kept.places(k)
        found = {}
        if way != -2 and len(places) != self.expected:
            found["count"] = np.array([len(places)], dtype="<u4").view(np.uint8)
        if way >= 0:
            found[WAYS[way]] = _pack(WAYS[way], places, self.kept.size)
        return found

    def rows(self, index: Tensor) -> Positions:
        sizes = {name: size[index] for name, size in self.sizes.items()}
        return Positions(self.kept.rows(index), self.expected, sizes, self.way[index])


def _size(way: str, kept: Kept) -> Tensor:
    """Bytes of all rows' places written in one way."""
    match way:
        case "bitmask":
            return torch.full_like(kept.counts, -(-kept.size // 8))
        case "golomb" if kept.even:
            count = kept.index.shape[1]
            parameter = bits.rice_parameter(count, kept.size)
            return bits.bytes_for(bits.rice_bits(kept.gaps(), kept.counts, parameter))
        case "golomb":
            return _uneven_golomb(kept)
        case "varint":
            return bits.varint_bytes(kept.gaps(), kept.counts)
        case _:
            return 4 * kept.counts


def _uneven_golomb(kept: Kept) -> Tensor:
    """As ``_size``, where rows have counts, and so parameters, of their own."""
    gaps, found = kept.gaps(), torch.zeros_like(kept.counts)
    own = [bits.rice_parameter(count, kept.size) for count in kept.counts.tolist()]
    parameters = torch.tensor(own, dtype=torch.int64, device=found.device)
    for parameter in sorted(set(own)):
        size = bits.bytes_for(bits.rice_bits(gaps, kept.counts, parameter))
        found = torch.where(parameters == parameter, size, found)
    return found


def _pack(way: str, places: np.ndarray, size: int) -> np.ndarray:
    if way == "coo":
        return places.astype("<u4").view(np.uint8)
    if way == "bitmask":
        mask = np.zeros(size, dtype=np.uint8)
        mask[places] = 1
        return bits.pack(mask)
    gaps = np.diff(places, prepend=-1) - 1
    if way == "varint":
        return bits.varint_pack(gaps)
    return bits.rice_pack(gaps, bits.rice_parameter(len(places), size))


def read(sections: Sections, size: int, expected: int, wanted: str, fixed: bool) -> np.ndarray:
    """The places of one client's kept numbers among ``size``: int64, ascending, all in range.

    expected: how many there are unless the payload says so; fixed: it must not.
    """
    count = expected
    if not fixed and sections.has("count"):
        count = int(sections.take("count", 4).view("<u4")[0])
        if count >= expected:
            raise PayloadError(f"payload: {count} numbers are kept, of {expected} at most")
    if count in (0, size):
        return np.arange(count)
    for way in WAYS if wanted == "auto" else (wanted,):
        if sections.has(way):
            return _unpack(way, sections.take(way), count, size)
    raise PayloadError("payload: no section says which numbers are kept")


def _unpack(way: str, data: np.ndarray, count: int, size: int) -> np.ndarray:
    what = f"section {way!r}"
    match way:
        case "bitmask":
            found = np.flatnonzero(bits.unpack(data, size, what))
            if len(found) != count:
                raise PayloadError(f"payload: {what} has {len(found)} places, not {count}")
            return found
        case "golomb":
            gaps = bits.rice_unpack(data, count, bits.rice_parameter(count, size), what)
        case "varint":
            gaps = bits.varint_unpack(data, count, what)
        case _:
            if len(data) != 4 * count:
                raise PayloadError(f"payload: {what} has {len(data)} bytes, not {4 * count}")
            gaps = np.diff(data.view("<u4").astype(np.int64), prepend=-1) - 1
            if bool((gaps < 0).any()):
                raise PayloadError(f"payload: {what} has places that do not ascend")
    return bits.places(gaps, size, what)
