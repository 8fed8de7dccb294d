"""Payloads over Flower's messages: what is on the wire is in the ledger, to the byte, and both ends
read the same numbers; every codec, every strategy, both ways."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict

from fedpeft.codecs.settings import Codec
from fedpeft.comms.densities import DENSITY
from fedpeft.config import Comms, Engine, Recipe, Rounds, Sampling
from fedpeft.engine import RoundReport, Seam, play_round
from fedpeft.federation import Failure
from fedpeft.flower.federation import FlowerFederation, Patience
from fedpeft.flower.records import decode
from fedpeft.message import Messages
from fedpeft.prepare import Prepared, prepare
from fedpeft.privacy.compatibility import downlink_codec, uplink_codec
from fedpeft.strategy import addressed, available, build
from fedpeft.tree import Tree
from tests.flower.nodes import InProcess
from tests.tiny import tiny_recipe

NODES = {900 - k: {"partition-id": k, "num-partitions": 4} for k in range(4)}
CODECS = {
    "fp32": Codec("dense"),
    "fp16": Codec("dense", "fp16"),
    "bf16": Codec("dense", "bf16"),
    "int8": Codec("dense", "int8", block=64),
    "int4": Codec("dense", "int4", block=64),
    "qsgd": Codec("dense", "qsgd", block=64, levels=7),
    "topk": Codec("topk", density=0.1),
    "topk fp16 by tensor": Codec("topk", "fp16", density=0.1, scope="tensor", positions="coo"),
    "randk": Codec("randk", density=0.25),
    "dare": Codec("dare", density=0.25),
    "compeft": Codec("compeft", density=0.2),
    "powersgd": Codec("powersgd", rank=1),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "flora": {"ranks": [1, 2]},
    "hetlora": {"ranks": [1, 2]},
    "flexlora": {"ranks": [1, 2]},
    "fed_plora": {"ranks": [1, 2]},
}


pytestmark = pytest.mark.usefixtures("flower_task")


def recipe_of(folder: Path, comms: Comms, name: str = "fedavg") -> Recipe:
    """Some clients miss rounds; trained one by one wherever they are."""
    recipe = tiny_recipe(folder, name=name, **SETTINGS.get(name, {}))
    rounds = Rounds(count=4, sampling=Sampling("uniform", fraction=0.75))
    engine = Engine(kind="sequential", device="cpu")
    recipe = dataclasses.replace(recipe, rounds=rounds, comms=comms, engine=engine)
    for key, value in build(name, SETTINGS.get(name, {})).needs().items():
        *where, last = key.split(".")
        parts: list[Any] = [recipe]
        for one in where:
            parts.append(getattr(parts[-1], one))
        made: Any = dataclasses.replace(parts.pop(), **{last: value})
        for one in reversed(where):
            made = dataclasses.replace(parts.pop(), **{one: made})
        recipe = made
    return recipe


def play(prepared: Prepared, at: Any, rounds: int = 4) -> tuple[Tree, list[RoundReport]]:
    """The adapter and reports of some rounds on a federation."""
    own = dataclasses.replace(prepared)  # its server half remembers nothing yet
    state, reports = own.strategy.init(own.problem), []
    for number in range(1, rounds + 1):
        seam = Seam(own.post)
        state, report = play_round(own.strategy, state, at, own.recipe.rounds, 0, number, seam)
        reports.append(report)
    return own.strategy.adapter(state), reports


def serialised(content: RecordDict) -> int:
    """Flower's own count of everything but the header."""
    return sum(record.count_bytes() for key, record in content.items() if key != "header")


def on_the_wire(grid: InProcess) -> tuple[int, int]:
    """Bytes of all training requests, and of all replies."""
    down = [m for m in grid.seen if m.metadata.message_type == "train"]
    up = [m for kind, m in grid.answers if kind == "train"]
    return sum(serialised(m.content) for m in down), sum(serialised(m.content) for m in up)


def check(recipe: Recipe, nodes: InProcess | None = None) -> list[RoundReport]:
    """Both federations agree, bit for bit and to the byte; the reports."""
    prepared, grid = prepare(recipe), nodes or InProcess(NODES)
    federation = FlowerFederation(grid, recipe, 4, patience=Patience(0.05, 5.0))
    found, reports = play(prepared, federation)
    wanted, own = play(prepared, prepared.federation())
    assert not any(report.excluded for report in reports)
    assert [(r.down, r.up) for r in reports] == [(r.down, r.up) for r in own]
    assert sorted(map(str, reports[0].came)) and own[0].sampled == reports[0].sampled
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    counted = [sum(sum(getattr(r, way).values()) for r in reports) for way in ("down", "up")]
    assert tuple(counted) == on_the_wire(grid)
    return reports


@pytest.mark.parametrize("name", CODECS)
def test_replies_through_every_codec(tiny: Path, name: str) -> None:
    check(recipe_of(tiny, Comms(up=CODECS[name])))


@pytest.mark.parametrize("name", ["topk", "randk", "dare", "compeft"])
def test_replies_of_densities_that_the_server_orders(tiny: Path, name: Any) -> None:
    grid = InProcess(NODES)
    check(recipe_of(tiny, Comms(up=Codec(name, densities=(0.1, 0.3, 0.9)))), grid)
    orders: dict[int, set[object]] = {}
    for message in grid.seen:
        if message.metadata.message_type == "train":
            _, header = decode(message.content)
            order = message.content.metric_records["scalars"][DENSITY]
            orders.setdefault(header.round, set()).add(order)
    assert orders[1] == {0.3} and max(map(len, orders.values())) > 1


@pytest.mark.parametrize("order", [0.2, None])
def test_a_client_obeys_no_other_order_and_says_which(tiny: Path, order: float | None) -> None:
    """One client of a round; the others' replies count."""
    recipe = recipe_of(tiny, Comms(up=Codec("topk", densities=(0.1, 0.3))))
    prepared, grid = prepare(recipe), InProcess(NODES)
    federation = FlowerFederation(grid, recipe, 4, patience=Patience(0.05, 5.0))
    [one] = addressed(
        prepared.strategy,
        prepared.strategy.init(prepared.problem),
        1,
        tuple(federation.clients()),
    )
    good, bad = prepared.post.announce(one.rows([0, 1])), one.rows([2])
    if order is not None:
        wrong = torch.tensor([order], dtype=torch.float64)
        bad = dataclasses.replace(bad, scalars={**bad.scalars, DENSITY: wrong})
    found = list(federation.run(1, good, bad))
    assert [isinstance(reply, Messages) for reply in found] == [True, True, False]
    assert isinstance(found[2], Failure) and found[2].client == one.clients[2]
    assert f"orders {DENSITY}=0.2" in found[2].reason or order is None
    assert DENSITY in found[2].reason and "comms.up.densities=(0.1, 0.3)" in found[2].reason


@pytest.mark.parametrize("name", CODECS)
def test_requests_through_every_codec(tiny: Path, name: str) -> None:
    reports = check(recipe_of(tiny, Comms(down=CODECS[name])))
    told = [report.down.get("schema", 0) for report in reports]
    met = {name for report in reports for name in report.sampled}
    assert sum(told) == len(met) * told[0] // len(reports[0].sampled), "each client once"


GOES = [
    (name, way)
    for way, judge in (("up", uplink_codec), ("down", downlink_codec))
    for name in sorted(available())
    if not judge(build(name, {}))
]
"""Every strategy and direction that go together; others are refused (tests/privacy)."""


@pytest.mark.parametrize(("name", "way"), GOES)
def test_every_strategy_both_ways(tiny: Path, name: str, way: str) -> None:
    codec = CODECS["topk"] if way == "up" else CODECS["int8"]
    check(recipe_of(tiny, Comms(**{way: codec}), name))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), GOES)
def test_every_cell_is_on_the_ledger_as_it_is_on_the_wire(tiny: Path, name: str, way: str) -> None:
    for codec in CODECS.values():
        check(recipe_of(tiny, Comms(**{way: codec}), name))
