"""A strategy's state as tensors and JSON, and back, exactly; nothing is pickled or imported.

What a state may hold: Tensors (floating point, integer, bool), int, float, str, bool, None, and
dicts (keys str or int), lists and tuples of these; a field that is declared as another dataclass
may hold one. JSON has no tuples, integer keys, NaN or tensors, so these become objects of one key::

    {"tensor": "3"}   {"tuple": [...]}   {"dict": [[key, value], ...]}   {"float": "nan"}
"""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from fedpeft.errors import CheckpointError, FedpeftError

S = TypeVar("S")

_DTYPES = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
}


def encode(state: object) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A dataclass instance as numbered tensors (as they are, not copied) and JSON.

    Raises FedpeftError that names the place of a value that a checkpoint cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(state, tensors)


def _encode(state: object, tensors: dict[str, Tensor]) -> dict[str, Any]:
    kind = type(state)
    inner = _inner(kind)
    values: dict[str, object] = {}
    for name in _fields(kind):
        value = getattr(state, name)
        if name in inner and type(value) is inner[name]:
            values[name] = _encode(value, tensors)
        else:
            values[name] = pack(value, f"{kind.__name__}.{name}", tensors)
    return {"class": _name(kind), "fields": values}


def decode(kind: type[S], tensors: dict[str, Tensor], node: dict[str, Any]) -> S:
    """The state that ``encode`` was given. Raises CheckpointError where ``kind`` is another."""
    if node["class"] != _name(kind):
        raise CheckpointError(f"holds the state {node['class']}, this run's is {_name(kind)}")
    found, wanted = set(node["fields"]), _fields(kind)
    if found != set(wanted):
        one_sided = sorted(found ^ set(wanted))
        raise CheckpointError(f"{_name(kind)} has changed: fields {one_sided} are on one side only")
    inner, values = _inner(kind), {}
    for name in wanted:
        own = node["fields"][name]
        values[name] = decode(inner[name], tensors, own) if name in inner else unpack(own, tensors)
    return kind(**values)


def pack(value: object, where: str, tensors: dict[str, Tensor]) -> object:
    """``value`` as JSON; its tensors are added to ``tensors`` under their number."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if isinstance(value, float) and kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        return {"tensor": _add(value, where, tensors)}
    if isinstance(value, list) and kind is list:
        return [pack(v, f"{where}[{i}]", tensors) for i, v in enumerate(value)]
    if isinstance(value, tuple) and kind is tuple:
        return {"tuple": [pack(v, f"{where}[{i}]", tensors) for i, v in enumerate(value)]}
    if isinstance(value, dict) and kind is dict:
        return {"dict": [_pack_item(k, v, f"{where}[{k!r}]", tensors) for k, v in value.items()]}
    raise FedpeftError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold. Use "
        "Tensor, int, float, str, bool, None, or a plain dict, list or tuple of these."
    )


def unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    """What ``pack`` was given."""
    if isinstance(node, list):
        return [unpack(v, tensors) for v in node]
    if not isinstance(node, dict):
        return node
    [(tag, body)] = node.items()
    if tag == "tensor":
        return tensors[body]
    if tag == "tuple":
        return tuple(unpack(v, tensors) for v in body)
    if tag == "dict":
        return {key: unpack(v, tensors) for key, v in body}
    return float(body)


def _pack_item(key: object, value: object, where: str, tensors: dict[str, Tensor]) -> list[object]:
    if type(key) not in (str, int):
        raise FedpeftError(f"{where} has a key of type {type(key).__name__}: use str or int")
    return [key, pack(value, where, tensors)]


def _add(tensor: Tensor, where: str, tensors: dict[str, Tensor]) -> str:
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
        raise FedpeftError(
            f"{where} is a tensor of {tensor.dtype}, {tensor.layout}; a checkpoint holds dense "
            "tensors of floating point, (u)int8 to int64 and bool"
        )
    number = str(len(tensors))
    tensors[number] = tensor
    return number


def _inner(kind: type) -> dict[str, type]:
    """Fields that are declared as another dataclass, and which."""
    hints = get_type_hints(kind)
    return {n: hints[n] for n in _fields(kind) if is_dataclass(hints[n])}


def _fields(kind: type) -> list[str]:
    if not is_dataclass(kind):
        raise FedpeftError(f"a strategy's state must be a dataclass, not {kind.__name__}")
    return [f.name for f in fields(kind) if f.init]


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
