"""Trees: arithmetic that refuses differing operands, layouts, and means that stream."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from fedpeft import tree
from fedpeft.tree import Layout, RunningMean, Tree


def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tree:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"b": (2, 3), "a": (4,), "c": (1,)}
    return {n: torch.randn(s, generator=draw, dtype=dtype) for n, s in shapes.items()}


def many(clients: int, seed: int = 1) -> Tree:
    return tree.stack([make(seed + k) for k in range(clients)])


def same(left: Tree, right: Tree) -> bool:
    return list(left) == list(right) and all(torch.equal(left[n], right[n]) for n in left)


def changed(fault: str) -> Tree:
    other = make(1)
    if fault == "missing":
        del other["a"]
    elif fault == "unexpected":
        other["z"] = torch.zeros(1)
    elif fault == "shape":
        other["b"] = torch.zeros(3, 2)
    else:
        other["a"] = other["a"].double()
    return other


FAULTS = {
    "missing": r"names: missing \['a'\], unexpected \[\]",
    "unexpected": r"names: missing \[\], unexpected \['z'\]",
    "shape": r"'b': shape \(2, 3\) and \(3, 2\)",
    "dtype": r"'a': dtype torch.float32 and torch.float64",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "operation",
    [
        tree.add,
        tree.sub,
        tree.check_same,
        lambda left, right: tree.stack([left, left, right]),
        lambda left, right: tree.mean((tree.stack([one]), torch.ones(1)) for one in (left, right)),
    ],
    ids=["add", "sub", "check_same", "stack", "mean"],
)
def test_operands_that_differ_are_refused(
    operation: Callable[[Tree, Tree], object], fault: str
) -> None:
    with pytest.raises(ValueError, match=FAULTS[fault]):
        operation(make(), changed(fault))


def test_arithmetic_is_elementwise_and_writes_into_nothing() -> None:
    left, right = make(0), make(1)
    tree.add(left, right)["a"].zero_()
    tree.scale(left, 1.0)["a"].zero_()
    tree.zeros_like(left)["a"].fill_(1)
    tree.sort(left)
    assert same(left, make(0)) and same(right, make(1))
    for name in left:
        assert torch.equal(tree.add(left, right)[name], left[name] + right[name])
        assert torch.equal(tree.sub(left, right)[name], left[name] - right[name])
        assert torch.equal(tree.scale(left, -2.5)[name], left[name] * -2.5)
        assert torch.equal(tree.zeros_like(left)[name], torch.zeros(left[name].shape))
    assert list(tree.sort(left)) == ["a", "b", "c"]
    assert tree.select(left, lambda name: name != "b").keys() == {"a", "c"}


def test_norm_and_numel_count_every_entry_in_float64() -> None:
    assert tree.norm({"x": torch.tensor([3.0]), "y": torch.tensor([[4.0]])}) == 5.0
    assert tree.norm({"x": torch.full((4,), 1e30)}) == pytest.approx(2e30, rel=1e-6)
    assert tree.norm({}) == 0.0
    assert tree.numel(make()) == 6 + 4 + 1


def test_stack_row_rows_and_broadcast_agree() -> None:
    stacked = many(4)
    assert {n: t.shape for n, t in stacked.items()} == {"b": (4, 2, 3), "a": (4, 4), "c": (4, 1)}
    for k in range(4):
        assert same(tree.row(stacked, k), make(1 + k))
    assert same(tree.row(tree.rows(stacked, [3, 1]), 0), make(4))
    assert same(tree.row(tree.rows(stacked, [3, 1]), 1), make(2))
    assert {n: t.shape[0] for n, t in tree.rows(stacked, []).items()} == {"b": 0, "a": 0, "c": 0}


def test_rows_of_a_broadcast_tree_are_views_of_its_one_copy() -> None:
    """However many clients drop out of a round, no client costs a copy of what was sent."""
    one = make(1)
    for index in ([3, 1, 4], [0], [2, 2], []):
        found = tree.rows(tree.broadcast(one, 5), index)
        for name, value in found.items():
            assert value.shape == (len(index), *one[name].shape)
            assert torch.equal(value, one[name].expand_as(value))
            assert value.data_ptr() == one[name].data_ptr() or not len(index)
    wide = tree.broadcast(make(), 10_000)
    assert wide["b"].shape == (10_000, 2, 3) and same(tree.row(wide, 9_999), make())
    assert wide["b"].untyped_storage().nbytes() == 6 * 4, "views on one copy"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finite_rows_names_the_clients_with_bad_numbers(bad: float) -> None:
    stacked = many(3)
    assert tree.finite_rows(stacked).tolist() == [True, True, True]
    stacked["c"][1, 0] = bad
    stacked["b"][2, 1, 1] = bad
    assert tree.finite_rows(stacked).tolist() == [True, False, False]


def test_a_layout_packs_and_unpacks_without_loss() -> None:
    layout, stacked = Layout.of(make()), many(3)
    assert layout.names == ("a", "b", "c") and layout.sizes == [4, 6, 1] and layout.size == 11
    matrix = layout.pack(stacked)
    assert matrix.shape == (3, 11)
    back = layout.unpack(matrix)
    assert list(back) == ["a", "b", "c"]
    assert all(torch.equal(back[n], stacked[n]) for n in stacked)
    matrix.zero_()
    assert not bool(back["b"].any()), "unpack gives views"
    assert bool(stacked["b"].all()), "pack copies"


def test_a_layout_unpacks_differentiably() -> None:
    matrix = torch.zeros(2, 11, requires_grad=True)
    Layout.of(make()).unpack(matrix)["b"][1].sum().backward()
    expected = torch.zeros(2, 11)
    expected[1, 4:10] = 1
    assert matrix.grad is not None and torch.equal(matrix.grad, expected)


def test_rows_of_what_all_clients_share_stay_one_copy() -> None:
    one, own = make(1), many(5)
    for at in ([0, 3, 1], [2], []):
        picked = tree.rows(tree.broadcast(one, 5), at)
        for name, value in picked.items():
            assert torch.equal(value, torch.stack([one[name]] * 5)[at])
            assert value.untyped_storage().data_ptr() == one[name].untyped_storage().data_ptr()
        assert all(torch.equal(v, own[n][at]) for n, v in tree.rows(own, at).items())
    assert not any(map(tree.shared, [*many(1).values(), *own.values()]))


def test_a_layout_refuses_other_names() -> None:
    with pytest.raises(ValueError, match=r"missing \['a'\]"):
        Layout.of(make()).pack(tree.stack([changed("missing")]))


def test_the_digest_knows_names_and_shapes_but_not_values_or_order() -> None:
    digest = Layout.of(make()).digest
    assert len(digest) == 16
    assert digest == Layout.of(tree.sort(make(5, torch.float64))).digest
    assert digest != Layout.of(changed("shape")).digest
    assert digest != Layout.of(changed("missing")).digest


def test_the_mean_is_weighted_and_normalised() -> None:
    stacked, weights = many(3), torch.tensor([1.0, 2.5, 0.5])
    found = tree.mean([(stacked, weights)])
    for name, tensor in stacked.items():
        expected = sum(w * x for w, x in zip([0.25, 0.625, 0.125], tensor.double(), strict=True))
        assert found[name].dtype == torch.float32
        assert torch.allclose(found[name].double(), torch.as_tensor(expected), atol=1e-7)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_mean_does_not_depend_on_the_stacks(size: int) -> None:
    stacked, weights = many(7), torch.linspace(1, 3, 7)
    whole = tree.mean([(stacked, weights)])
    parts = [list(range(s, min(s + size, 7))) for s in range(0, 7, size)]
    found = tree.mean((tree.rows(stacked, at), weights[at]) for at in parts)
    assert all(torch.allclose(found[n], whole[n], rtol=1e-7, atol=0) for n in whole)


def test_sums_run_in_float64() -> None:
    """In float32, 1 + 1e-8 is 1: the small clients would be lost one by one."""
    running = RunningMean()
    running.add({"x": torch.ones(1, 1)}, torch.ones(1))
    for _ in range(1000):
        running.add({"x": torch.ones(1, 1)}, torch.full((1,), 1e-8))
        running.add({"x": torch.full((1, 1), 1e-3)}, torch.ones(1))
    assert float(running.result()["x"]) == pytest.approx((1 + 1e-5 + 1) / (1001 + 1e-5), rel=1e-7)


def test_the_mean_keeps_the_dtype_and_leaves_its_input_alone() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        stacked = {"x": torch.ones(2, 3, dtype=dtype)}
        assert tree.mean([(stacked, torch.ones(2))])["x"].dtype == dtype
        assert torch.equal(stacked["x"], torch.ones(2, 3, dtype=dtype))


@pytest.mark.parametrize("weight", [0.0, math.nan])
def test_the_mean_of_nothing_is_an_error(weight: float) -> None:
    with pytest.raises(ValueError, match="no clients"):
        tree.mean([])
    with pytest.raises(ValueError, match=f"total weight {weight}"):
        tree.mean([(many(1), torch.full((1,), weight))])


def test_padding_appends_zeros_and_cropping_takes_them_away() -> None:
    small = {"a": torch.ones(2, 3), "b": torch.ones(3, 2), "c": torch.ones(4)}
    large = {"a": torch.ones(5, 3), "b": torch.ones(3, 5), "c": torch.ones(4)}
    padded = tree.pad(small, large)
    assert {n: tuple(t.shape) for n, t in padded.items()} == {"a": (5, 3), "b": (3, 5), "c": (4,)}
    assert padded["a"][:2].all() and not padded["a"][2:].any()
    assert padded["b"][:, :2].all() and not padded["b"][:, 2:].any()
    assert same(tree.crop(padded, small), small)
    with pytest.raises(ValueError, match="'a' of shape"):
        tree.pad(large, small)
    with pytest.raises(ValueError, match="differ in names"):
        tree.pad({"a": small["a"]}, large)


def test_the_mean_of_trees_without_tensors_is_one_without_tensors() -> None:
    assert tree.mean([({}, torch.ones(2)), ({}, torch.ones(1))]) == {}
    with pytest.raises(ValueError, match="differ in names"):
        tree.mean([({}, torch.ones(2)), (many(1), torch.ones(1))])
