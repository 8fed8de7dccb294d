"""Secure aggregation over Flower: SecureFederation's sum, and nothing else reaches the server."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord

from fedpeft.comms.ledger import message_bytes, totals
from fedpeft.config import Privacy, SecureAggregation
from fedpeft.engine import Seam, play_round
from fedpeft.errors import QuorumError
from fedpeft.federation import Failure, Federation
from fedpeft.flower.federation import FlowerFederation, Patience
from fedpeft.flower.records import decode
from fedpeft.flower.secure import SecureFlowerFederation
from fedpeft.flower.summed import Rules
from fedpeft.message import Messages
from fedpeft.postprocess import Kept
from fedpeft.prepare import Prepared, prepare
from fedpeft.privacy.client_level import BELOW, ClientLevel
from fedpeft.secagg.envelope import Kind
from fedpeft.secagg.fixed import FixedPoint
from fedpeft.secure import Summed
from fedpeft.tree import Tree
from tests.flower.nodes import InProcess
from tests.flower.securely import (
    NAMES,
    SERVER_NOISE,
    SIZES,
    STAGES,
    assert_same,
    blob,
    client_of,
    grid_of,
    in_process,
    on_flower,
    one_by_one,
    partial,
    recipe_of,
    sent,
    silent,
    stage_of,
)

pytestmark = pytest.mark.usefixtures("flower_task")

ADAPTIVE = dataclasses.replace(SERVER_NOISE, noise_multiplier=0.3, adaptive=True)


@pytest.mark.parametrize(
    ("privacy", "secure", "weighting"),
    [
        (None, SecureAggregation(enabled=True, clip_norm=0.05), "examples"),
        (None, SecureAggregation(enabled=True, clip_norm=0.05, bits=32), "equal"),
        (None, SecureAggregation(enabled=True, clip_norm=50.0, threshold=1.0), "examples"),
        (SERVER_NOISE, None, "equal"),
        (ADAPTIVE, None, "equal"),
    ],
    ids=["by examples", "32 bits", "all must stay", "server noise", "adaptive"],
)
def test_the_mean_is_that_of_one_process_bit_for_bit(
    tiny: Path, privacy: Privacy | None, secure: SecureAggregation | None, weighting: str
) -> None:
    recipe = recipe_of(tiny, privacy, secure, weighting)
    prepared = prepare(recipe)
    found = partial(on_flower(prepared, grid_of()).run(1, sent(prepared)))
    assert_same(found, partial(in_process(recipe).run(1, sent(prepared))))
    assert found.clients == 4 and found.excluded == {}
    weight = sum(SIZES.values()) if weighting == "examples" else 4
    assert float(found.replies.scalars["weight"]) == pytest.approx(weight)
    assert (BELOW in found.replies.scalars) == (privacy is ADAPTIVE)


def play(prepared: Prepared, federation: Federation, rounds: int = 2) -> Tree:
    state = prepared.strategy.init(prepared.problem)
    for number in range(1, rounds + 1):
        rules, seed = prepared.recipe.rounds, prepared.recipe.seed
        seam = Seam(prepared.post)
        state, report = play_round(prepared.strategy, state, federation, rules, seed, number, seam)
        assert (report.replied, report.excluded) == (4, {})
    return prepared.strategy.adapter(state)


@pytest.mark.parametrize("strategy", ["fedavg", "fedask", "rolora"])
def test_whole_runs_give_the_same_adapter_also_with_two_exchanges_a_round(
    tiny: Path, strategy: str
) -> None:
    recipe = recipe_of(tiny, name=strategy)
    prepared = prepare(recipe)
    found = play(prepared, on_flower(prepared, grid_of()))
    wanted = play(prepare(one_by_one(recipe)), in_process(recipe))
    initial = prepared.network.initial
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert max(float((found[n] - initial[n]).abs().max()) for n in found) > 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_falls_silent_costs_itself_alone(tiny: Path, stage: str) -> None:
    recipe = recipe_of(tiny)
    prepared = prepare(recipe)
    grid = grid_of(silent(STAGES[stage], "c1"))
    found = partial(on_flower(prepared, grid, wait=0.05).run(1, sent(prepared)))
    late = stage in ("confirm", "unmask")  # its vector has arrived
    lost = () if late else ("c1",)
    assert_same(found, partial(in_process(recipe, lost).run(1, sent(prepared))))
    reason = f"stage {stage}: no reply within 0.05 seconds"
    assert found.excluded == ({} if late else {"c1": reason})


@pytest.mark.parametrize("stage", STAGES)
def test_below_the_threshold_there_is_no_sum_and_every_client_a_reason(
    tiny: Path, stage: str
) -> None:
    recipe = recipe_of(tiny)
    prepared = prepare(recipe)
    grid = grid_of(silent(STAGES[stage], "c1", "c2"))
    found = list(on_flower(prepared, grid, wait=0.05).run(1, sent(prepared)))
    assert all(isinstance(one, Failure) for one in found)
    reasons = {one.client: one.reason for one in found}
    assert reasons.keys() == set(NAMES)
    assert reasons["c1"] == reasons["c2"] == f"stage {stage}: no reply within 0.05 seconds"
    assert reasons["c0"].startswith(f"no secure sum: stage {stage} of secure aggregation: 2 of 4")
    with pytest.raises(QuorumError, match="0 valid replies of 4 clients"):
        play(prepared, on_flower(prepared, grid, wait=0.05), rounds=1)


def test_two_clients_are_never_summed_and_nothing_is_sent_to_them(tiny: Path) -> None:
    prepared = prepare(recipe_of(tiny))
    grid = grid_of()
    found = list(on_flower(prepared, grid).run(1, sent(prepared, ("c0", "c1"))))
    why = "no secure sum: a round of 2 clients, 3 are needed"
    assert found == [Failure("c0", why), Failure("c1", why)]
    assert {message.metadata.message_type for message in grid.seen} <= {"query"}


def garbage(content: Message) -> None:
    content.content["blobs"] = ConfigRecord({"secagg": bytes(range(256)) * 3})


def flipped(content: Message) -> None:
    own = bytearray(blob(content))
    own[len(own) // 2] ^= 1
    content.content["blobs"] = ConfigRecord({"secagg": bytes(own)})


def talkative(content: Message) -> None:
    content.content["scalars"] = MetricRecord({"weight": 9.0})


def empty(content: Message) -> None:
    content.content["blobs"] = ConfigRecord({})


@pytest.mark.parametrize("stage", ["advertise", "share", "mask"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (garbage, "its signature does not verify"),
        (flipped, "its signature does not verify"),
        (talkative, "the reply must hold the blob 'secagg' and nothing else"),
        (empty, "the reply must hold the blob 'secagg' and nothing else"),
    ],
    ids=["garbage", "one bit", "scalars beside it", "nothing"],
)
def test_garbage_costs_its_sender_alone(
    tiny: Path, stage: str, spoil: Callable[[Message], None], reason: str
) -> None:
    def reply(request: Message, answer: Message) -> Message:
        if stage_of(request) == STAGES[stage] and client_of(request) == "c3":
            spoil(answer)
        return answer

    recipe = recipe_of(tiny)
    prepared = prepare(recipe)
    found = partial(on_flower(prepared, grid_of(reply)).run(1, sent(prepared)))
    assert_same(found, partial(in_process(recipe, ("c3",)).run(1, sent(prepared))))
    assert found.excluded.keys() == {"c3"}
    assert found.excluded["c3"].startswith(f"stage {stage}: ")
    assert reason in found.excluded["c3"]


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Messages]:
    """What every client's reply was, before it was masked."""
    found: dict[str, Messages] = {}
    leave = ClientLevel.leave

    def keep(self: ClientLevel, sent: Messages, reply: Messages, kept: Kept) -> Messages:
        left = leave(self, sent, reply, kept)
        found[left.clients[0]] = left
        return left

    monkeypatch.setattr(ClientLevel, "leave", keep)
    return found


@pytest.mark.parametrize("noise", ["server", "shares", "client"])
def test_clients_noise_is_in_the_sum_and_no_reply_is_seen_in_clear(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, noise: Any
) -> None:
    privacy = dataclasses.replace(SERVER_NOISE, noise=noise)
    prepared, grid = prepare(recipe_of(tiny, privacy)), grid_of()
    replies = recorded(monkeypatch)
    found = partial(on_flower(prepared, grid).run(1, sent(prepared)))
    level, stack = prepared.level, sent(prepared)
    assert level is not None and replies.keys() == set(NAMES)
    size = sum(t.numel() for t in prepared.network.initial.values())
    fixed = FixedPoint(64, level.reach(stack), 4, size, 1.0, (1.0,))
    one = {t: {n: x[0] for n, x in own.items()} for t, own in replies["c0"].trees.items()}
    summed = Summed(one, False)
    words = np.concatenate([fixed.encode(summed.rows(replies[name])) for name in NAMES])
    wanted = summed.mean(fixed.decode(words.sum(axis=0, dtype=fixed.dtype), 4))
    assert all(
        torch.equal(found.replies.trees["adapter"][n], t)
        for n, t in wanted.trees["adapter"].items()
    )
    norms = [float(np.linalg.norm(fixed.decode(own, 1)[:size])) for own in words]
    shares = {"server": 0.0, "shares": 0.05 / np.sqrt(2), "client": 0.1}  # m = 2 of 4 clients
    expected = np.sqrt(0.05**2 + size * shares[noise] ** 2)
    assert norms == pytest.approx([expected] * 4, rel=0.3)
    answers = [m for kind, m in grid.answers if kind == "train.secure"]
    assert len(answers) == 5 * 4
    for message in answers:
        own, _ = decode(message.content)
        assert (own.trees, own.scalars, own.blobs.keys()) == ({}, {}, {"secagg"})
        name = client_of(message)
        row = words[NAMES.index(name)]
        for form in (row, fixed.decode(row, 1), fixed.decode(row, 1).astype(np.float32)):
            parts = [form[k : k + 3].tobytes() for k in range(0, size, 3)]
            assert not any(part in own.blobs["secagg"] for part in parts)
    plain, _ = decode(in_clear(tiny).content)  # without it they are there
    assert plain.trees and "loss" in plain.scalars


def in_clear(tiny: Path) -> Message:
    recipe = dataclasses.replace(recipe_of(tiny), secure_aggregation=SecureAggregation())
    prepared, grid = prepare(recipe), grid_of()
    list(FlowerFederation(grid, recipe, 4, None, Patience(0.05, 5.0)).run(1, sent(prepared)))
    return next(m for kind, m in grid.answers if kind == "train")


def test_bytes_up_are_those_of_all_answers_by_kind(tiny: Path) -> None:
    prepared, grid = prepare(recipe_of(tiny)), grid_of()
    found = partial(on_flower(prepared, grid).run(1, sent(prepared)))
    sizes = [
        sum(message_bytes(decode(m.content)[0]).values())
        for kind, m in grid.answers
        if kind == "train.secure"
    ]
    masked, others = sizes[8:12], sizes[:8] + sizes[12:]
    assert totals(found.up) == {"masked": sum(masked), "secagg": sum(others)}
    length = sum(t.numel() for t in prepared.network.initial.values())
    assert min(masked) > 8 * (length + 1)


TAMPERED: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 32}, "bits=32, and by the recipe it must be secure_aggregation.bits=64"),
    "clip": ({"clip": 0.06}, "clip=0.06, and by the recipe it must be 0.05"),
    "length": ({"length": 50}, "length=50, and by the recipe it must be"),
    "weight": ({"weight_max": 3.0}, "weight_max, extras=3.0"),
    "weight's own": ({"extras": (3.0,)}, "weight_max, extras=12.0"),
    "another number": ({"extras": (12.0, 12.0)}, "it must be 1 bounds"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_clients_refuse_parameters_that_their_recipe_does_not_give(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    change, reason = TAMPERED[name]
    own = Rules.fixed_point

    def tampered(self: Rules, sent: Messages, examples: list[int]) -> FixedPoint:
        return dataclasses.replace(own(self, sent, examples), **change)

    replies = recorded(monkeypatch)
    monkeypatch.setattr(Rules, "fixed_point", tampered)
    prepared = prepare(recipe_of(tiny))
    found = list(on_flower(prepared, grid_of()).run(1, sent(prepared)))
    assert all(isinstance(one, Failure) for one in found) and len(found) == 4
    assert all(reason in one.reason for one in found)
    assert replies == {}  # nobody trained


def test_clients_refuse_a_sum_of_fewer_than_the_recipes_threshold(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = SecureAggregation(enabled=True, clip_norm=0.05, threshold=1.0)
    prepared = prepare(recipe_of(tiny, secure=strict))
    federation = on_flower(prepared, grid_of())
    monkeypatch.setattr(federation._rules, "least", lambda clients: 3)  # the server's alone
    found = list(federation.run(1, sent(prepared)))
    assert all(isinstance(one, Failure) for one in found) and len(found) == 4
    assert all("threshold=3, and by the recipe it must be at least 4" in f.reason for f in found)


def secrets(grid: InProcess) -> list[tuple[int, int]]:
    """Of each node's record of the protocol: bytes of the participant's state, of the setup."""
    found = []
    for context in grid.contexts.values():
        record = context.state["secagg"]
        assert isinstance(record, ConfigRecord)
        found.append((len(bytes(record["participant"])), len(bytes(record["setup"]))))  # type: ignore[arg-type]
    return found


def test_nothing_secret_stays_on_a_node_after_the_round(tiny: Path) -> None:
    between: list[list[tuple[int, int]]] = []

    def reply(request: Message, answer: Message) -> Message:
        record = grid.contexts[request.metadata.dst_node_id].state["secagg"]
        assert isinstance(record, ConfigRecord)
        between.append([(len(bytes(record["participant"])), stage_of(request))])  # type: ignore[arg-type]
        return answer

    grid = grid_of(reply)
    prepared = prepare(recipe_of(tiny))
    federation = on_flower(prepared, grid)
    partial(federation.run(1, sent(prepared)))
    bare = 8 + 3 + 1 + 32  # number, name, whether a round is under way, digest
    assert secrets(grid) == [(bare, 0)] * 4
    waiting = [size for [(size, stage)] in between if stage != Kind.CONFIRMED]
    assert len(waiting) == 16 and min(waiting) > bare + 96  # kept before the answer left
    partial(federation.run(2, sent(prepared)))
    assert secrets(grid) == [(bare, 0)] * 4


def test_a_round_that_was_given_up_is_begun_again_with_fresh_keys(tiny: Path) -> None:
    recipe = recipe_of(tiny)
    prepared = prepare(recipe)
    grid = grid_of(silent(Kind.SURVIVORS, "c0", "c1"))
    lost = on_flower(prepared, grid, wait=0.05)
    assert all(isinstance(one, Failure) for one in lost.run(1, sent(prepared)))
    grid.reply = None
    restarted = on_flower(prepared, grid)
    wanted = partial(in_process(recipe).run(1, sent(prepared)))
    assert_same(partial(restarted.run(1, sent(prepared))), wanted)
    assert_same(partial(restarted.run(1, sent(prepared))), wanted)
    masked = [
        blob(m) for kind, m in grid.answers if kind == "train.secure" and client_of(m) == "c2"
    ]
    longest = [own for own in masked if len(own) == max(map(len, masked))]
    assert len(longest) == 3 and len(set(longest)) == 3


def test_numbers_rise_though_the_clock_stands_and_a_clock_set_back_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, grid = prepare(recipe_of(tiny)), grid_of()
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    federation = on_flower(prepared, grid)
    for number in (1, 2):
        assert partial(federation.run(number, sent(prepared))).clients == 4
    found = list(on_flower(prepared, grid).run(3, sent(prepared)))
    assert len(found) == 4
    for one in found:
        assert isinstance(one, Failure)
        assert "took part in round 1000000000000000001" in one.reason


def test_a_node_that_starts_again_within_a_round_misses_it_and_is_back_in_the_next(
    tiny: Path,
) -> None:
    def reply(request: Message, answer: Message) -> Message:
        if stage_of(request) == Kind.SETUP and client_of(request) == "c1":
            del grid.contexts[request.metadata.dst_node_id].state["secagg"]
        return answer

    recipe = recipe_of(tiny)
    prepared, grid = prepare(recipe), grid_of(reply)
    federation = on_flower(prepared, grid)
    found = partial(federation.run(1, sent(prepared)))
    assert_same(found, partial(in_process(recipe, ("c1",)).run(1, sent(prepared))))
    assert "no round is under way here" in found.excluded["c1"]
    grid.reply = None
    assert partial(federation.run(2, sent(prepared))).clients == 4


def test_what_is_not_summed_passes_through(tiny: Path) -> None:
    prepared, grid = prepare(recipe_of(tiny, name="fedask")), grid_of()
    federation: SecureFlowerFederation = on_flower(prepared, grid)
    assert federation.clients() == SIZES
    assert federation.memory() == {}
    play(prepared, federation, rounds=1)
    assert federation.memory() == {name: {} for name in NAMES}
    federation.restore({})
    scores = [one for one in federation.evaluate(2, sent(prepared)) if isinstance(one, dict)]
    assert [name for one in scores for name in one] == list(NAMES)
