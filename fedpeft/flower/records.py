"""Messages as Flower's records, and back, exactly; nothing is pickled.

A message is one ``RecordDict``::

    tree.NAME   ArrayRecord    one per tree, its tensors in the tree's order
    scalars     MetricRecord   name -> float
    blobs       ConfigRecord   name -> bytes
    header      ConfigRecord   what transport needs to know, not part of the message

A tensor is its ``.npy`` serialisation; bfloat16, which NumPy lacks, is that of its bits as uint16
under a serialisation type of its own, so that nobody averages the bits as numbers. What comes in
was written by another party: every field is checked before it is used.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedpeft import __version__
from fedpeft import tree as trees
from fedpeft.errors import ReplyError
from fedpeft.strategy import Message, Messages
from fedpeft.tree import Tree
from fedpeft.validate import LOSS

log = logging.getLogger(__name__)

NPY = "numpy.ndarray"
"""Serialisation type of everything that NumPy has a type for; Flower's own name for it."""

BF16 = "fedpeft.bfloat16"
"""Serialisation type of bfloat16."""

MAX_BYTES = 2**34
"""Bytes of one message's tensors and blobs; a receiver that knows what it expects takes less."""

MAX_RECORDS, MAX_ENTRIES, MAX_NAME = 64, 100_000, 512
"""How many records a message has, entries a record, and characters a name."""

MAX_DIMENSIONS = 16

MAX_TEXT = 64 * 1024
"""Characters of a header's field: of the recipe's."""

_TREE = "tree."
_FLOATS = ["float64", "float32", "float16"]
_NUMPY_TYPES = [*_FLOATS, "int64", "int32", "int16", "int8", "uint8", "bool"]


@dataclass(frozen=True)
class Header:
    """What travels beside a message and is in no ledger.

    round: counts from 1; 0 outside rounds. client: whom the message is for or from. base, layout,
    words: see ``digests``. recipe: in requests, as YAML; a client
    needs nothing else to prepare. exchange: of the round, from 0. run: whose rounds these are, the
    same after a resume. nonce: of one request, random; its reply has the same. version: of the
    sender's fedpeft.
    """

    round: int = 0
    client: str = ""
    base: str = ""
    layout: str = ""
    words: str = ""
    recipe: str = ""
    exchange: int = 0
    run: str = ""
    nonce: str = ""
    version: str = __version__


def encode(message: Message, header: Header) -> RecordDict:
    """One message as records."""
    arrays = {name: encode_tree(tree) for name, tree in message.trees.items()}
    return _records(arrays, message, header)


def encode_stack(messages: Messages, headers: Sequence[Header]) -> list[RecordDict]:
    """The messages of K clients as records; a tree that was broadcast is serialised once."""
    same = {
        name: encode_tree(trees.row(tree, 0))
        for name, tree in messages.trees.items()
        if messages.coded is None and all(tensor.stride(0) == 0 for tensor in tree.values())
    }
    found = []
    for k, header in enumerate(headers):
        one = messages.travelling(k)
        own = {n: same[n] if n in same else encode_tree(t) for n, t in one.trees.items()}
        found.append(_records(own, one, header))
    return found


def decode(content: RecordDict, limit: int = MAX_BYTES) -> tuple[Message, Header]:
    """The message and its header. Raises ReplyError that names the first field that is wrong.

    limit: bytes that its tensors and blobs may have together. That, the number of entries and the
    length of names are known before anything is read, or allocated by what is declared.
    """
    _check_sizes(content, limit)
    found: dict[str, Tree] = {}
    for key, record in content.items():
        if key.startswith(_TREE) and isinstance(record, ArrayRecord):
            found[key.removeprefix(_TREE)] = decode_tree(record, key)
        elif (key, type(record)) not in _OTHERS:
            raise ReplyError(f"record {key!r} of type {type(record).__name__} is unknown")
    scalars, blobs, header = (content.get(key) for key, _ in _OTHERS)
    if scalars is None or blobs is None or header is None:
        missing = [key for key, _ in _OTHERS if key not in content]
        raise ReplyError(f"record {missing[0]!r} is missing")
    numbers = {}
    for name, value in scalars.items():
        if name == LOSS and not isinstance(value, float):
            continue  # it only tells; see validate
        if not isinstance(value, float):
            raise ReplyError(f"scalar {name!r} is of type {type(value).__name__}, not float")
        numbers[name] = value
    payloads = {}
    for name, value in blobs.items():
        if not isinstance(value, bytes):
            raise ReplyError(f"blob {name!r} is of type {type(value).__name__}, not bytes")
        payloads[name] = value
    assert isinstance(header, ConfigRecord)
    return Message(found, numbers, payloads), _decode_header(header)


def _check_sizes(content: RecordDict, limit: int) -> None:
    """Raises ReplyError for a message that is larger than any that fedpeft sends."""
    if len(content) > MAX_RECORDS:
        raise ReplyError(f"{len(content)} records, and at most {MAX_RECORDS} are allowed")
    size = 0
    for key, record in content.items():
        if len(record) > MAX_ENTRIES:
            raise ReplyError(
                f"record {key[:40]!r} has {len(record)} entries, and at most {MAX_ENTRIES} are "
                f"allowed"
            )
        for name in (key, *record):
            if len(name) > MAX_NAME or not name.isprintable():
                raise ReplyError(
                    f"a name of {len(name)} characters, {name[:40]!r}: names are printable and "
                    f"have at most {MAX_NAME}"
                )
        size += sum(_bytes(value) for value in record.values())
        if size > limit:
            raise ReplyError(f"more than {limit} bytes of tensors and blobs: none is read")


def _bytes(value: object) -> int:
    if isinstance(value, Array):
        return len(value.data)
    return len(value) if isinstance(value, bytes | str | list) else 8


_OTHERS = (("scalars", MetricRecord), ("blobs", ConfigRecord), ("header", ConfigRecord))


def encode_tree(tree: Tree) -> ArrayRecord:
    """A tree as an ArrayRecord."""
    return ArrayRecord({name: _encode_tensor(tensor) for name, tensor in tree.items()})


def decode_tree(record: ArrayRecord, field: str) -> Tree:
    """The tree of an ArrayRecord. Raises ReplyError that begins with ``field`` and tensor name."""
    return {name: _decode_tensor(array, f"{field} {name!r}") for name, array in record.items()}


def _records(arrays: dict[str, ArrayRecord], message: Message, header: Header) -> RecordDict:
    content = RecordDict({f"{_TREE}{name}": record for name, record in arrays.items()})
    content["scalars"] = MetricRecord({name: float(v) for name, v in message.scalars.items()})
    content["blobs"] = ConfigRecord(dict(message.blobs))
    content["header"] = ConfigRecord({f.name: getattr(header, f.name) for f in fields(header)})
    return content


def _decode_header(record: ConfigRecord) -> Header:
    _check_version(record.get("version"))
    known = {f.name: type(f.default) for f in fields(Header)}
    for name in sorted({*known, *record}):
        if name not in record or name not in known or type(record[name]) is not known[name]:
            value = type(record[name]).__name__ if name in record else "missing"
            wanted = known[name].__name__ if name in known else "unknown"
            raise ReplyError(f"header field {name!r} is {value}, should be {wanted}")
        if len(str(record[name])) > (MAX_TEXT if name == "recipe" else MAX_NAME):
            raise ReplyError(f"header field {name!r} is too long")
    return Header(**dict(record))  # type: ignore[arg-type]  # types were just checked


def _check_version(theirs: object) -> None:
    """Raises ReplyError where the sender's fedpeft speaks another language than this one.

    Before 1.0 that changes with the second number, from 1.0 on with the first.
    """
    if not isinstance(theirs, str) or not _VERSION.fullmatch(theirs):
        raise ReplyError(f"header field 'version' is {str(theirs)[:40]!r}, no version of fedpeft")
    own, other = ([int(n) for n in _FIRST.findall(v)[:2]] for v in (__version__, theirs))
    if own[0] == other[0] and (own[0] > 0 or own[1] == other[1]):
        if theirs != __version__:
            _warn(theirs)
        return
    newer = "newer" if other > own else "older"
    raise ReplyError(
        f"the sender's fedpeft {theirs} is {newer} than this one, {__version__}, and they do not "
        f"understand each other: install the same version on server and sites"
    )


_FIRST = re.compile(r"\d+", re.ASCII)


@functools.cache  # once for each version
def _warn(theirs: str) -> None:
    log.warning("the other side has fedpeft %s, this one %s", theirs, __version__)


_VERSION = re.compile(
    r"\d{1,4}\.\d{1,4}(?:\.\d{1,4})?(?:[A-Za-z.+-][A-Za-z0-9.+-]{0,40})?", re.ASCII
)


def _encode_tensor(tensor: Tensor) -> Array:
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype != torch.bfloat16:
        return Array(plain.numpy())
    bits = Array(plain.view(torch.uint16).numpy())
    return Array("bfloat16", tuple(plain.shape), BF16, bits.data)


def _decode_tensor(array: Array, field: str) -> Tensor:
    """Reads the ``.npy`` header, and the data only where it is what the header and array say."""
    if array.stype not in (NPY, BF16):
        raise ReplyError(f"{field}: serialisation type {array.stype!r} is unknown")
    stream = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # whatever a hostile header makes NumPy's parser raise
        raise ReplyError(f"{field}: no .npy data: {str(error)[:100]}") from None
    allowed = ["uint16"] if array.stype == BF16 else _NUMPY_TYPES
    if dtype.name not in allowed:
        raise ReplyError(f"{field}: dtype {dtype} is not allowed")
    said = (array.dtype, tuple(array.shape))
    held = ("bfloat16" if array.stype == BF16 else dtype.name, shape)
    if said != held:
        raise ReplyError(f"{field}: announced as {said}, holds {held}")
    left = len(array.data) - stream.tell()
    whole = len(shape) <= MAX_DIMENSIONS and all(0 <= n < 2**48 for n in shape)
    if not whole or left != math.prod(shape) * dtype.itemsize:
        raise ReplyError(f"{field}: {left} bytes of data for shape {shape} of {dtype}")
    raw = np.frombuffer(array.data, dtype=dtype, offset=stream.tell())
    values = raw.reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="))
    tensor = torch.from_numpy(np.ascontiguousarray(values).reshape(shape))
    return tensor.view(torch.bfloat16) if array.stype == BF16 else tensor
