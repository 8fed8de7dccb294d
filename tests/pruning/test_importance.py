"""Scores by hand and against a plain loop; their average; which groups go, and how many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.pruning.anatomy import structure_of
from fedpeft.pruning.importance import Recorder, estimate, magnitude, saliency, scores
from fedpeft.pruning.schedule import after, cubic, number, prune
from fedpeft.pruning.structure import Member, Part, Structure, pack, unpack
from fedpeft.tree import Tree, row, stack
from tests.pruning.models import FAMILIES, adapted, bare, draw_adapters, draw_alive, structure


def f64(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


A, OF_A = f64([0.1, -0.2]), f64([0.5, 0.1])
B, OF_B = f64([0.3], [0.4]), f64([-0.2], [0.6])
W = f64([1, 2], [-1, 0.5])


def test_the_saliency_is_the_golden_one() -> None:
    assert estimate(A, B, OF_A, OF_B).numpy() == pytest.approx(
        np.array([[0.23, 0.09], [-0.04, -0.14]])
    )
    rows, columns = saliency(W, 2.0, (A[None], B[None]), (OF_A[None], OF_B[None]))
    assert rows[0].tolist() == pytest.approx([0.413, 0.0844], abs=1e-12)
    assert columns[0].tolist() == pytest.approx([0.2438 + 0.0368, 0.1692 + 0.0476], abs=1e-12)


def test_the_saliency_does_not_depend_on_how_many_rows_are_there_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(3, 2, 5), (3, 9, 2), (3, 2, 5), (3, 9, 2)]
    a, b, of_a, of_b = (torch.randn(s, generator=draw).double() for s in shapes)
    weight = torch.randn(9, 5, generator=draw).double()
    whole = saliency(weight, 1.5, (a, b), (of_a, of_b))
    monkeypatch.setattr("fedpeft.pruning.importance.ROWS", 7)
    parts = saliency(weight, 1.5, (a, b), (of_a, of_b))
    for one, two in zip(whole, parts, strict=True):
        assert torch.allclose(one, two, atol=1e-13)


def loop_scores(own: Structure, adapter: Tree, gradient: Tree) -> dict[str, list[float]]:
    """One client's, row by row and column by column."""
    found = {}
    for part in own.parts:
        values = np.zeros(part.groups)
        for member in part.members:
            a, b = (adapter[f"{member.layer}.lora_{x}.default.weight"].numpy() for x in "AB")
            ga, gb = (gradient[f"{member.layer}.lora_{x}.default.weight"].numpy() for x in "AB")
            weight = own.weight(member.layer).numpy() + own.scaling[member.layer] * b @ a
            s = np.abs((gb @ a + b @ ga - gb @ ga) * weight)
            s = s if member.side == "rows" else s.T
            for g in range(part.groups):
                first = member.start + g * member.width
                values[g] += s[first : first + member.width].sum()
        found[part.name] = (values / (np.linalg.norm(values) + 1e-8)).tolist()
    return found


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_scores_are_those_of_a_plain_loop(family: str) -> None:
    network = adapted(family)
    own = structure(network)
    adapter, gradient = draw_adapters(network, 2, 3), draw_adapters(network, 2, 4)
    found = scores(own, adapter, gradient)
    for k in range(2):
        for name, wanted in loop_scores(own, row(adapter, k), row(gradient, k)).items():
            assert found[name][k].tolist() == pytest.approx(wanted, rel=2e-4, abs=1e-6)


def test_a_part_without_lora_goes_by_its_weights() -> None:
    network = adapted("bert")
    own = structure(network)
    part = next(p for p in own.parts if p.kind == "channels")
    gone = {member.layer for member in part.members}
    fewer = {n: v for n, v in draw_adapters(network, 2).items() if n.split(".lora_")[0] not in gone}
    found = scores(own, fewer, fewer)[part.name]
    up, down = (own.weight(member.layer).abs() for member in part.members)
    wanted = up.sum(1) + down.sum(0)
    assert torch.allclose(found, (wanted / wanted.norm()).expand(2, -1), atol=1e-6)
    assert torch.allclose(magnitude(own, part)[0], wanted, atol=1e-5)


def test_no_factors_no_importance_and_no_nan() -> None:
    network = adapted("bert")
    adapter = {n: v[None] for n, v in network.initial.items()}  # B = 0
    gradient = {n: torch.zeros_like(v) for n, v in adapter.items()}
    found = scores(structure(network), adapter, gradient)
    assert all(not bool(v.any()) for v in found.values())
    parts = structure(network).parts
    left = prune(parts, structure(network).whole(1), found, torch.tensor([0.5]))
    for part in parts:
        gone = int(number(part, torch.tensor([0.5])))
        assert left[part.name][0].tolist() == [g >= gone for g in range(part.groups)]


def test_the_average_is_over_steps_and_skips_what_is_not_finite() -> None:
    network = adapted("bert")
    own = structure(network)
    start = {p.name: torch.full((3, p.groups), 0.5) for p in own.parts}
    recorder = Recorder(own, start)
    adapter, gradient = draw_adapters(network, 2, 3), draw_adapters(network, 2, 4)
    broken = {n: v.clone() for n, v in gradient.items()}
    next(iter(broken.values()))[1] = float("nan")
    rows = {"client": {"number": torch.tensor([[2], [0]])}}
    assert recorder.adjust(gradient, adapter, rows) is gradient
    recorder.adjust(broken, adapter, rows)
    new = scores(own, adapter, gradient)
    for name, value in recorder.average.items():
        once = 0.9 * 0.5 + 0.1 * new[name]
        assert torch.allclose(value[2], 0.9 * once[0] + 0.1 * new[name][0])
        assert torch.allclose(value[0], once[1])
        assert torch.equal(value[1], start[name][1])
    assert recorder.own["client"]["number"].tolist() == [[0], [1], [2]]


def part(groups: int, kind: str = "heads") -> Part:
    member = Member("x", "rows", 2)
    return Part("p", kind, groups, (member,), member, 4)  # type: ignore[arg-type]


def test_the_lowest_go_first_and_never_come_back() -> None:
    score, alive = {"p": f64([3, 1, 2, 1, 5, 4])}, {"p": torch.ones(1, 6, dtype=torch.bool)}
    seen = []
    for share in (0.0, 0.17, 0.34, 0.5, 0.34, 1.0):
        alive = prune([part(6)], alive, score, torch.tensor([share]))
        seen.append(torch.nonzero(~alive["p"][0]).flatten().tolist())
        score = {"p": score["p"].flip(1)} if share == 0.34 else score
    assert seen == [[], [1], [1, 3], [1, 2, 3], [1, 2, 3], [0, 1, 2, 3, 5]]


@pytest.mark.parametrize("groups", [1, 4, 7, 12, 33])
def test_exactly_the_floor_of_the_share_is_gone(groups: int) -> None:
    draw = torch.Generator().manual_seed(groups)
    alive, gone = {"p": torch.ones(3, groups, dtype=torch.bool)}, torch.zeros(3).double()
    for _ in range(12):
        step = 0.1 * torch.rand(3, generator=draw).double()
        gone_now = after(gone, step, 0.5)
        assert bool((gone_now >= gone).all()) and float(gone_now.max()) <= 0.5
        left = prune([part(groups)], alive, {"p": torch.rand(3, groups, generator=draw)}, gone_now)
        assert not bool((left["p"] & ~alive["p"]).any())
        lost = groups - left["p"].sum(1)
        wanted = [min(int(g * groups + 1e-9), groups - 1) for g in gone_now.tolist()]
        assert lost.tolist() == wanted
        alive, gone = left, gone_now
    assert float(after(torch.tensor(0.2), torch.tensor(0.1), 0.5)) == pytest.approx(0.28)


def test_every_part_keeps_its_least() -> None:
    for own, least in ((part(5), 1), (part(20, "channels"), 8), (part(3, "channels"), 3)):
        alive = {"p": torch.ones(1, own.groups, dtype=torch.bool)}
        left = prune([own], alive, {"p": torch.zeros(1, own.groups)}, torch.tensor([1.0]))
        assert int(left["p"].sum()) == least


def test_scores_that_are_not_finite_count_nothing() -> None:
    score = {"p": f64([1, float("nan"), float("inf"), 2])}
    alive = {"p": torch.ones(1, 4, dtype=torch.bool)}
    left = prune([part(4)], alive, score, torch.tensor([0.5]))
    assert left["p"].tolist() == [[True, False, False, True]]


def test_the_cubic_schedule_begins_and_ends_where_it_says() -> None:
    assert [cubic(x, 0.5) for x in (0.0, 0.1, 0.9, 1.0)] == [0.0, 0.0, 0.5, 0.5]
    assert cubic(0.5, 0.5) == pytest.approx(0.5 - 0.5 / 8)
    values = [cubic(x / 50, 0.3) for x in range(51)]
    assert values == sorted(values)


def test_bits_come_back_and_cost_a_byte_for_eight_groups() -> None:
    network = adapted("llama-gqa")
    parts, alive = structure(network).parts, draw_alive(network, 4)
    bits = pack(parts, alive)
    assert bits.shape == (4, sum(-(-p.groups // 8) for p in parts)) == (4, 2 * (1 + 3))
    back = unpack(parts, bits)
    assert all(torch.equal(back[n], v) for n, v in alive.items())
    for wrong in (bits[:, 1:], bits.float(), bits[0]):
        with pytest.raises(ValueError, match="bits of groups"):
            unpack(parts, wrong)


def test_what_is_gone_is_counted_in_weights() -> None:
    network = adapted("bert")
    own = structure(network)
    alive = own.whole(2)
    assert own.gone(alive).tolist() == [0.0, 0.0]
    alive = stack([row(alive, 0), row(draw_alive(network, 1), 0)])
    lost, total = 0, 0
    for p in own.parts:
        lost += int((~alive[p.name][1]).sum()) * p.weights
        total += p.groups * p.weights
    assert own.gone(alive).tolist() == pytest.approx([0.0, lost / total])
    layers = {m.layer: own.weight(m.layer).numel() for p in own.parts for m in p.members}
    assert total == sum(layers.values())
    assert own.prunable == 1.0  # pooler and classifier see one vector of an example
    words = bare("llama").get_submodule("lm_head").weight.numel()
    other = structure(adapted("llama"))
    blocks = sum(p.groups * p.weights for p in other.parts)
    assert other.prunable == pytest.approx(blocks / (blocks + words))


def test_a_model_that_is_not_known_is_refused() -> None:
    with pytest.raises(FedpeftError, match="pruning knows the blocks of BertLayer"):
        structure_of(torch.nn.Linear(2, 2), {})
