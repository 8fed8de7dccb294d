"""EPM against its rule in numpy: masks by policy and level, means by coverage, its figures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft import tree
from fedpeft.comms.ledger import message_bytes
from fedpeft.config import Engine, Output
from fedpeft.conformance import PROPERTIES, name_of
from fedpeft.conformance.finding import examine
from fedpeft.errors import FedpeftError
from fedpeft.events import Watcher
from fedpeft.masks import DROPPED
from fedpeft.record.metrics_log import MetricsLog
from fedpeft.run import run
from fedpeft.strategies.epm import EPM
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategy import addressed, build
from tests.strategies.oracle import close, shares
from tests.strategies.toy import (
    LAYERS,
    Arrays,
    Present,
    Toy,
    a_of,
    arrays,
    b_of,
    everyone,
    make,
    play,
    some,
)
from tests.tiny import tiny_recipe, write_tiny

BUDGETS = {"client-0": 0.5, "client-1": 1.0, "client-2": 0.4, "client-3": 0.5, "client-4": 0.1}
TYPES = {"client-0": 2.0, "client-1": 1.0, "client-2": 7.0, "client-3": 2.0, "client-4": 4.0}
LEVELS = ["ranks", "modules", "elements"]
RULES = ["static_ordered", "rolling", "magnitude", "neuron"]
CASES = [(policy, level) for policy in RULES for level in LEVELS]
CASES += [("quartile", "modules"), ("quartile", "elements")]  # no layer of the toy has 4 ranks


def units(policy: str, scores: np.ndarray, budget: float, t: int) -> np.ndarray:
    """Which units a client has, bool."""
    w = len(scores)
    if policy == "quartile":
        order = np.argsort(scores, kind="stable")
        rank = np.empty(w, dtype=int)
        rank[order] = np.arange(w)
        return ~np.isin(rank * 4 // w, DROPPED[int(budget)])
    k = max(1, math.ceil(budget * w - 1e-9))
    order = np.argsort(-scores, kind="stable")
    if policy == "static_ordered":
        order = np.arange(w)
    elif policy == "rolling":
        order = (np.arange(w) + t) % w
    return np.isin(np.arange(w), order[:k])


def masked(strategy: EPM, w: Arrays, budget: float, t: int) -> Arrays:
    """A client's mask of every factor."""
    policy, found = strategy.policy, {}
    sizes = {
        n: np.linalg.norm(w[a_of(n)], axis=1)
        * (1 if policy == "neuron" else np.linalg.norm(w[b_of(n)], axis=0))
        for n in LAYERS
    }
    if strategy.level == "elements":
        for name in (name(layer) for layer in LAYERS for name in (a_of, b_of)):
            x = w[name]
            if policy == "neuron":
                rows = units(policy, np.linalg.norm(x, axis=1), budget, t)
                found[name] = np.repeat(rows[:, None], x.shape[1], axis=1)
            else:
                found[name] = units(policy, abs(x).ravel(), budget, t).reshape(x.shape)
        return found
    order = list(LAYERS)
    whole = units(policy, np.array([np.linalg.norm(sizes[n]) for n in order]), budget, t)
    for i, layer in enumerate(order):
        own = units(policy, sizes[layer], budget, t)
        if strategy.level == "modules":
            own = np.full(len(sizes[layer]), whole[i])
        found[a_of(layer)] = np.repeat(own[:, None], w[a_of(layer)].shape[1], axis=1)
        found[b_of(layer)] = np.repeat(own[None], len(w[b_of(layer)]), axis=0)
    return found


def oracle(toy: Toy, strategy: EPM, budgets: dict[str, float], present: Present) -> list[Any]:
    """Three rounds: after each the adapter and the figures."""
    w, found = arrays(toy.initial), []
    for t in range(3):
        names = list(present(t + 1, toy.clients))
        ms = {c: masked(strategy, w, budgets[c], t) for c in names}
        owns = []
        for client in names:
            x = {n: np.where(ms[client].get(n, True), v, 0.0) for n, v in w.items()}
            for _ in range(toy.steps[client]):
                g = toy.gradient(client, x)
                x = {n: x[n] - toy.lr * np.where(ms[client].get(n, True), g[n], 0) for n in x}
            owns.append(x)
        p, after, counts = shares(toy, names), {}, []
        for n, old in w.items():
            on = np.array([np.broadcast_to(ms[c].get(n, True), old.shape) for c in names], float)
            own = np.array([x[n] for x in owns])
            mass, total = np.tensordot(p, on, 1), np.tensordot(p, on * own, 1)
            fill = old + total - mass * old
            if strategy.uncovered == "silent":
                fill = np.where(mass > 0, total / np.where(mass > 0, mass, 1), old)
            after[n] = fill
            if "lora" in n:
                counts.append(on.sum(0).ravel())
        noise = [
            sum((w[n][~m] ** 2).sum() for n, m in ms[c].items())
            / sum((w[n] ** 2).sum() for n in ms[c])
            for c in names
        ]
        hits = np.concatenate(counts)
        w = after
        found.append((w, hits.min(), [(hits == k).sum() for k in range(len(names) + 1)], noise))
    return found


@pytest.mark.parametrize("uncovered", ["silent", "old"])
@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize(("policy", "level"), CASES)
def test_three_rounds_equal_the_rule_in_numpy(
    policy: str, level: str, present: Present, uncovered: str
) -> None:
    given = TYPES if policy == "quartile" else BUDGETS
    toy = make()
    settings = {"policy": policy, "level": level, "client_budgets": given, "uncovered": uncovered}
    strategy = build("epm", settings)
    played = play(strategy, toy, 3, present, size=2)
    wanted = oracle(toy, strategy, given, present)
    for state, (w, least, histogram, noise) in zip(played.states[1:], wanted, strict=True):
        assert close(strategy.adapter(state), w)
        figures = strategy.figures(state)
        assert figures["gamma_min"] == least and figures["coverage"] == histogram
        assert figures["reduction_max"][0] == pytest.approx(max(noise))
        assert figures["reduction_mean"][0] == pytest.approx(np.mean(noise))
        assert all(0 <= own <= 1 + 1e-9 or level == "elements" for own in figures["reduction_max"])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("policy", ["random", "fixed_subnet", "ordered_dropout"])
def test_full_budgets_are_fedavg_whatever_the_policy(policy: str, level: str) -> None:
    ours = play(build("epm", {"policy": policy, "level": level}), make(), 3, some).states[-1]
    theirs = play(FedAvg(), make(), 3, some).states[-1]
    for name, value in theirs.adapter.items():
        assert torch.allclose(ours.adapter[name], value, atol=1e-13)
    assert ours.figures["gamma_min"] == 5 and ours.figures["reduction_max"][0] == 0.0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("policy", [*RULES, "random", "fixed_subnet", "ordered_dropout"])
def test_a_client_changes_nothing_that_is_masked_and_sends_what_it_was_sent(
    policy: str, level: str
) -> None:
    toy = make()
    strategy: EPM = build("epm", {"policy": policy, "level": level, "client_budgets": BUDGETS})
    state = strategy.init(toy.problem())
    before = strategy.adapter(state)
    for sent in addressed(strategy, state, 1, toy.clients):
        own = strategy._masks(state, sent.clients)
        reply = strategy.train(sent, toy.cohort(sent.clients))
        for k, client in enumerate(sent.clients):
            numbers = sum(int(mask[k].sum()) for mask in own.values())
            heads = sum(x.numel() for n, x in before.items() if "lora" not in n)
            for message in (sent[k], reply[k]):
                assert tree.numel(message.trees["adapter"]) == numbers + heads
            for name, mask in own.items():
                trained = toy.trained[client][name]
                # by ranks a client has its components first, wherever they are in the model
                if level == "ranks":
                    assert int((trained != 0).sum()) <= int(mask[k].sum())
                else:
                    assert float(trained[~mask[k]].abs().sum()) == 0.0
        assert not reply.blobs, "masks go down only"
        assert ("blob" in message_bytes(sent[0])) == (level == "elements")


def test_random_parts_reach_everything_and_static_ones_what_the_widest_client_has() -> None:
    toy = make()
    narrow = {c: 0.34 for c in toy.clients}
    static = play(build("epm", {"policy": "static_ordered", "client_budgets": narrow}), toy, 3)
    state = static.states[-1]
    assert state.figures["gamma_min"] == 0 and state.figures["coverage"][5] > 0
    for layer in LAYERS:
        first, last = (toy.initial[a_of(layer)], state.adapter[a_of(layer)])
        assert torch.equal(first[-1], last[-1]), "nobody has the last rank"
    rolled = play(build("epm", {"policy": "rolling", "client_budgets": narrow}), make(), 3)
    for layer in LAYERS:
        b = rolled.states[-1].adapter[b_of(layer)]
        assert bool((b.abs().sum(0) > 0).all())


@pytest.mark.parametrize("level", LEVELS)
def test_the_kit_holds_with_unequal_budgets(level: str) -> None:
    """But for one property: a client's own model is a part of the global one."""
    strategy = build("epm", {"level": level, "policy": "random", "budgets": [1.0, 0.5]})
    broken = [name_of(p) for p in PROPERTIES if examine(strategy, p).verdict == "broken"]
    assert broken == ["personal adapters are complete"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_run_writes_the_figures_of_every_round(tmp_path: Path, level: str) -> None:
    write_tiny(tmp_path)
    settings = {"name": "epm", "level": level, "policy": "rolling", "budgets": [0.5, 1.0]}
    recipe = replace(
        tiny_recipe(tmp_path, **settings),
        engine=Engine(device="cpu"),
        output=Output(folder=str(tmp_path / "run")),
        baselines=(),
    )
    run(recipe, Watcher())
    lines = MetricsLog(Path(recipe.output.folder) / "metrics.jsonl").read()
    figures = [line["figures"] for line in lines if line["kind"] == "round"]
    assert len(figures) == recipe.rounds.count
    for own in figures:
        assert own["gamma_min"] >= 1 and sum(own["coverage"]) == sum(figures[0]["coverage"])
        assert 0 < own["reduction_mean"][0] <= own["reduction_max"][0] < 1
    assert figures[0]["reduction_max"][1] == 0.0, "B = 0: there is no update yet"


def test_clients_that_do_not_exist_and_quarters_of_three_are_refused() -> None:
    with pytest.raises(FedpeftError, match=r"strategy\.client_budgets names 'x'"):
        EPM(client_budgets={"x": 0.5}).init(make().problem())
    with pytest.raises(FedpeftError, match="cannot be quartered"):
        EPM(policy="quartile", budgets=[1, 2]).init(make().problem())
