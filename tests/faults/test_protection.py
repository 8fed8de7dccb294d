"""Faults 53 to 62: budgets, ledgers, mechanisms, and sums that nobody may see the parts of."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message as FlowerMessage
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedpeft.cli.app import app
from fedpeft.config import Local, Privacy, Recipe, SecureAggregation
from fedpeft.config_load import dump_recipe, parse_recipe
from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.events import Watcher
from fedpeft.federation import Failure
from fedpeft.prepare import prepare
from fedpeft.run import resume, run
from fedpeft.secagg.fixed import FixedPoint
from tests.faults.federated import federate, grid_of
from tests.faults.register import fault
from tests.flower import securely
from tests.privacy.federated import charged, rounds_of
from tests.privacy.test_guard_runs import Stopper, notes, promise, recipe
from tests.tiny import IA3

RECORD = Privacy("record", noise_multiplier=1.0, delta=1e-3)
CLIENT = Privacy("client", noise_multiplier=1.0, delta=1e-3)


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def finite(out: Path) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in adapter(out).values())


@fault(53, "Q")
def test_a_spent_budget_ends_the_run_with_its_model(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    privacy = dataclasses.replace(CLIENT, max_rounds=2)
    summary = run(recipe(tiny, out, privacy, rounds_of(count=5)), Watcher())
    assert summary.rounds == 2 and finite(out)
    assert [text for text in notes(out) if text.startswith("stopped before round 3")]


@fault(54, "K")
def test_epsilon_goes_on_after_a_resume(tiny: Path, tmp_path: Path) -> None:
    """Round 2 was charged and never played: it counts as spent, and its replay is charged too."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(recipe(tiny, whole, RECORD, rounds_of(count=3)), Watcher())
    with pytest.raises(KeyboardInterrupt):
        run(recipe(tiny, cut, RECORD, rounds_of(count=3)), Stopper(2))
    spent = [promise(cut)["epsilon"][0]]
    resume(str(cut), Watcher())
    spent.append(promise(cut)["epsilon"][0])
    assert [number for number, _ in charged(cut)] == [1, 2, 2, 3]
    assert spent[0] < promise(whole)["epsilon"][0] < spent[1]


@fault(55, "E")
@pytest.mark.parametrize("what", ["edited", "shortened", "gone"])
def test_a_ledger_that_was_touched_is_refused(tiny: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(recipe(tiny, out, CLIENT, rounds_of(count=4)), Stopper(3))
    ledger = out / "privacy.jsonl"
    text = ledger.read_bytes()
    if what == "edited":
        ledger.write_bytes(text.replace(b'"round": 1', b'"round": 7'))
    elif what == "shortened":
        ledger.write_bytes(b"".join(text.splitlines(keepends=True)[:2]))
    else:
        ledger.unlink()
    with pytest.raises(FedpeftError, match=r"privacy\.jsonl"):
        resume(str(out), Watcher())


REFUSED: list[tuple[int, list[str], str]] = [
    (56, ["privacy.unit=client", "privacy.epsilon=4"], "Set rounds.weighting=equal"),
    *(
        (57, [*CLIENT_LEVEL, *more], wanted)
        for CLIENT_LEVEL in [["privacy.unit=client", "privacy.epsilon=4", "rounds.weighting=equal"]]
        for more, wanted in [
            (["robust.rule=krum"], "robust.rule=krum"),
            (["robust.rule=median"], "robust.rule=median"),
            (["strategy.name=fedex_lora"], "strategy.name='fedex_lora'"),
            (["strategy.name=flora"], "strategy.name='flora'"),
        ]
    ),
    (
        58,
        ["privacy.unit=record", "privacy.epsilon=4", "privacy.randomness=seeded",
         "engine.kind=flower"],
        "each the same noise",
    ),
    *(
        (59, ["privacy.unit=record", "privacy.epsilon=4", f"privacy.{key}={value}"], wanted)
        for key, value, wanted in [
            ("epsilon", ".nan", "privacy.epsilon=nan"),
            ("epsilon", "-1", "privacy.epsilon=-1"),
            ("epsilon", ".inf", "privacy.epsilon=inf"),
            ("epsilon", "0", "give one of the two"),
            ("noise_multiplier", ".nan", "privacy.noise_multiplier=nan"),
            ("clip_norm", "0", "privacy.clip_norm=0"),
            ("clip_norm", ".inf", "privacy.clip_norm=inf"),
            ("delta", "0", "privacy.delta=0"),
            ("delta", ".nan", "privacy.delta=nan"),
            ("delta", "0.5", "below one over the number of records"),
        ]
    ),
]  # fmt: skip


def refuse(tiny: Path, tmp_path: Path, settings: list[str], wanted: str) -> None:
    """``fedpeft run`` says it, ends with 2, and leaves no folder."""
    made = recipe(tiny, tmp_path / "run", Privacy(), rounds_of(count=2))
    rounds = dataclasses.replace(made.rounds, weighting="examples")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(dataclasses.replace(made, rounds=rounds)))
    done = CliRunner().invoke(app, ["run", str(tmp_path / "recipe.yaml"), "-q", *settings])
    assert done.exit_code == 2, done.output
    assert wanted in done.stderr
    assert not (tmp_path / "run").exists()


def of(number: int) -> list[tuple[list[str], str]]:
    return [(settings, wanted) for own, settings, wanted in REFUSED if own == number]


@fault(56, "E")
@pytest.mark.parametrize(("settings", "wanted"), of(56))
def test_weights_without_a_cap(tiny: Path, tmp_path: Path, settings: Any, wanted: str) -> None:
    refuse(tiny, tmp_path, settings, wanted)


@fault(57, "E")
@pytest.mark.parametrize(("settings", "wanted"), of(57))
def test_what_has_no_sensitivity(tiny: Path, tmp_path: Path, settings: Any, wanted: str) -> None:
    refuse(tiny, tmp_path, settings, wanted)


@fault(58, "E")
@pytest.mark.parametrize(("settings", "wanted"), of(58))
def test_seeded_noise_in_processes(tiny: Path, tmp_path: Path, settings: Any, wanted: str) -> None:
    refuse(tiny, tmp_path, settings, wanted)


@fault(58, "E")
def test_seeded_noise_voids_the_promise_and_is_refused_by_real_nodes(
    tiny: Path, tmp_path: Path
) -> None:
    """The setting is the flag: without it noise is secure."""
    assert Privacy().randomness == "secure"
    privacy = dataclasses.replace(RECORD, randomness="seeded")
    made = recipe(tiny, tmp_path / "run", privacy, rounds_of(count=1))
    summary = run(made, Watcher())
    assert any(line.startswith("VOID: the noise follows from the") for line in summary.privacy)
    prepared = prepare(made)
    state = prepared.strategy.init(prepared.problem)
    sent = prepared.post.announce(prepared.strategy.send(state, 1, ("c0", "c1")))
    found = list(federate(grid_of(), made).run(1, sent))
    assert len(found) == 2
    assert all(isinstance(x, Failure) and "randomness=seeded on a real" in x.reason for x in found)


@fault(59, "E")
@pytest.mark.parametrize(("settings", "wanted"), of(59))
def test_figures_without_meaning(tiny: Path, tmp_path: Path, settings: Any, wanted: str) -> None:
    refuse(tiny, tmp_path, settings, wanted)


@fault(60, "K")
def test_a_round_without_clients_releases_noise(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    made = recipe(tiny, out, CLIENT, rounds_of("poisson", count=1, rate=1e-9))
    summary = run(made, Watcher())
    assert summary.rounds == 1 and finite(out)
    initial = prepare(made).network.initial
    size = sum(value.numel() for value in initial.values())
    found = adapter(out)
    assert sum(value.numel() for value in found.values()) == size
    b = next(value for name, value in found.items() if "lora_B" in name)  # zero at the start
    assert float(b.abs().max()) > 0


@fault(60, "K")
def test_a_batch_without_examples_is_noise_alone(tiny: Path, tmp_path: Path) -> None:
    """Of n examples each is drawn with probability 1/n: a third of the batches is empty."""
    out = tmp_path / "run"
    made = recipe(tiny, out, RECORD, rounds_of(count=2))
    local = Local(optimizer="sgd", lr=0.01, batch_size=1, epochs=3)
    run(dataclasses.replace(made, local=local), Watcher())
    assert finite(out)


DORA = {"kind": "lora", "r": 2, "use_dora": True, "target_modules": ["query", "value"]}
VERA = {"kind": "vera", "r": 4, "target_modules": ["query", "value"]}


@fault(61, "K")
@pytest.mark.parametrize("settings", [IA3, DORA, VERA], ids=["ia3", "dora", "vera"])
def test_adapters_that_hooks_do_not_know(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    """fedpeft has no hooks: every adapter goes the one way, and the log names the lane."""
    out = tmp_path / "run"
    made = recipe(tiny, out, RECORD, rounds_of(count=1))
    with caplog.at_level(logging.INFO, "fedpeft"):
        run(dataclasses.replace(made, adapter=settings), Watcher())
    assert finite(out) and "lane" in caplog.text


def secure(tiny: Path, **changed: Any) -> Recipe:
    return securely.recipe_of(
        tiny, secure=SecureAggregation(enabled=True, clip_norm=0.05, **changed)
    )


def reply_of(change: Any, stage: str, clients: tuple[str, ...]) -> Any:
    def reply(request: FlowerMessage, answer: FlowerMessage) -> FlowerMessage | None:
        kind, name = securely.stage_of(request), securely.client_of(request)
        if kind != securely.STAGES[stage] or name not in clients:
            return answer
        found: FlowerMessage | None = change(answer)
        return found

    return reply


@fault(62, "A")
@pytest.mark.parametrize("stage", securely.STAGES)
@pytest.mark.parametrize("lost", [("c1",), ("c1", "c2")])
def test_dropouts_at_each_stage_give_the_right_sum_or_none(
    tiny: Path, stage: str, lost: tuple[str, ...]
) -> None:
    made = secure(tiny)
    prepared = prepare(made)
    grid = securely.grid_of(reply_of(lambda answer: None, stage, lost))
    found = list(securely.on_flower(prepared, grid, wait=0.05).run(1, securely.sent(prepared)))
    if len(lost) == 2:
        assert all(isinstance(one, Failure) for one in found) and len(found) == 4
        return
    late = stage in ("confirm", "unmask")  # its vector is in the sum
    wanted = securely.in_process(made, () if late else lost).run(1, securely.sent(prepared))
    securely.assert_same(securely.partial(iter(found)), securely.partial(wanted))


@fault(62, "A")
def test_fewer_than_three_clients_have_no_sum(tiny: Path, tmp_path: Path) -> None:
    made = secure(tiny)
    engine = dataclasses.replace(made.engine, kind="sequential")
    rounds = parse_recipe("rounds: {count: 1, sampling: {kind: fixed, size: 2}}", "here").rounds
    out = dataclasses.replace(made.output, folder=str(tmp_path / "run"))
    made = dataclasses.replace(made, rounds=rounds, engine=engine, output=out, baselines=())
    with pytest.raises(QuorumError, match="3 are needed"):
        run(made, Watcher())


@fault(62, "E")
@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"bits": 32, "clip": 1.0, "clients": 2**31 - 1}, "too coarse|would overflow 32 bits"),
        ({"bits": 32, "clip": 1.0, "clients": 10**6}, "too coarse"),
        ({"bits": 64, "clip": math.inf, "clients": 1000}, "positive, finite number"),
    ],
)
def test_sums_that_would_overflow_are_refused(settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(FedpeftError, match=wanted):
        FixedPoint(length=10**6, **settings)


@fault(62, "A")
def test_a_weight_above_the_most_is_refused_on_the_client() -> None:
    """Its own arithmetic has no room for it."""
    fixed = FixedPoint(bits=64, clip=0.05, clients=4, length=3, weight_max=12.0, extras=(12.0,))
    with pytest.raises(FedpeftError, match="number 3 of the vector lies beyond"):
        fixed.encode(np.array([0.0, 0.0, 0.0, 1000.0]))


@fault(62, "A")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_never_becomes_a_finite_sum(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """It is refused on the client, before it is masked."""
    encode = FixedPoint.encode
    calls: list[int] = []

    def spoilt(self: FixedPoint, vector: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            vector = vector.copy()
            vector[0] = value
        return encode(self, vector)

    monkeypatch.setattr(FixedPoint, "encode", spoilt)
    made = secure(tiny)
    prepared = prepare(made)
    found = list(securely.on_flower(prepared, securely.grid_of()).run(1, securely.sent(prepared)))
    mean = securely.partial(iter(found))
    assert mean.clients == 3 and len(mean.excluded) == 1
    sums = [value for own in mean.replies.trees.values() for value in own.values()]
    assert all(bool(torch.isfinite(value).all()) for value in sums)
