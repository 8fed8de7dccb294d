"""The toy cohort is as strict as a real one: what a real one could not compute is refused."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from fedpeft import tree
from fedpeft.conformance.toy import FAN_IN_FAN_OUT, LAYERS, make
from fedpeft.tree import Tree


def test_layers_are_wide_square_and_tall_and_no_scale_is_one() -> None:
    shapes = {(d_out > d_in) - (d_out < d_in) for d_out, _, d_in, _ in LAYERS.values()}
    assert shapes == {-1, 0, 1}
    assert all(s != 1 for *_, s in LAYERS.values())
    assert {*FAN_IN_FAN_OUT} < LAYERS.keys()
    scales = [s for *_, s in LAYERS.values()]
    assert len(set(scales)) == len(scales), "scales that are mixed up would go unseen"


def test_start_and_fixed_name_every_tensor_once() -> None:
    toy = make(2)
    cohort, whole = toy.cohort(toy.clients), tree.broadcast(toy.initial, 2)
    name = next(iter(whole))
    part = {n: x for n, x in whole.items() if n != name}
    with pytest.raises(ValueError, match=rf"missing \['{name}'\]"):
        cohort.fit(part)
    with pytest.raises(ValueError, match=rf"twice \['{name}'\]"):
        cohort.fit(whole, fixed={name: toy.initial[name]})
    with pytest.raises(ValueError, match=r"unknown \['odd'\]"):
        cohort.fit({**whole, "odd": torch.zeros(2, 1)})
    with pytest.raises(ValueError, match="for 2 clients it is"):
        cohort.fit({**whole, name: whole[name][:1]})
    with pytest.raises(ValueError, match="was given as"):
        cohort.fit(part, fixed={name: whole[name]})


def test_what_adjust_is_given_is_not_written_to() -> None:
    toy = make(3)
    start = tree.broadcast(toy.initial, 3)
    copy = {n: x.clone() for n, x in start.items()}

    def into_the_adapter(gradient: Tree, adapter: Tree, own: Mapping[str, Tree]) -> Tree:
        next(iter(adapter.values())).add_(1.0)
        return gradient

    def into_its_own(gradient: Tree, adapter: Tree, own: Mapping[str, Tree]) -> Tree:
        next(iter(own["start"].values())).add_(1.0)
        return gradient

    def into_what_is_fixed(gradient: Tree, adapter: Tree, own: Mapping[str, Tree]) -> Tree:
        fixed[name].add_(1.0)
        return gradient

    for wrong in (into_the_adapter, into_its_own):
        with pytest.raises(ValueError, match="wrote into the adapter, or own"):
            toy.cohort(toy.clients).fit(start, adjust=wrong, own={"start": copy})
    name = next(n for n in toy.initial if "bias" in n)
    fixed = {name: toy.initial[name].clone()}
    part = {n: x for n, x in start.items() if n != name}
    with pytest.raises(ValueError, match=f"wrote into the trees given as fixed: {name}"):
        toy.cohort(toy.clients).fit(part, fixed=fixed, adjust=into_what_is_fixed)


def test_adjust_sees_only_clients_that_still_step_in_other_rows() -> None:
    toy = make(5)
    start = tree.broadcast(toy.initial, 5)
    numbers = {"k": torch.arange(5.0, dtype=torch.float64)}
    seen: list[list[int]] = []

    def note(gradient: Tree, adapter: Tree, own: Mapping[str, Tree]) -> Tree:
        seen.append([int(k) for k in own["row"]["k"]])
        return gradient

    toy.cohort(toy.clients).fit(start, adjust=note, own={"row": numbers})
    steps = [sum(k in rows for rows in seen) for k in range(5)]
    assert steps == [toy.steps[c] for c in toy.clients]
    assert all(len(rows) <= 2 and rows == sorted(rows, reverse=True) for rows in seen)


def test_what_was_trained_is_noted() -> None:
    toy = make(2)
    name = next(n for n in toy.initial if "bias" in n)
    part = {n: x for n, x in tree.broadcast(toy.initial, 2).items() if n != name}
    fit = toy.cohort(toy.clients).fit(part, fixed={name: toy.initial[name]})
    assert toy.moved == part.keys()
    for k, client in enumerate(toy.clients):
        tree.check_same(toy.initial, toy.trained[client])
        assert all(torch.equal(toy.trained[client][n], x[k]) for n, x in fit.adapter.items())
