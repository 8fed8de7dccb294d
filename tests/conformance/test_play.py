"""Comparisons that the properties rest on: bits, gaps, meanings."""

from __future__ import annotations

import math

import pytest
import torch

from fedpeft.conformance.finding import Finding
from fedpeft.conformance.play import (
    gap,
    meaning,
    message_bits,
    numbers,
    play,
    require_close,
    state_bits,
    used_by,
)
from fedpeft.conformance.toy import LAYERS, a_of, b_of, make
from fedpeft.strategies.fedavg import FedAvg, State
from fedpeft.strategies.fedprox import FedProx
from fedpeft.strategy import Messages


def test_a_gap_names_its_tensor_and_sees_small_tensors() -> None:
    large, small = torch.full((4,), 100.0), torch.full((4,), 1.0)
    size, name = gap({"a": large, "b": small * 1.5}, {"a": large, "b": small})
    assert name == "b" and size == pytest.approx(0.5)
    size, _ = gap({"a": large, "b": small * 0 + 1e-5}, {"a": large, "b": small * 0})
    assert size == pytest.approx(1e-5 / (1e-3 * 100))
    assert gap({}, {}) == (0.0, "")


def test_a_gap_with_nan_is_never_close() -> None:
    one = {"a": torch.ones(2), "b": torch.tensor([1.0, math.nan])}
    size, name = gap(one, {"a": torch.zeros(2), "b": torch.ones(2)})
    assert size == math.inf and name == "b"
    with pytest.raises(Finding, match="here: b differs by inf"):
        require_close(one, {"a": torch.ones(2), "b": torch.ones(2)}, 1.0, "here")


def test_other_names_are_a_finding() -> None:
    with pytest.raises(Finding, match=r"tensors differ: \['b'\]"):
        gap({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})


def test_a_meaning_does_not_depend_on_the_factors_of_an_update() -> None:
    toy = make()
    adapter = {n: torch.randn(x.shape, dtype=x.dtype) for n, x in toy.initial.items()}
    turned = dict(adapter)
    for layer, (_, r, _, _) in LAYERS.items():
        mix = torch.randn(r, r, dtype=torch.float64) + 3 * torch.eye(r)
        turned[a_of(layer)] = torch.linalg.solve(mix, adapter[a_of(layer)])
        turned[b_of(layer)] = adapter[b_of(layer)] @ mix
    assert gap(turned, adapter)[0] > 0.1
    assert gap(meaning(toy, turned), meaning(toy, adapter))[0] < 1e-12
    assert meaning(toy, adapter).keys() == {*LAYERS, *(n for n in adapter if "lora" not in n)}


def test_bits_tell_apart_what_is_equal_as_a_number() -> None:
    zero, minus = torch.zeros(2), -torch.zeros(2)
    assert torch.equal(zero, minus)
    assert state_bits(State({"x": zero})) != state_bits(State({"x": minus}))
    one, two = (Messages(("a",), {"t": {"x": x[None]}}) for x in (zero, minus))
    assert message_bits(one) != message_bits(two)
    other = Messages(("a",), {"t": {"x": zero[None]}}, blobs={"b": (b"1",)})
    assert message_bits(one) != message_bits(other)


def test_numbers_of_a_state() -> None:
    toy = make(2)
    state = play(FedProx(space="product"), toy, 1).states[-1]
    found = numbers(state)
    layer = next(iter(LAYERS))
    assert torch.equal(found[f"state.adapter.{a_of(layer)}"], state.adapter[a_of(layer)])
    assert float(found[f"state.scaling.{layer}"]) == LAYERS[layer][3]
    assert len(found) == len(toy.initial) + len(LAYERS)
    assert numbers([1, (2.5, "text"), None]).keys() == {"state.0", "state.1.0"}


def test_what_clients_use_has_to_be_complete() -> None:
    toy = make(2)
    state = State({n: x for n, x in toy.initial.items() if "bias" not in n})
    with pytest.raises(ValueError, match=r"adapter of client-0 differ in names: missing .*bias"):
        used_by(FedAvg(), toy, state, 1)
