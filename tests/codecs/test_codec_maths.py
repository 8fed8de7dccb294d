"""What the codecs compute: the papers' numbers, their bounds, their means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft import philox
from fedpeft.codecs import encode
from fedpeft.codecs.positions import largest
from fedpeft.codecs.settings import Codec
from fedpeft.codecs.symbols import PLACES

TASK_VECTOR = [0.5, -0.1, 0.02, -0.8, 0.3, 0.0, 0.05, -0.02, 0.12, -0.4]


def normal(rows: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def restore(settings: Codec, matrix: Tensor, first: int = 0) -> Tensor:
    seeds = torch.arange(first, first + len(matrix))
    return encode(settings, matrix, ((matrix.shape[1],),), seeds).restored()


def sizes(settings: Codec, matrix: Tensor) -> dict[str, int]:
    seeds = torch.arange(len(matrix))
    found = encode(settings, matrix, ((matrix.shape[1],),), seeds).bytes()
    return {kind: int(size[0]) for kind, size in found.items()}


def relative_variance(settings: Codec, row: Tensor, times: int) -> tuple[float, float]:
    """Of many encodings of one row: mean squared error over the squared norm, and |bias| / |u|."""
    found = restore(settings, row.expand(times, -1)).double() - row.double()
    norm = row.double().norm()
    return float(found.square().sum(dim=1).mean() / norm**2), float(found.mean(dim=0).norm() / norm)


def test_compeft_gives_the_published_example() -> None:
    matrix = torch.tensor([TASK_VECTOR])
    found = restore(Codec(codec="compeft", density=0.3, alpha=2.0), matrix)[0]
    assert found.nonzero()[:, 0].tolist() == [0, 3, 9]
    assert found[[0, 3, 9]].tolist() == pytest.approx([0.71703401, -0.71703401, -0.71703401], 2**-8)
    own = sizes(Codec(codec="compeft", density=0.3, alpha=2.0, positions="golomb"), matrix)
    assert own == {"scale": 2, "index": 2, "values": 1}  # 16, 9 and 3 bits


def test_compeft_at_its_best_alpha() -> None:
    matrix = normal(6, 997)
    settings = Codec(codec="compeft", density=0.2)
    found, wide = restore(settings, matrix).double(), matrix.double()
    kept = found != 0
    count = math.floor(0.2 * 997)
    assert kept.sum(dim=1).tolist() == [count] * 6
    assert torch.equal(found.sign()[kept], wide.sign()[kept])
    scale = (wide.abs() * kept).sum(dim=1) / count
    assert torch.allclose(found.abs().amax(dim=1), scale, rtol=2**-8)
    sigma = wide.std(dim=1)
    alpha = (wide.abs() * kept).sum(dim=1) / (count * sigma)
    fitted = torch.stack(
        [
            restore(Codec(codec="compeft", density=0.2, alpha=float(a)), row[None])[0]
            for a, row in zip(alpha, matrix, strict=True)
        ]
    )
    assert torch.allclose(fitted.double(), found, rtol=2**-7)
    lost, norm = (wide - found).square().sum(dim=1), wide.square().sum(dim=1)
    bound = norm - count * (wide.abs().sum(dim=1) / 997) ** 2
    assert bool((lost <= bound).all())
    again = restore(settings, found.float())
    assert torch.equal(again.double(), found)  # what it wrote it writes again
    for factor in (-1.0, 4.0, 0.125):
        assert torch.equal(restore(settings, matrix * factor), restore(settings, matrix) * factor)


def test_compeft_never_keeps_a_zero() -> None:
    matrix = torch.zeros(2, 100)
    matrix[0, 10:14] = torch.tensor([1.0, -3.0, 1.0, -3.0])
    found = restore(Codec(codec="compeft", density=0.5), matrix)
    assert found[0, 10:14].tolist() == [2.0, -2.0, 2.0, -2.0]
    assert int(found.count_nonzero()) == 4


def test_kept_are_the_largest_and_of_equal_ones_the_first() -> None:
    keys = torch.tensor([[1.0, 3, 2, 3, 2, 2], [5, 5, 5, 5, 5, 5], [0, 0, 0, 0, 0, 9]])
    assert largest(keys, 3).int().tolist() == [
        [0, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert not largest(keys, 0).any() and largest(keys, 6).all()


@pytest.mark.parametrize("density", [0.01, 0.05, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("scope", ["all", "tensor"])
def test_top_k_is_that_of_a_sort_and_a_contraction(density: float, scope: str) -> None:
    matrix = normal(4, 300).round(decimals=1)  # many equal ones
    shapes = ((10, 10), (200,))
    settings = Codec(codec="topk", density=density, scope=scope)  # type: ignore[arg-type]
    found = encode(settings, matrix, shapes, torch.arange(4)).restored()
    parts = [(0, 300)] if scope == "all" else [(0, 100), (100, 300)]
    wanted = torch.zeros_like(matrix)
    for begin, end in parts:
        own = matrix[:, begin:end]
        count = math.ceil(round(density * (end - begin), 6))
        order = np.argsort(-own.abs().numpy(), axis=1, kind="stable")[:, :count]
        places = torch.from_numpy(order)
        wanted[:, begin:end].scatter_(1, places, own.gather(1, places))
    assert torch.equal(found, wanted)
    count = math.ceil(round(density * 300, 6))
    if scope == "all":
        lost = (matrix - found).square().sum(dim=1)
        assert bool((lost <= (1 - count / 300) * matrix.square().sum(dim=1) + 1e-4).all())


def test_what_top_k_loses_and_is_fed_back_arrives_later() -> None:
    settings = Codec(codec="topk", density=0.1)
    sent, memory, wanted = torch.zeros(2, 500), torch.zeros(2, 500), torch.zeros(2, 500)
    for number in range(30):
        update = normal(2, 500, number)
        found = restore(settings, update + memory)
        memory = update + memory - found
        sent, wanted = sent + found, wanted + update
    assert torch.allclose(sent + memory, wanted, atol=1e-4)


def test_sizes_are_those_of_the_formulas() -> None:
    matrix = normal(1, 1000)
    kept, mask = 100, 125
    assert sizes(Codec(codec="dense"), matrix) == {"values": 4000}
    assert sizes(Codec(codec="dense", values="bf16"), matrix) == {"values": 2000}
    assert sizes(Codec(codec="dense", values="int8"), matrix) == {"values": 1000, "scale": 16}
    assert sizes(Codec(codec="dense", values="int4"), matrix) == {"values": 500, "scale": 16}
    coo = sizes(Codec(codec="topk", positions="coo"), matrix)
    assert coo == {"values": 4 * kept, "index": 4 * kept}
    bitmask = sizes(Codec(codec="topk", positions="bitmask", values="fp16"), matrix)
    assert bitmask == {"values": 2 * kept, "mask": mask, "index": 0} or bitmask == {
        "values": 2 * kept,
        "mask": mask,
    }
    random = sizes(Codec(codec="randk", values="fp16"), matrix)
    assert random == {"values": 2 * kept, "seed": 8}
    trits = sizes(Codec(codec="compeft", density=1.0), matrix)
    assert trits["values"] == 125 and trits["scale"] == 2  # all are kept: a bit each is enough
    ternary = sizes(Codec(codec="compeft", density=0.8), matrix)
    assert ternary["values"] == 200 and ternary["scale"] == 2  # 5 trits to a byte


def test_auto_is_the_smallest_way() -> None:
    matrix = normal(3, 4000)
    for density in (0.001, 0.02, 0.1, 0.4, 0.9, 1.0):
        own = sum(sizes(Codec(codec="topk", density=density), matrix).values())
        ways = [
            sum(sizes(Codec(codec="topk", density=density, positions=way), matrix).values())  # type: ignore[arg-type]
            for way in ("bitmask", "golomb", "coo", "varint")
        ]
        assert own == min(*ways, 16000)


@pytest.mark.parametrize(
    ("settings", "size", "variance"),
    [
        (Codec(codec="dense", values="qsgd", levels=1, block=1000), 1000, 25.0),
        (Codec(codec="dense", values="qsgd", levels=16, block=1000), 1000, 0.643),
        (Codec(codec="dense", values="qsgd", levels=127, block=1000), 1000, 0.0103),
        (Codec(codec="dense", values="int8"), 1024, 1.2e-4),  # it goes with the largest squared
        (Codec(codec="dense", values="int4", block=64), 1024, 2.5e-2),
    ],
)
def test_random_rounding_has_the_known_variance_and_no_bias(
    settings: Codec, size: int, variance: float
) -> None:
    row, times = normal(1, size, 3), 2000
    found, bias = relative_variance(settings, row, times)
    assert found == pytest.approx(variance, rel=0.15 if settings.values == "qsgd" else 0.3)
    assert bias < 1.3 * math.sqrt(variance / times) + 1e-5
    if settings.values == "qsgd":
        s = settings.levels
        assert found <= min(size / s**2, math.sqrt(size) / s)


def test_qsgd_keeps_as_few_as_promised() -> None:
    row = normal(1, 1000).expand(200, -1)
    for levels in (1, 4):
        settings = Codec(codec="dense", values="qsgd", levels=levels, block=1000)
        kept = restore(settings, row).count_nonzero(dim=1).double().mean()
        assert kept <= levels * (levels + math.sqrt(1000))


def test_many_small_steps_have_a_sixth_of_their_square() -> None:
    row = normal(1, 1024, 3)
    steps = row.view(4, 256).abs().amax(dim=1) / 127
    wanted = float(256 * steps.square().sum() / 6 / row.square().sum())
    found, _ = relative_variance(Codec(codec="dense", values="int8"), row, 2000)
    assert found == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("kind", ["int8", "int4", "qsgd"])
def test_rounding_is_off_by_less_than_a_step_and_leaves_whole_steps(kind: str) -> None:
    matrix = normal(5, 999)
    settings = Codec(codec="dense", values=kind, block=100)  # type: ignore[arg-type]
    found = restore(settings, matrix)
    wide = torch.nn.functional.pad(matrix, (0, 1)).view(5, 10, 100)
    most = {"int8": 127, "int4": 7, "qsgd": 127}[kind]
    top = wide.norm(dim=2) if kind == "qsgd" else wide.abs().amax(dim=2)
    lost = (torch.nn.functional.pad(found, (0, 1)).view(5, 10, 100) - wide).abs()
    assert bool((lost <= top[..., None] / most * 1.0001).all())
    whole = torch.arange(-most, most + 1).float()[None] * 0.25
    if kind != "qsgd":
        again = restore(Codec(codec="dense", values=kind, block=255), whole)  # type: ignore[arg-type]
        assert torch.allclose(again, whole, rtol=1e-6)


def test_the_largest_number_is_never_rounded_beyond_the_last_step() -> None:
    some = torch.arange(1, 1000).float()
    beyond = some[some / (some * (1 / 127)) > 127]  # by a last bit, in float32
    assert len(beyond)
    row = beyond[:1].expand(1, 1_000_000)
    found = restore(Codec(codec="dense", values="int8"), row)
    assert bool(((found - row).abs() <= row / 127).all())


def test_casts_are_the_nearest_numbers() -> None:
    matrix = torch.tensor([[1 / 3, -65519.0, 1e6, 1e-9, 2.0**90]])
    half = restore(Codec(codec="dense", values="fp16"), matrix)
    assert half.tolist() == [[0.333251953125, -65504.0, 65504.0, 0.0, 65504.0]]
    brain = restore(Codec(codec="dense", values="bf16"), matrix)
    assert torch.equal(brain, matrix.bfloat16().float())
    assert torch.equal(restore(Codec(codec="dense"), matrix), matrix)


@pytest.mark.parametrize(("rescale", "q"), [(0.0, 0.1), (0.3, 0.3)])
def test_dare_has_the_published_bias_and_variance(rescale: float, q: float) -> None:
    row, keep, times = normal(1, 400, 5), 0.1, 4000
    settings = Codec(codec="dare", density=keep, rescale=rescale)
    outputs = restore(settings, row.expand(times, -1)).double().sum(dim=1)
    total, squares = float(row.double().sum()), float(row.double().square().sum())
    variance = keep * (1 - keep) / q**2 * squares
    assert float(outputs.var()) == pytest.approx(variance, rel=0.1)
    error = float(outputs.mean()) - keep / q * total
    assert abs(error) < 4 * math.sqrt(variance / times)
    if rescale == 0:
        assert variance == pytest.approx((1 - keep) / keep * squares)


def test_averaging_clients_divides_the_variance_of_dare() -> None:
    row = normal(1, 300, 6)
    found = restore(Codec(codec="dare"), row.expand(4096, -1)).double() - row.double()
    one = found.square().sum(dim=1).mean()
    sixteen = found.view(256, 16, 300).mean(dim=1).square().sum(dim=1).mean()
    assert float(one / sixteen) == pytest.approx(16, rel=0.1)
    assert torch.equal(restore(Codec(codec="dare", density=1.0), row), row)


def test_random_k_is_unbiased_and_everybody_knows_its_places() -> None:
    row = normal(1, 200, 7)
    found = restore(Codec(codec="randk"), row.expand(8000, -1))
    assert found.count_nonzero(dim=1).tolist() == [20] * 8000
    assert float((found.mean(dim=0) - row[0]).norm() / row.norm()) < 0.06
    places = philox.chosen(torch.arange(8000), PLACES, 200, 20)
    assert torch.equal(found.nonzero()[:, 1].view(8000, 20), places)
    plain = restore(Codec(codec="randk", feedback="always"), row)[0]
    assert torch.equal(plain[places[0]], row[0, places[0]])
    assert torch.equal(restore(Codec(codec="randk", density=1.0), row), row)


def test_powersgd_keeps_what_has_its_rank() -> None:
    shapes = ((20, 30), (7,), (12, 5, 8))
    for rank in (1, 3):
        settings = Codec(codec="powersgd", rank=rank)
        first = normal(4, 20 * rank, 1).view(4, 20, rank) @ normal(4, rank * 30, 2).view(
            4, rank, 30
        )
        second = normal(4, 12 * rank, 3).view(4, 12, rank) @ normal(4, rank * 40, 4).view(
            4, rank, 40
        )
        vector = normal(4, 7, 5)
        matrix = torch.cat([first.flatten(1), vector, second.flatten(1)], dim=1)
        symbols = encode(settings, matrix, shapes, torch.arange(4))
        assert torch.allclose(symbols.restored(), matrix, atol=1e-4)
        assert torch.equal(symbols.restored()[:, 600:607], vector)
        assert symbols.bytes()["values"].tolist() == [4 * (rank * (50 + 52) + 7)] * 4


def test_powersgd_projects_nearly_as_well_as_the_best() -> None:
    left = torch.linalg.qr(normal(50, 40 * 30).view(50, 40, 30)).Q
    right = torch.linalg.qr(normal(50, 30 * 30, 1).view(50, 30, 30)).Q
    singular = 0.8 ** torch.arange(30)
    matrix = ((left * singular) @ right.mT).flatten(1)
    settings = Codec(codec="powersgd", rank=4)
    found = encode(settings, matrix, ((40, 30),), torch.arange(50)).restored()
    lost, kept = (matrix - found).square().sum(dim=1), found.square().sum(dim=1)
    assert torch.allclose(lost + kept, matrix.square().sum(dim=1), rtol=1e-4)  # orthogonal
    best = singular[4:].square().sum()
    assert best < lost.min() and lost.mean() < 1.5 * best  # 2.3 after one round, 1.28 after two
    small = encode(settings, matrix[:, :64], ((8, 8),), torch.arange(50))
    assert torch.equal(small.restored(), matrix[:, :64])  # the factors would not be smaller
