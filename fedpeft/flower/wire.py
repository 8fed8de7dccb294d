"""Flower's records as a frame of the site's socket, and back, exactly; light, without torch.

The head has names, types, numbers and text; the bytes of tensors and blobs lie in the body, where
the head says: ``[offset, length]``. Tensors stay serialised, as Flower has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedpeft.site.frames import Frame, FrameError

_SCALARS = (str, int, float, bool)


def pack(head: Mapping[str, Any], content: RecordDict) -> Frame:
    """A frame of ``head`` and, under ``records``, the content."""
    body = bytearray()

    def put(data: bytes) -> list[int]:
        body.extend(data)
        return [len(body) - len(data), len(data)]

    records = [[name, *_pack_record(record, put)] for name, record in content.items()]
    return Frame({**head, "records": records}, body)


def unpack(frame: Frame) -> RecordDict:
    """The content that ``pack`` was given. Raises FrameError for what is none."""
    body = memoryview(frame.body)

    def get(place: object) -> bytes:
        match place:
            case [int(start), int(length)] if start >= 0 and 0 <= length <= len(body) - start:
                return bytes(body[start : start + length])
        raise FrameError("a record on the site's socket lies outside its frame")

    found = RecordDict()
    try:
        for name, kind, items in frame.head["records"]:
            found[name] = _unpack_record(kind, items, get)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, FrameError):
            raise
        raise FrameError(f"records on the site's socket are malformed: {error!r:.100}") from error
    return found


def _pack_record(record: object, put: Callable[[bytes], list[int]]) -> tuple[str, Any]:
    if isinstance(record, ArrayRecord):
        return "arrays", [
            [name, array.dtype, list(array.shape), array.stype, put(array.data)]
            for name, array in record.items()
        ]
    if isinstance(record, MetricRecord):
        return "metrics", list(record.items())
    assert isinstance(record, ConfigRecord), "Flower has no other records"
    return "config", [[name, _pack_value(value, put)] for name, value in record.items()]


def _pack_value(value: object, put: Callable[[bytes], list[int]]) -> object:
    """Bytes are where an object says; numbers and text are what they are."""
    if isinstance(value, bytes):
        return {"at": put(value)}
    if isinstance(value, list):
        return [_pack_value(item, put) for item in value]
    return value


def _unpack_record(kind: str, items: Any, get: Callable[[object], bytes]) -> Any:
    if kind == "arrays":
        return ArrayRecord(
            {
                name: Array(dtype, tuple(shape), stype, get(place))
                for name, dtype, shape, stype, place in items
            }
        )
    if kind == "metrics":
        return MetricRecord({name: value for name, value in items})
    if kind == "config":
        return ConfigRecord({name: _unpack_value(value, get) for name, value in items})
    raise FrameError(f"a record of kind {str(kind)[:40]!r} on the site's socket is unknown")


def _unpack_value(value: object, get: Callable[[object], bytes]) -> Any:
    if isinstance(value, dict):
        return get(value.get("at"))
    if isinstance(value, list):
        return [_unpack_value(item, get) for item in value]
    if not isinstance(value, _SCALARS):
        raise FrameError("a setting on the site's socket is neither number nor text nor bytes")
    return value
