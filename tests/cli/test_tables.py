from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import pytest
from rich.console import Console, RenderableType

from fedpeft.cli import tables
from fedpeft.data.clients import Task
from fedpeft.events import Outcome
from fedpeft.timed import FleetSummary
from tests.cli import fakes

NONE = "\N{EN DASH}"


def shown(what: RenderableType, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(what)
    return out.getvalue().splitlines()


def cells(line: str) -> list[str]:
    """The cells of a row, with a figure and its unit as one."""
    joined = line
    for unit in ("%", "B", "KiB", "MiB"):
        joined = joined.replace(f" {unit} ", f"_{unit} ")
    return joined.split()


def test_classification() -> None:
    lines = shown(tables.result(fakes.summary()))
    assert cells(lines[0]) == ["test", "test", "clients", "worst", "bytes", "bytes", "time"]
    assert cells(lines[1]) == ["accuracy", "macro-F1", "mean", "decile", "down", "up", "(s)"]
    assert [cells(line) for line in lines[3:]] == [
        ["untrained", "10.0_%", "5.0_%", "20.0_%", "5.0_%", NONE, NONE, NONE],
        ["local-only", "40.0_%", "20.0_%", "50.0_%", "25.0_%", NONE, NONE, "12.3"],
        ["fedavg", "87.6_%", "43.8_%", "75.0_%", "50.0_%", "3.0_MiB", "1.5_KiB", "5.0"],
        ["centralised", NONE, NONE, NONE, NONE, NONE, NONE, "1,234.5"],
    ]


def test_language_modelling() -> None:
    lines = shown(tables.result(fakes.summary(task="causal_lm")))
    assert cells(lines[1])[:2] == ["loss/token", "perplexity"]
    assert [cells(line)[:5] for line in lines[3:]] == [
        ["untrained", "9.210", "9,997", "0.200", "0.050"],
        ["local-only", "3.000", "20.09", "0.500", "0.250"],
        ["fedavg", "2.000", "7.39", "0.750", "0.500"],
        ["centralised", NONE, NONE, NONE, NONE],
    ]


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_the_widest_figures_fit_80_columns(task: Task) -> None:
    wide = Outcome(
        "centralised",
        fakes.score(1.0, 16.0, task),
        1.0,
        1.0,
        {"adapter": 999 * 2**20},
        {"adapter": 999 * 2**20},
        9999.9,
    )
    table = tables.result(dataclasses.replace(fakes.summary(task=task), rows=(wide,)))
    lines = shown(table)
    assert max(map(len, lines)) <= 80
    assert cells(lines[-1])[-3:] == ["999.0_MiB", "999.0_MiB", "9,999.9"]
    assert not any("…" in line for line in lines)


def test_a_long_name_costs_no_figure() -> None:
    long = dataclasses.replace(fakes.summary().rows[2], name="my_package.strategies.fedavg_more")
    lines = shown(tables.result(dataclasses.replace(fakes.summary(), rows=(long,))))
    assert max(map(len, lines)) <= 80
    assert "87.6 %" in "".join(lines)
    assert "".join(line[:20].split()[0] for line in lines[3:]).startswith("my_package.")


def rows(found: Any) -> dict[str, list[str]]:
    """Label -> what follows it."""
    parts = [line.strip().split("  ", 1) for line in shown(tables.plan(found)) if line.strip()]
    return {part[0]: part[1].split("  ") if len(part) > 1 else [] for part in parts}


def values(found: Any, label: str) -> list[str]:
    return [cell.strip() for cell in rows(found)[label] if cell.strip()]


def test_plan() -> None:
    found = fakes.plan()
    assert values(found, "clients") == ["6, 5 in a round"]
    assert values(found, "test examples") == ["1,312, 4 labels"]
    assert values(found, "tokens in a round") == ["about 81,920"]
    assert values(found, "training examples") == ["12", "64", "1,210"]
    assert values(found, "steps in a round") == ["2", "8", "27"]
    assert values(found, "trainable") == ["12,000", "1.20 %"]
    assert values(found, "adapter") == ["10.0 KiB", "10.0 KiB"]  # the last of that name: bytes
    assert values(found, "scalar") == [NONE, "26 B"]
    assert values(found, "a message, on average") == ["11.0 KiB", "11.0 KiB"]
    assert values(found, "whole run") == ["110.0 KiB", "110.3 KiB"]
    assert values(found, "both ways") == ["exactly 225,540 bytes"]
    assert values(found, "that is") == ["50 % of uncompressed float32, 100 % of float16"]
    assert values(found, "engine") == ["cohort on cpu, lane fold"]
    assert values(found, "clients at once") == ["3"]
    assert values(found, "memory") == ["at most 3.0 MiB needed, 1.0 GiB free"]
    assert max(len(line) for line in shown(tables.plan(found))) <= 80


def test_plan_with_the_share_of_adapter_and_head() -> None:
    lines = [" ".join(line.split()) for line in shown(tables.plan(fakes.plan()))]
    assert "adapter 9,000 0.90 %" in lines
    assert "head 3,000 0.30 %" in lines
    assert "frozen base 1,000,000" in lines


def test_plan_of_language_modelling_has_no_labels() -> None:
    assert values(fakes.plan(labels=0), "test examples") == ["1,312"]


@pytest.mark.parametrize(
    ("sampled", "text"), [(6.0, "6, all in a round"), (1.5, "6, about 1.5 in a round")]
)
def test_plan_says_how_many_are_sampled(sampled: float, text: str) -> None:
    assert values(fakes.plan(sampled=sampled), "clients") == [text]


@pytest.mark.parametrize(
    ("engine", "sampled", "many"),
    [("cohort", 5.0, 3), ("cohort", 1.5, 2), ("cohort", 0.1, 1), ("sequential", 5.0, 1)],
)
def test_clients_at_once(engine: str, sampled: float, many: int) -> None:
    found = dataclasses.replace(fakes.plan(sampled=sampled), engine=engine)
    assert tables.at_once(found) == many
    assert values(found, "memory") == [f"at most {many}.0 MiB needed, 1.0 GiB free"]


def test_plan_on_several_workers() -> None:
    found = fakes.plan(workers=2)
    assert values(found, "workers") == ["2, a base model each"]
    assert values(found, "clients at once") == ["3 by each worker"]
    assert values(found, "memory") == ["at most 3.0 MiB needed by each worker, 1.0 GiB free"]
    assert tables.at_once(fakes.plan(workers=4)) == 2  # of 5 in a round


def test_plan_on_flower() -> None:
    found = dataclasses.replace(fakes.plan(), engine="flower")
    assert values(found, "memory") == ["at most 1.0 MiB needed by each worker, 1.0 GiB free"]
    assert "clients at once" not in rows(found)


def test_plan_warns_of_too_little_memory() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=80)
    console.print(tables.plan(fakes.plan(per_client=2**29)))
    assert "\x1b[33mat most 1.5 GiB needed, 1.0 GiB free" in out.getvalue()


def test_what_a_fleet_took() -> None:
    found = FleetSummary(
        seconds=3725.0,
        idle=0.25,
        wasted=0.125,
        lost={"late": 3, "upload": 1},
        in_flight=2,
        jain=0.9,
        gini=0.1,
        joules=math.nan,
        adapted=4,
        target=0.8,
        time_to_target=61.0,
        events=9,
        digest="0",
    )
    assert tables.fleet(found) == [
        "fleet: 1 h 02 min of virtual time, idle 25.0 %, wasted 12.5 % of the computation",
        "participation: Jain 0.900, Gini 0.100; lost: 3 late, 1 upload; 2 still at work, discarded",
        "accuracy 80.0 %: after 1 min",
        "4 clients trained in another way to fit into memory",
    ]
    never = dataclasses.replace(found, lost={}, in_flight=0, adapted=0, time_to_target=math.nan)
    assert tables.fleet(never)[1:] == [
        "participation: Jain 0.900, Gini 0.100",
        "accuracy 80.0 %: never",
    ]


def test_the_plan_says_what_a_round_takes_by_the_fleet_s_clock() -> None:
    plan = fakes.plan()
    assert plan.sends is not None
    timed = dataclasses.replace(plan.sends, times=(30.0, 60.0))
    lines = shown(tables.plan(dataclasses.replace(plan, sends=timed)))
    [line] = [line for line in lines if line.startswith("a round by the fleet")]
    assert line.split("fleet")[1].strip() == "45.0 s, the whole run 2 min"
    assert not any("by the fleet" in line for line in shown(tables.plan(plan)))
