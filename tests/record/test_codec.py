"""Encoding of states: everything comes back as the same type and the same bits, or is refused."""

from __future__ import annotations

import enum
import json
import math
import struct
from collections import OrderedDict
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest
import torch

from fedpeft.errors import CheckpointError, FedpeftError
from fedpeft.record.codec import decode, encode


@dataclass(frozen=True)
class State:
    value: object


@dataclass(frozen=True)
class Derived:
    base: int
    twice: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "twice", 2 * self.base)


@dataclass(frozen=True)
class Renamed:
    worth: object


def same(left: object, right: object) -> bool:
    """Equal in type, structure, order of keys and bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*raw)
    if isinstance(left, dict) and isinstance(right, dict):
        return same(list(left), list(right)) and same(list(left.values()), list(right.values()))
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return struct.pack("d", left) == struct.pack("d", right)
    return left == right


def through(state: object) -> object:
    tensors, node = encode(state)
    text = json.dumps(node, allow_nan=False)
    return decode(type(state), tensors, json.loads(text))


VALUES = {
    "none": None,
    "true is not 1": [True, 1, False, 0],
    "big integer": [2**63, -(2**200)],
    "text": ["", "ä\ud800\x00\u2028", "nan", "Infinity"],
    "special floats": [math.inf, -math.inf, math.nan, -0.0, 1.0, 5e-324, 0.1 + 0.2],
    "list": [],
    "tuple": (1, (), [(2,)]),
    "dict": {},
    "keys": {"1": "text", 1: "integer", -3: 0, "": 0, "tensor": 1, "dict": [], "float": "nan"},
    "order": {"b": 1, "a": 2},
    "looks like a tag": [{"tensor": "0"}, {"tuple": [1]}, {"float": "inf"}],
    "tree": {"b": torch.ones(2), "a": torch.zeros(())},
    "tensors anywhere": ({"x": [torch.arange(3), (torch.tensor(True),)]}, 2.5),
    "the same tensor twice": [torch.ones(2)] * 2,
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_as_the_same_type_and_value(name: str) -> None:
    state = State(VALUES[name])
    assert same(through(state).value, state.value)


def test_random_floats_are_exact() -> None:
    bits = np.random.default_rng(0).integers(0, 2**63, 2000, dtype=np.uint64)
    numbers = [float(x) for x in bits.view(np.float64) if math.isfinite(x)]
    assert same(through(State(numbers)).value, numbers)


def test_derived_fields_are_derived_again() -> None:
    assert through(Derived(4)) == Derived(4)


class Colour(enum.IntEnum):
    RED = 1


REFUSED = {
    "State.value is a numpy.float64": np.float64(1),
    "State.value is a numpy.ndarray": np.ones(2),
    "State.value['a'][1] is a builtins.set": {"a": [0, {1}]},
    "State.value is a builtins.bytes": b"x",
    "State.value is a fractions.Fraction": Fraction(1, 2),
    "State.value is a collections.OrderedDict": OrderedDict(a=1),
    "State.value is a torch._C.Generator": torch.Generator(),
    "Colour": Colour.RED,
    "State.value is a": State(1),
    "State.value[0.5] has a key of type float": {0.5: 1},
    "State.value[True] has a key of type bool": {True: 1},
    "State.value[(1,)] has a key of type tuple": {(1,): 1},
    "torch.complex64": torch.zeros(1, dtype=torch.complex64),
    "sparse": torch.eye(2).to_sparse(),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_checkpoint_cannot_hold_is_refused_by_place(message: str) -> None:
    with pytest.raises(FedpeftError) as caught:
        encode(State(REFUSED[message]))
    assert message in str(caught.value)


def test_a_state_must_be_a_dataclass_instance() -> None:
    for wrong in ({"a": 1}, State):
        with pytest.raises(FedpeftError, match="must be a dataclass"):
            encode(wrong)


def test_a_state_of_another_class_or_with_other_fields_is_refused() -> None:
    tensors, node = encode(State(1))
    with pytest.raises(CheckpointError, match=r"holds the state .*State, this run's is .*Renamed"):
        decode(Renamed, tensors, node)
    node["class"] = node["class"].replace("State", "Renamed")
    with pytest.raises(CheckpointError, match=r"\['value', 'worth'\] are on one side only"):
        decode(Renamed, tensors, node)


@dataclass(frozen=True)
class Outer:
    inner: Renamed
    step: int


def test_a_field_may_be_another_dataclass() -> None:
    state = Outer(Renamed({1: torch.arange(3)}), 4)
    found = through(state)
    assert isinstance(found, Outer) and isinstance(found.inner, Renamed) and found.step == 4
    assert same(found.inner.worth, state.inner.worth)
    tensors, node = encode(state)
    node["fields"]["inner"]["class"] = "elsewhere.Renamed"
    with pytest.raises(CheckpointError, match=r"holds the state elsewhere\.Renamed"):
        decode(Outer, tensors, node)
