"""Devices: the spec's goldens, jetson80's mix, modes, FLASH's and FedScale's times, memory."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedpeft.fleet.draws import Draws
from fedpeft.fleet.flops import Flops
from fedpeft.fleet.memory import Footprint, fit
from fedpeft.fleet.profiles import JETSON80, PROFILES
from fedpeft.fleet.settings import Fleet
from fedpeft.fleet.simulator import build
from fedpeft.fleet.speed import FLASH, FLASH_CLASSES, Peaks, PerExample, Work, mixed

BASE, LORA, TOKENS = 85e6, 294_912, 20 * 8 * 128
RULE = Flops(4 * BASE, 6 * LORA)
"""Of RoBERTa-base with rank 8 on query and value, without attention's quadratic term."""
ONE = np.ones(1)


def work(flops: float, examples: float = 0.0, batches: float = 0.0, moved: float = 0.0) -> Work:
    return Work(flops * ONE, moved * ONE, examples * ONE, batches * ONE)


def alone(peak: float, utilization: float = 0.25, roofline: bool = False) -> Peaks:
    profile = PROFILES["jetson_tx2"]
    own = type(profile)((peak,), profile.memory, profile.bandwidth)
    draws = Draws(0, "speed")
    return Peaks((own,), np.zeros(1, np.int64), ONE, draws, utilization, 0, roofline)


@pytest.mark.parametrize(("pruned", "gflop", "took"), [(0.0, 6999.4, 21.051), (0.5, None, 10.580)])
def test_the_goldens_of_computation(pruned: float, gflop: float | None, took: float) -> None:
    flops = float(RULE.of(ONE, TOKENS * ONE, 0 * ONE, pruned)[0])
    if gflop is not None:
        assert flops / 1e9 == pytest.approx(gflop, abs=0.05)
    seconds = alone(1.33e12).seconds(np.zeros(1, np.int64), 1, work(flops))
    assert seconds[0] == pytest.approx(took, abs=6e-4)


def test_peaks_are_those_of_the_data_sheets() -> None:
    assert PROFILES["jetson_tx2"].modes[0] == pytest.approx(1.33e12, rel=2e-3)
    assert PROFILES["jetson_tx2"].modes[1] == pytest.approx(0.87e12, rel=2e-3)
    assert PROFILES["jetson_xavier_nx"].modes[0] == pytest.approx(1.69e12, rel=2e-3)


def test_twice_the_peak_or_the_utilization_is_half_the_time() -> None:
    at = np.zeros(1, np.int64)
    base = alone(1e12).seconds(at, 1, work(1e15))[0]
    assert alone(2e12).seconds(at, 1, work(1e15))[0] == base / 2
    assert alone(1e12, 0.5).seconds(at, 1, work(1e15))[0] == base / 2


def test_under_a_roofline_the_slower_of_arithmetic_and_memory_counts() -> None:
    at, device = np.zeros(1, np.int64), alone(1e12, roofline=True)
    width = 0.7 * PROFILES["jetson_tx2"].bandwidth
    assert device.seconds(at, 1, work(1e9, moved=5e9))[0] == pytest.approx(5e9 / width)
    assert device.seconds(at, 1, work(1e15, moved=5e9))[0] == 1e15 / 0.25e12


@pytest.mark.parametrize("count", [80, 8, 1000, 7])
def test_jetson80_is_thirty_forty_ten_or_that_in_proportion(count: int) -> None:
    _, kind = mixed(JETSON80, count, Draws(1, "devices"))
    sizes = np.bincount(kind, minlength=3)
    assert sizes.sum() == count
    assert np.abs(sizes - np.array([30, 40, 10]) * count / 80).max() < 1
    if count == 80:
        assert sizes.tolist() == [30, 40, 10] and kind.tolist() != sorted(kind)


def test_modes_are_drawn_anew_every_so_many_rounds() -> None:
    fleet = build(Fleet("jetson80", redraw=20), 0, np.full(80, 10), None)
    every = np.arange(80)
    heavy = Work(*(np.full(80, 1e12) for _ in range(4)))
    times = {r: fleet.speed.seconds(every, r, heavy) for r in (1, 19, 20, 39, 40)}
    assert (times[1] == times[19]).all() and (times[20] == times[39]).all()
    assert (times[1] != times[20]).any() and (times[20] != times[40]).any()


def test_what_is_not_checked_against_a_source_is_called_an_assumption() -> None:
    assert "modes" in PROFILES["jetson_agx_xavier"].assumed
    assert all("power" in one.assumed for one in PROFILES.values() if one.power)
    assert "modes" not in PROFILES["jetson_tx2"].assumed


def test_flash_s_phones_have_its_classes_and_times() -> None:
    count = 20_000
    fleet = build(Fleet("flash", workload="celeba"), 3, np.full(count, 10), None)
    one = Work(*(np.ones(count) for _ in range(4)))
    means = fleet.speed.mean  # type: ignore[attr-defined]
    for (mean, std), share in zip(FLASH["celeba"], FLASH_CLASSES, strict=True):
        own = means == mean / 1e3
        assert abs(own.mean() - share) < 5 * math.sqrt(share * (1 - share) / count)
        seconds = fleet.speed.seconds(np.arange(count), 2, one)[own]
        assert abs(seconds.mean() - mean / 1e3) < 6 * std / 1e3 / math.sqrt(own.sum())


def test_fedscale_s_formula() -> None:
    """3 * batch * steps * ms / 1000, of 4 batches of 8 at 5 ms."""
    speed = PerExample(np.array([0.005]))
    found = speed.seconds(np.zeros(1, np.int64), 1, work(0.0, examples=32.0))
    assert found[0] == pytest.approx(3 * 8 * 4 * 5 / 1000)


FOOTPRINT = Footprint(frozen=125_000_000, trained=300_000, width=768, layers=12, heads=12)


def test_memory_grows_with_rank_length_and_batch() -> None:
    plain = FOOTPRINT.bytes(8, 128)
    more = Footprint(125_000_000, 600_000, 768, 12, 12)
    assert more.bytes(8, 128) > plain
    assert FOOTPRINT.bytes(16, 128) > plain and FOOTPRINT.bytes(8, 256) > plain
    assert FOOTPRINT.bytes(8, 128, checkpointing=True) < plain
    assert FOOTPRINT.bytes(8, 128, adapter=0.5) < plain


def test_who_has_too_little_memory_is_rejected_or_trains_in_another_way() -> None:
    tokens, need = np.full(3, 512.0), float(FOOTPRINT.bytes(16, 512))
    have = np.array([need, need / 2, 1e8]) / 0.89
    assert fit(FOOTPRINT, 16, tokens, have, "ignore").possible.all()
    assert fit(FOOTPRINT, 16, tokens, have, "reject").possible.tolist() == [True, False, False]
    halved = fit(FOOTPRINT, 16, tokens, have, "accumulate")
    assert halved.possible.tolist() == [True, True, False] and halved.batch[1] in (4, 8)
    assert halved.adapted.tolist() == [False, True, False]
    again = fit(FOOTPRINT, 16, tokens, have, "checkpoint")
    assert again.checkpointing.tolist() == [False, True, False] and again.possible[1]


def test_energy_is_power_times_time() -> None:
    fleet = build(Fleet("rpi4"), 0, np.full(2, 10), None)
    both = np.arange(2)
    jobs = fleet.jobs(both, 1, np.zeros(2), np.zeros(2), Work(*(np.full(2, 2.5e9),) * 4))
    ends = fleet.wait(jobs, 1, True, 0.0, 0)
    moved = float((jobs.down + jobs.up).sum())
    assert ends.good.all()
    assert fleet.books.energy == pytest.approx(6.0 * 2 * 1.0 + 1.0 * moved)
