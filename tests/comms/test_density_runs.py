"""Whole runs whose densities bandits choose: resumed, timed, forecast, in several processes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.attacks.settings import Attack
from fedpeft.codecs.settings import Codec
from fedpeft.comms.densities import DENSITY, Densities
from fedpeft.comms.ledger import entries
from fedpeft.config import Comms, Engine, Output, Privacy, Recipe, Rounds, Sampling
from fedpeft.config import SecureAggregation as Sums
from fedpeft.config_load import check, load_recipe
from fedpeft.engine import RoundReport, Seam, play_round
from fedpeft.errors import FedpeftError
from fedpeft.events import Watcher
from fedpeft.federation import Federation
from fedpeft.fleet.jobs import Jobs
from fedpeft.fleet.settings import Fleet
from fedpeft.fleet.simulator import Simulator
from fedpeft.forecast import forecast
from fedpeft.metrics import Score
from fedpeft.prepare import Prepared, prepare
from fedpeft.robust.settings import Robust
from fedpeft.run import resume, run
from fedpeft.still import Still
from fedpeft.strategy import addressed, available, build
from fedpeft.timed import Timed
from fedpeft.workers.federation import WorkersFederation
from tests.tiny import LORA, tiny_recipe, write_tiny
from tests.workers.fake import FakePool

OPTIONS = (0.02, 0.1, 0.5)
CHOSEN = Comms(up=Codec("topk", densities=OPTIONS, positions="coo"), down=Codec("dense", "fp16"))

CODED = dataclasses.replace(CHOSEN, down=Codec("topk", density=0.3))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, sizes=(7, 13, 5, 16, 9, 8, 11, 6))
    return folder


@pytest.fixture(scope="module")
def equals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clients with the same examples."""
    folder = tmp_path_factory.mktemp("equals")
    write_tiny(folder, sizes=(8,))
    one = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    rows = [json.dumps(row | {"client": f"c{k}"}) for k in range(8) for row in one]
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def recipe(files: Path, out: Path, fleet: Fleet, rounds: int = 6, **changes: Any) -> Recipe:
    return dataclasses.replace(
        tiny_recipe(files),
        rounds=Rounds(count=rounds, sampling=Sampling("uniform", fraction=0.75)),
        engine=Engine(chunk=4, threads=1, device="cpu"),
        output=Output(folder=str(out)),
        baselines=(),
        fleet=fleet,
        **{"comms": CHOSEN, **changes},
    )


def server_of(prepared: Prepared) -> Densities:
    [found] = [link for link in prepared.post.links if isinstance(link, Densities)]
    return found


class Stops(Watcher):
    """Interrupts after a round."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round_done(self, report: RoundReport, score: Score | None) -> None:
        if report.round == self.after:
            raise KeyboardInterrupt


def told(folder: Path) -> list[dict[str, Any]]:
    """The record of the rounds, less what the machine's clock says."""
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = [line for line in every if line["kind"] in ("round", "bytes", "fleet", "evaluation")]
    return [{k: v for k, v in x.items() if k not in ("seconds", "at", "time")} for x in own]


def digest(folder: Path) -> str:
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    [summary] = [line for line in every if line["kind"] == "summary"]
    return str(summary["adapter_digest"])


@pytest.mark.parametrize("fleet", [Fleet(), Fleet("jetson80", sigma=1.0, dropout=0.2)])
def test_a_resumed_run_ends_with_the_same_bits(files: Path, tmp_path: Path, fleet: Fleet) -> None:
    run(recipe(files, tmp_path / "whole", fleet), Watcher())
    with pytest.raises(KeyboardInterrupt):
        run(recipe(files, tmp_path / "half", fleet), Stops(4))
    resume(str(tmp_path / "half"), Watcher())
    assert digest(tmp_path / "whole") == digest(tmp_path / "half")
    assert [x for x in told(tmp_path / "half") if x["kind"] != "note"] == told(tmp_path / "whole")


def test_slow_links_end_with_lower_densities_than_fast_ones(equals: Path, tmp_path: Path) -> None:
    """Clients that are equal but for their links, of 2 to 24 Mbit/s: the last ten of 30 rounds."""
    own = recipe(
        equals,
        tmp_path / "run",
        Fleet("server_gpu", network="groups"),
        comms=Comms(up=Codec("topk", densities=(0.05, 0.25, 1.0)), down=Codec("compeft")),
        adapter={**LORA, "r": 64},
        rounds=30,
    )
    own = dataclasses.replace(
        own,
        rounds=Rounds(count=30),
        local=dataclasses.replace(own.local, batch_size=8, lr=0.3),
    )
    prepared = prepare(own)
    timed, state = Timed.of(prepared), prepared.strategy.init(prepared.problem)
    assert timed is not None
    server, federation, ordered = server_of(prepared), prepared.federation(), []
    names = prepared.population.clients.names
    for number in range(1, 31):
        drawn = timed.begin(state, number)
        state, _ = timed.play(state, federation, number, drawn, prepared.post)
        ordered.append(server.bandits.orders(server.policy, names)[1])
    links, last = timed.fleet.network.up, torch.stack(ordered[-10:]).double().mean(0).numpy()
    slow, fast = last[links == links.min()], last[links == links.max()]
    assert len(slow) == len(fast) == 2
    assert slow.max() < fast.min() and slow.mean() + 0.3 < fast.mean()


def test_the_clock_counts_the_bytes_that_were_ordered(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client by client, what the clock was told is what the books say afterwards."""
    clocked, jobs = list[dict[str, int]](), Simulator.jobs
    prepared = prepare(recipe(files, tmp_path / "run", Fleet("jetson80")))
    names = prepared.population.clients.names

    def seen(self: Simulator, clients: np.ndarray, *rest: Any) -> Jobs:
        found = jobs(self, clients, *rest)
        clocked.append({names[k]: int(n) for k, n in zip(clients, found.size, strict=True)})
        return found

    monkeypatch.setattr(Simulator, "jobs", seen)
    timed, state = Timed.of(prepared), prepared.strategy.init(prepared.problem)
    assert timed is not None
    unequal = 0
    for number in range(1, 7):
        drawn = timed.begin(state, number)
        state, report = timed.play(state, prepared.federation(), number, drawn, prepared.post)
        came = {n: sum(one.each.values()) for one in report.came for n in one.clients}
        assert came == clocked[-1]
        unequal += len(set(came.values())) > 1
    assert unequal >= 3


def test_clients_that_do_not_train_reply_with_the_density_that_each_was_ordered(
    files: Path, tmp_path: Path
) -> None:
    prepared = prepare(recipe(files, tmp_path / "run", Fleet()))
    [one] = addressed(
        prepared.strategy,
        prepared.strategy.init(prepared.problem),
        1,
        prepared.population.clients.names,
    )
    orders = torch.tensor([OPTIONS[k % 3] for k in range(8)], dtype=torch.float64)
    told = dataclasses.replace(one, scalars={**one.scalars, DENSITY: orders})
    came = [entry for reply in Still(prepared).run(1, told) for entry in entries(reply)]
    sizes = {name: entry.each["index"] for entry in came for name in entry.clients}
    by_order = [{sizes[n] for n in told.clients[k::3]} for k in range(3)]
    assert [len(found) for found in by_order] == [1, 1, 1]
    assert min(by_order[0]) < min(by_order[1]) < min(by_order[2])


def test_a_forecast_plays_the_bandits_too_and_says_that_it_is_no_more_than_typical(
    files: Path, tmp_path: Path
) -> None:
    prepared = prepare(recipe(files, tmp_path / "run", Fleet("jetson80")))
    found = forecast(prepared)
    assert not found.exact and forecast(prepared) == found
    assert not server_of(prepared).losses
    least, most = (
        sum(forecast(prepare(recipe(files, tmp_path, Fleet(), comms=one))).rounds)
        for one in (
            dataclasses.replace(CHOSEN, up=Codec("topk", density=d, positions="coo"))
            for d in (OPTIONS[0], OPTIONS[-1])
        )
    )
    assert least < sum(found.rounds) < most
    fixed = dataclasses.replace(CHOSEN, up=Codec("topk", positions="coo"))
    assert forecast(prepare(recipe(files, tmp_path, Fleet(), comms=fixed))).exact


def play(prepared: Prepared, federation: Federation) -> tuple[list[RoundReport], Any]:
    own, reports = dataclasses.replace(prepared), []
    state = own.strategy.init(own.problem)
    for number in range(1, 6):
        rounds, seam = own.recipe.rounds, Seam(own.post)
        state, report = play_round(own.strategy, state, federation, rounds, 0, number, seam)
        reports.append(dataclasses.replace(report, seconds=0.0))
    return reports, server_of(own)


def test_several_workers_are_ordered_and_send_what_one_process_is(
    files: Path, tmp_path: Path
) -> None:
    own = recipe(files, tmp_path / "run", Fleet())
    own = dataclasses.replace(own, engine=dataclasses.replace(own.engine, workers=3))
    prepared = prepare(own)
    federation = WorkersFederation(prepared, FakePool(prepared, 3))
    (found, one), (wanted, two) = play(prepared, federation), play(prepared, prepared.federation())
    assert [(r.down, r.up, r.came) for r in found] == [(r.down, r.up, r.came) for r in wanted]
    assert one.bandits.agents.orders == two.bandits.agents.orders
    assert len({entry.each["index"] for entry in wanted[-1].came}) > 1


@pytest.mark.parametrize(
    "beside", [{"robust": Robust("median")}, {"attack": Attack("sign_flip")}, {"comms": CODED}]
)
def test_agents_hear_each_client_whatever_becomes_of_the_updates(
    files: Path, tmp_path: Path, beside: dict[str, Any]
) -> None:
    """A rule leaves one update, attackers change theirs, requests may be coded too."""
    prepared = prepare(recipe(files, tmp_path / "run", Fleet(), **beside))
    reports, server = play(prepared, prepared.federation())
    assert all(report.replied == 6 for report in reports) and len(server.losses) == 8
    assert len({entry.each["index"] for entry in reports[-1].came}) > 1


@pytest.mark.parametrize("name", sorted(available()))
def test_every_strategy_that_goes_with_a_codec_goes_with_densities(
    files: Path, tmp_path: Path, name: str
) -> None:
    own = recipe(files, tmp_path / "run", Fleet(), rounds=4)
    needs = build(name, {}).needs()
    local = {k.removeprefix("local."): v for k, v in needs.items() if k.startswith("local.")}
    local |= {"steps": 2} if build(name, {}).walks else {}
    feedback: Any = needs.get("comms.up.feedback", "auto")
    own = dataclasses.replace(
        own,
        strategy={"name": name},
        local=dataclasses.replace(own.local, **local),  # type: ignore[arg-type]
        comms=Comms(up=Codec("topk", densities=OPTIONS, feedback=feedback)),
    )
    strategy = build(name, {})
    if strategy.pools or not strategy.codable or strategy.exchanges > 1:
        with pytest.raises(FedpeftError, match=r"comms\.up\..*with strategy\.name"):
            prepare(own)
        return
    prepared = prepare(own)
    reports, server = play(prepared, prepared.federation())
    assert not any(report.excluded for report in reports)
    assert len(server.losses) == 8 and len(server.bandits.agents.tables) >= 6


@pytest.mark.parametrize(
    ("override", "why"),
    [
        (["comms.up={codec: topk, densities: [0.1]}"], r"densities=\[0\.1\]: must be two numbers"),
        (["comms.up={codec: topk, densities: [0.2, 0.1]}"], "ascending"),
        (["comms.up={codec: topk, densities: [0.1, 0.1]}"], "ascending"),
        (["comms.up={codec: topk, densities: [0.0, 0.1]}"], "above 0 and at most 1"),
        (["comms.up={codec: topk, densities: [0.1, 1.5]}"], "above 0 and at most 1"),
        (["comms.up={codec: topk, densities: [0.1, .nan]}"], r"set comms\.up\.density"),
        (
            ["comms.up={codec: topk, densities: [0.1, many]}"],
            r"comms\.up\.densities holds 'many': its",
        ),
        (["comms.up={codec: topk, density: 0.3, densities: [0.1, 0.2]}"], "Leave one of the two"),
        (["comms.up={codec: dense, densities: [0.1, 0.2]}"], "means nothing with.*choose another"),
        (["comms.up={codec: powersgd, densities: [0.1, 0.2]}"], "densities=.*means nothing"),
        (["comms.up={densities: [0.1, 0.2]}"], r"means nothing with comms\.up\.codec=none"),
        (["comms.up={codec: dare, densities: [0.1, 0.6], rescale: 0.5}"], r"density=0\.6 and 1"),
        (["comms.down={codec: topk, densities: [0.1, 0.2]}"], r"Set comms\.down\.density"),
    ],
)
def test_what_a_recipe_may_not_say(override: list[str], why: str) -> None:
    with pytest.raises(FedpeftError, match=why):
        load_recipe("quickstart", override)


def test_a_recipe_says_it() -> None:
    own = load_recipe("quickstart", ["comms.up={codec: dare, densities: [0.1, 0.6], rescale: 0.7}"])
    assert own.comms.up == Codec("dare", densities=(0.1, 0.6), rescale=0.7)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"privacy": Privacy("record", epsilon=8.0)}, r"privacy\.unit=record: agents learn"),
        ({"privacy": Privacy("client", epsilon=8.0)}, r"privacy\.unit=client: agents learn"),
        ({"secure_aggregation": Sums(True)}, r"secure_aggregation\.enabled=true: agents learn"),
        ({"fleet": Fleet("rpi4", policy="fedbuff")}, r"fleet\.policy=fedbuff: agents compare"),
        ({"fleet": Fleet("rpi4", policy="semi_async")}, r"fleet\.policy=semi_async: agents"),
    ],
)
def test_where_the_server_would_not_see_what_agents_learn_from(
    changes: dict[str, Any], why: str
) -> None:
    rounds = Rounds(count=3, sampling=Sampling(size=20), weighting="equal")
    own = dataclasses.replace(Recipe(rounds=rounds), comms=CHOSEN, **changes)
    with pytest.raises(FedpeftError, match=rf"densities=\[0\.02.*{why}.*Set comms\.up\.density"):
        check(own)
