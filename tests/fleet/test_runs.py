"""Runs under a fleet's clock: bytes, dropouts, resumes, FedBuff against rounds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedpeft.codecs.settings import Codec
from fedpeft.config import Comms, Engine, Output, Privacy, Recipe, Rounds, Sampling
from fedpeft.engine import Lost, Seam, play_round
from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.events import Summary, Watcher
from fedpeft.fleet.settings import Fleet
from fedpeft.forecast import forecast
from fedpeft.job import begin, tree_digest
from fedpeft.message import Messages
from fedpeft.prepare import prepare
from fedpeft.record.checkpoint import latest
from fedpeft.run import resume, run
from fedpeft.strategies import fedspine
from fedpeft.strategy import build
from tests.fleet import frugal
from tests.tiny import Tiny, tiny_recipe, write_tiny

CLIENTS = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, sizes=(7, 13, 5, 16, 9, 8, 11, 6))
    return folder


def recipe(files: Path, out: Path, fleet: Fleet, fraction: float = 1.0, **strategy: Any) -> Recipe:
    return dataclasses.replace(
        tiny_recipe(files, **strategy),
        rounds=Rounds(count=4, sampling=Sampling("uniform", fraction=fraction), quorum=0.1),
        engine=Engine(chunk=4, threads=1, device="cpu"),
        output=Output(folder=str(out)),
        baselines=(),
        fleet=fleet,
    )


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if line["kind"] == kind]


def ended(folder: Path) -> tuple[str, dict[str, Any]]:
    [summary] = lines(folder, "summary")
    return summary["adapter_digest"], summary.get("fleet", {})


def played(whole: Recipe) -> tuple[Summary, list[dict[str, Any]], list[dict[str, Any]]]:
    out = Path(whole.output.folder)
    return run(whole, Watcher()), lines(out, "fleet"), lines(out, "round")


def test_without_a_fleet_and_with_one_that_waits_for_all_the_adapter_is_the_same(
    files: Path, tmp_path: Path
) -> None:
    for name, fleet in (("none", Fleet()), ("sync", Fleet("jetson80"))):
        played(recipe(files, tmp_path / name, fleet, 0.5))
    assert ended(tmp_path / "none")[0] == ended(tmp_path / "sync")[0]
    assert not lines(tmp_path / "none", "fleet") and not ended(tmp_path / "none")[1]
    times = [line["times"] for line in lines(tmp_path / "sync", "fleet")]
    seconds = [line["seconds"] for line in lines(tmp_path / "sync", "fleet")]
    assert seconds == [pytest.approx(max(own.values())) for own in times]


@pytest.mark.parametrize("policy", ["fedbuff", "semi_async"])
def test_fedbuff_with_equal_speeds_is_synchronous_fedavg(
    files: Path, tmp_path: Path, policy: Any
) -> None:
    """K = concurrency = N: every buffer holds everybody's reply to the newest model, bit by bit."""
    fleet = Fleet("server_gpu", policy=policy, buffer=CLIENTS)
    played(recipe(files, tmp_path / "sync", Fleet("server_gpu")))
    _, rounds, _ = played(recipe(files, tmp_path / policy, fleet))
    assert ended(tmp_path / "sync")[0] == ended(tmp_path / policy)[0]
    assert all(line["staleness"] == [0] * CLIENTS for line in rounds)


def test_fedbuff_conserves_updates_and_needs_less_time_than_rounds(
    files: Path, tmp_path: Path
) -> None:
    fleet = Fleet("jetson80", sigma=1.5, policy="fedbuff", buffer=3, concurrency=6, load=0.0)
    summary, rounds, trained = played(recipe(files, tmp_path / "buffered", fleet))
    sync, _, _ = played(recipe(files, tmp_path / "sync", Fleet("jetson80", sigma=1.5)))
    assert summary.fleet is not None and sync.fleet is not None
    started = sum(line["clients"] for line in trained)
    arrived = sum(len(line["staleness"]) for line in rounds)
    assert started == arrived + summary.fleet.in_flight and arrived == 4 * 3
    assert all(line["replies"] == 3 for line in trained)
    assert max(max(line["staleness"]) for line in rounds) > 0
    assert summary.fleet.seconds < sync.fleet.seconds
    assert ended(tmp_path / "buffered")[0] != ended(tmp_path / "sync")[0]


def test_bytes_are_the_messages_and_those_of_dropouts_count_in_part(
    files: Path, tmp_path: Path
) -> None:
    fleet = Fleet("jetson80", dropout=0.4)
    summary, rounds, trained = played(recipe(files, tmp_path / "run", fleet))
    played(recipe(files, tmp_path / "whole", Fleet("jetson80")))
    whole = lines(tmp_path / "whole", "round")[0]
    down, up = (sum(whole[f"bytes_{way}"].values()) // CLIENTS for way in ("down", "up"))
    kinds = [line["dropped"] for line in rounds]
    assert {kind for own in kinds for kind in own.values()} == {"before", "compute", "upload"}
    for own, line in zip(kinds, trained, strict=True):
        before = sum(kind == "before" for kind in own.values())
        assert sum(line["bytes_down"].values()) == down * (CLIENTS - before)
        partial = line["bytes_up"].pop("partial", 0)
        assert sum(line["bytes_up"].values()) == up * line["replies"]
        sending = sum(kind == "upload" for kind in own.values())
        assert 0 <= partial <= up * sending and line["replies"] == CLIENTS - len(own)
    assert summary.dropped == sum(map(len, kinds)) and summary.excluded == 0


class Loses:
    """A clock under which the replies of c1 and c3 break off."""

    def lost(self, state: Any, sent: Sequence[Messages]) -> dict[str, Lost]:
        return {name: Lost("dropped out", came=7) for name in ("c1", "c3")}


def test_a_reply_that_broke_off_is_not_in_the_aggregate() -> None:
    states = []
    for seam in (Seam(timing=Loses()), Seam(names=("c0", "c2"))):
        tiny = Tiny()
        strategy = build("fedavg", {})
        found = play_round(
            strategy,
            strategy.init(tiny.problem),
            tiny.federation(strategy),
            tiny.rounds,
            tiny.seed,
            1,
            seam,
        )
        states.append(found)
    (first, report), (second, _) = states
    assert tree_digest(first.adapter) == tree_digest(second.adapter)
    assert report.dropped == ("c1", "c3") and report.up["partial"] == 14
    assert report.excluded == {} and report.replied == 2


def test_dropped_uploads_are_never_aggregated(files: Path, tmp_path: Path) -> None:
    fleet = Fleet("jetson80", policy="over_select", overcommit=2.0)
    summary, rounds, trained = played(recipe(files, tmp_path / "over", fleet, 0.5))
    for own, line in zip(rounds, trained, strict=True):
        assert line["replies"] == len(own["times"]) == 4
        assert set(own["times"]).isdisjoint(own["dropped"])
        assert {f["client"] for f in line["failures"]} == set(own["dropped"])
    assert summary.fleet is not None and summary.fleet.lost == {"surplus": 16}


def test_with_a_deadline_a_round_that_falls_short_keeps_the_model(
    files: Path, tmp_path: Path
) -> None:
    fleet = Fleet("jetson80", policy="deadline", deadline=1e-4)
    own = recipe(files, tmp_path / "run", fleet)
    with pytest.raises(QuorumError, match="missed the deadline"):
        run(own, Watcher())
    rounds = dataclasses.replace(own.rounds, aborts=9)
    output = Output(str(tmp_path / "kept"))
    summary, clock, _ = played(dataclasses.replace(own, rounds=rounds, output=output))
    assert [line["time"] for line in clock] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4])
    assert summary.fleet is not None and summary.fleet.lost == {"late": 4 * CLIENTS}


class Stop(Watcher):
    """Interrupts the third round."""

    def round_began(self, number: int, clients: int, tokens: int) -> None:
        if number == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("policy", ["sync", "fedbuff"])
def test_a_resumed_run_ends_with_the_same_bits_and_the_same_log(
    files: Path, tmp_path: Path, policy: Any
) -> None:
    fleet = Fleet(
        "jetson80",
        sigma=1.0,
        dropout=0.2,
        bad_spells=True,
        policy=policy,
        buffer=3,
        concurrency=5,
    )
    played(recipe(files, tmp_path / "whole", fleet))
    with pytest.raises(KeyboardInterrupt):
        run(recipe(files, tmp_path / "half", fleet), Stop())
    resume(str(tmp_path / "half"), Watcher())
    assert ended(tmp_path / "whole") == ended(tmp_path / "half")
    assert lines(tmp_path / "whole", "fleet") == lines(tmp_path / "half", "fleet")


@pytest.mark.parametrize("codec", [Codec(), Codec(codec="dense", values="fp16")])
@pytest.mark.parametrize("policy", ["sync", "over_select", "fedbuff"])
def test_the_clock_counts_the_bytes_that_are_sent_and_the_forecast_is_the_run(
    files: Path, tmp_path: Path, policy: Any, codec: Codec
) -> None:
    """By the time of the transfers, and by the books: bytes as the codec writes them."""
    fleet = Fleet("jetson80", policy=policy, buffer=2, dropout=0.1)
    own = recipe(files, tmp_path / "run", fleet, 0.5)
    own = dataclasses.replace(own, comms=Comms(up=codec))
    found = forecast(prepare(own))
    _, rounds, trained = played(own)
    assert list(found.times) == [line["seconds"] for line in rounds]
    sent = [sum(r["bytes_down"].values()) + sum(r["bytes_up"].values()) for r in trained]
    assert list(found.rounds) == sent


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ({"name": "scaffold"}, "declared linear=False"),
        ({"name": "local"}, "is declared"),
        ({"name": "hetlora"}, "different shapes"),
        ({"name": "rolora"}, "other tensors"),
        ({"name": "fedask"}, "is declared"),
    ],
)
def test_strategies_to_which_older_updates_mean_nothing_are_refused(
    files: Path, tmp_path: Path, strategy: dict[str, str], reason: str
) -> None:
    fleet = Fleet("jetson80", policy="fedbuff", buffer=2)
    with pytest.raises(FedpeftError, match=reason):
        run(recipe(files, tmp_path / "run", fleet, **strategy), Watcher())


def test_a_buffer_that_the_federation_cannot_fill_is_refused(files: Path, tmp_path: Path) -> None:
    with pytest.raises(FedpeftError, match=r"fleet\.buffer=10 replies of 8 clients at work"):
        run(recipe(files, tmp_path / "r", Fleet("rpi4", policy="fedbuff")), Watcher())


def test_a_fleet_has_no_place_in_a_deployment(files: Path, tmp_path: Path) -> None:
    own = recipe(files, tmp_path / "r", Fleet("rpi4"))
    with pytest.raises(FedpeftError, match="in a deployment, whose devices and delays are real"):
        begin(own, Watcher(), lambda *_: pytest.fail("not reached"), tmp_path / "ledger")


def test_strategies_are_asked_for_efforts_and_told_times(files: Path, tmp_path: Path) -> None:
    """A client that prunes half and trains a quarter of its adapter takes less time."""
    fleet = Fleet("rpi4", network="lan")
    played(recipe(files, tmp_path / "plain", fleet))
    whole = recipe(files, tmp_path / "told", fleet, name="tests.fleet.frugal")
    _, rounds, _ = played(whole)
    before = lines(tmp_path / "plain", "fleet")
    for line, other in zip(rounds, before, strict=True):
        assert line["times"]["c0"] < other["times"]["c0"]
        assert line["times"]["c1"] == other["times"]["c1"]
    checkpoint, _ = latest(tmp_path / "told" / "checkpoints", frugal.State)
    assert checkpoint.state.times == [line["times"] for line in rounds]


def test_pruning_clients_are_sooner_done_and_say_what_is_gone(files: Path, tmp_path: Path) -> None:
    """FedSpine hears the fleet's times, and its efforts shorten them; links hardly count here."""
    fleet, times = Fleet("rpi4", network="lan"), []
    for target in (0.0, 0.6):
        spine = {"name": "fedspine", "policy": "fixed", "ranks": [2], "step": 0.6, "probe": 1}
        whole = recipe(files, tmp_path / str(target), fleet, **spine, target=target)
        lora = {"kind": "lora", "r": 2, "target_modules": ["query", "key", "value", "dense"]}
        _, rounds, trained = played(dataclasses.replace(whole, adapter=lora))
        times.append([line["times"] for line in rounds])
        assert trained[-1]["figures"]["pruning"] == (CLIENTS if target else 0)
    checkpoint, _ = latest(tmp_path / "0.6" / "checkpoints", fedspine.State)
    assert checkpoint.state.roll.gone == dict.fromkeys(times[0][0], 0.6)
    for plain, pruned in zip(*times, strict=True):
        sooner = [pruned[name] < plain[name] for name in plain]
        assert all(sooner) == (pruned is not times[1][0])


def test_under_privacy_who_was_drawn_and_is_away_is_not_sent_anything(
    files: Path, tmp_path: Path
) -> None:
    fleet = Fleet("rpi4", availability="homo", beta=0.4)
    own = dataclasses.replace(
        recipe(files, tmp_path / "run", fleet),
        privacy=Privacy("record", noise_multiplier=1.0, delta=1e-3),
    )
    summary, rounds, trained = played(own)
    kinds = [kind for line in rounds for kind in line["dropped"].values()]
    assert set(kinds) == {"absent"} and summary.privacy
    for line, other in zip(trained, rounds, strict=True):
        assert line["clients"] == CLIENTS
        assert line["replies"] == CLIENTS - len(other["dropped"])
        each = sum(line["bytes_down"].values()) / line["replies"]
        assert each == sum(trained[0]["bytes_down"].values()) / trained[0]["replies"]


@pytest.mark.parametrize("preset", ["flash", "fedscale"])
def test_traced_devices_play_a_run_too(files: Path, tmp_path: Path, preset: Any) -> None:
    fleet = Fleet(preset, availability="trace", dropout=0.1)
    summary, rounds, _ = played(recipe(files, tmp_path / "run", fleet))
    assert summary.fleet is not None and summary.fleet.seconds > 0
    assert all(line["seconds"] > 0 for line in rounds)


def test_strategies_of_several_exchanges_go_on_with_whoever_is_left(
    files: Path, tmp_path: Path
) -> None:
    fleet = Fleet("jetson80", dropout=0.4)
    summary, rounds, trained = played(recipe(files, tmp_path / "run", fleet, name="fedask"))
    assert summary.fleet is not None and sum(summary.fleet.lost.values()) > 4
    for line, other in zip(rounds, trained, strict=True):
        assert len(line["times"]) == other["replies"] == CLIENTS - len(line["dropped"])
        assert max(line["times"].values()) == pytest.approx(line["seconds"])
