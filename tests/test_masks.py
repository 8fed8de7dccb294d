"""Masks: every policy's rule, and that what travels is what is under them."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from fedpeft import masks, tree
from fedpeft.errors import FedpeftError, PayloadError
from fedpeft.masks import POLICIES, Ask, Level, choose
from tests.strategies.toy import LAYERS, a_of, b_of, make

LEVELS = get_args(Level)


def units(policy: str, budgets: tuple[float, ...], round: int = 0, w: int = 8) -> list[list[int]]:
    """Which of ``w`` units of falling score the clients c0, c1, ... train."""
    names = tuple(f"c{k}" for k in range(len(budgets)))
    found = choose(policy, torch.arange(w, 0, -1.0), Ask(names, budgets, round, 3), "layer")
    return [torch.nonzero(own).flatten().tolist() for own in found]


def test_rolling_is_the_golden_example_and_meets_every_unit() -> None:
    for t, wanted in ((0, [0, 1, 2]), (1, [1, 2, 3]), (6, [0, 6, 7])):
        assert units("rolling", (3 / 8,), t) == [wanted]
    for first in range(3):
        met = {j for t in range(first, first + 8) for j in units("rolling", (1 / 8,), t)[0]}
        assert met == set(range(8))


def test_static_masks_are_nested_and_as_wide_as_the_budget_rounded_up() -> None:
    own = units("static_ordered", (0.01, 0.25, 0.3, 0.5, 1.0))
    assert own == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], list(range(8))]


def test_random_masks_are_fresh_by_client_and_round_and_fixed_ones_are_not() -> None:
    here = units("random", (0.5, 0.5))
    assert [len(own) for own in here] == [4, 4] and here[0] != here[1]
    assert here == units("random", (0.5, 0.5)) != units("random", (0.5, 0.5), 1)
    one, two, other = units("fixed_subnet", (0.5, 0.5, 0.25))
    assert one == two and len(other) == 2
    assert [one, two, other] == units("fixed_subnet", (0.5, 0.5, 0.25), 5)


def test_magnitude_takes_the_largest_and_quartiles_are_by_rank() -> None:
    scores, ask = torch.tensor([3.0, 9, 1, 7, 5, 2, 8, 4]), Ask("cd", (0.5, 0.25), 0, 0)
    found = choose("magnitude", scores, ask, "")
    assert [torch.nonzero(own).flatten().tolist() for own in found] == [[1, 3, 4, 6], [1, 6]]
    types = Ask("abcdefg", (1, 2, 3, 4, 5, 6, 7), 0, 0)
    quarters = [{2, 5}, {0, 7}, {4, 3}, {6, 1}]  # units by value: the smallest two, ...
    for kind, own in zip(types.budgets, choose("quartile", scores, types, ""), strict=True):
        gone = set().union(*(quarters[q] for q in masks.DROPPED[int(kind)]))
        assert set(torch.nonzero(own).flatten().tolist()) == set(range(8)) - gone


def test_a_drawn_width_is_a_level_up_to_the_clients_own() -> None:
    ask = Ask(tuple(f"c{k}" for k in range(400)), (0.5,) * 400, 0, 1)
    drawn = masks.draw_budgets(ask, [1.0, 0.25, 0.5, 0.5])
    assert set(drawn.budgets) == {0.25, 0.5}
    assert 150 < sum(b == 0.5 for b in drawn.budgets) < 250
    assert drawn == masks.draw_budgets(ask, [0.25, 0.5, 1.0])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "quartile"])
def test_masks_keep_rank_components_and_modules_whole(policy: str, level: Level) -> None:
    toy = make()
    at = {
        n: torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        for n, x in toy.initial.items()
    }
    found = masks.masks(policy, level, at, Ask(("x", "y"), (0.5, 1.0), 1, 4))
    assert set(found) == {name(layer) for layer in LAYERS for name in (a_of, b_of)}
    for layer, (d_out, r, d_in, _) in LAYERS.items():
        a, b = found[a_of(layer)], found[b_of(layer)]
        assert a.shape == (2, r, d_in) and b.shape == (2, d_out, r) and a.dtype == torch.bool
        assert bool(a[1].all() and b[1].all())
        if level != "elements":
            assert torch.equal(a, a[:, :, :1].expand_as(a)) and torch.equal(
                b, b[:, :1].expand_as(b)
            )
            assert torch.equal(a[:, :, 0], b[:, 0]), "a row of A goes with its column of B"
        if level == "ranks":
            assert int(a[0, :, 0].sum()) == -(-r // 2)
        if level == "modules":
            assert int(a[0, :, 0].sum()) in (0, r)
        if level == "elements" and policy == "neuron":
            assert torch.equal(a, a[:, :, :1].expand_as(a)) and int(a[0, :, 0].sum()) == -(-r // 2)
        elif level == "elements":
            assert int(a[0].sum()) == -(-r * d_in // 2)
    if level == "modules":
        assert sum(bool(found[a_of(layer)][0].any()) for layer in LAYERS) == 2


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("policy", ["rolling", "random"])
def test_what_is_taken_is_what_is_put_back(policy: str, level: Level) -> None:
    toy = make()
    draw = torch.Generator().manual_seed(0)
    own = {n: torch.randn(3, *x.shape, generator=draw) for n, x in toy.initial.items()}
    if level == "modules":  # clients of a stack have the same ones
        policy = "rolling"
    found = masks.masks(policy, level, tree.row(own, 0), Ask(("x", "y", "z"), (0.5,) * 3, 1, 4))
    for stacked in (own, tree.broadcast(tree.row(own, 0), 3)):
        kept = masks.take(level, stacked, found)
        back = masks.put(kept, found)
        for name, value in stacked.items():
            mask = found.get(name, torch.tensor(True))
            assert torch.equal(back[name], torch.where(mask, value, 0.0))
        sent = sum(x[0].numel() for n, x in kept.items() if n in found)
        assert sent == sum(int(m[0].sum()) for m in found.values()), "nothing but what is trained"
    same = masks.take(
        level, tree.broadcast(toy.initial, 3), {n: m[:1].expand_as(m) for n, m in found.items()}
    )
    assert all(tree.shared(x) for x in same.values()), "one copy for clients of one mask"


def test_masks_as_bytes_come_back_and_odd_ones_are_refused() -> None:
    toy = make()
    found = masks.masks("random", "elements", toy.initial, Ask(("x", "y"), (0.3, 0.7), 0, 4))
    data = masks.to_bytes(found)
    numbers = sum(m[0].numel() for m in found.values())
    assert [len(own) for own in data] == [-(-numbers // 8)] * 2
    back = masks.from_bytes(data, toy.initial)
    assert back.keys() == found.keys()
    assert all(torch.equal(back[n], m) for n, m in found.items())
    with pytest.raises(PayloadError, match="the masks has"):
        masks.from_bytes([data[0][:-1]], toy.initial)


def test_clients_of_the_same_modules_have_the_same_number() -> None:
    toy = make()
    found = masks.masks("random", "modules", toy.initial, Ask(tuple("abcdefgh"), (0.5,) * 8, 0, 4))
    for i, one in enumerate(masks.pattern(found)):
        for k, two in enumerate(masks.pattern(found)):
            same = all(torch.equal(m[i], m[k]) for m in found.values())
            assert same == (one == two)
    assert len(set(masks.pattern(found))) > 1


def test_what_a_policy_does_not_know_is_refused() -> None:
    with pytest.raises(FedpeftError, match=r"strategy\.policy='roling': Did you mean 'rolling'"):
        masks.check("roling", [])
    for policy, wrong in (("rolling", 0.0), ("random", 1.5), ("quartile", 8.0), ("quartile", 0.5)):
        with pytest.raises(FedpeftError, match=rf"strategy\.budgets has {wrong}: with .*{policy}"):
            masks.check(policy, [1.0, wrong])
    with pytest.raises(FedpeftError, match="layer has 3 units and cannot be quartered"):
        units("quartile", (2,), w=3)
