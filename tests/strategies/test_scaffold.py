"""SCAFFOLD against Karimireddy's algorithm 1 with option II in numpy, and what it is for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

import fedpeft.local
from fedpeft import tree
from fedpeft.cohort.turns import Turn, turns
from fedpeft.config import Local
from fedpeft.errors import FedpeftError
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.scaffold import Scaffold
from fedpeft.strategy import Messages
from tests.strategies.oracle import average, close, sgd, shares
from tests.strategies.toy import Arrays, Present, Toy, arrays, everyone, make, play, some
from tests.tiny import Tiny


def oracle(toy: Toy, rounds: int, present: Present, lr: float) -> tuple[Arrays, Arrays]:
    """x and c; c_k' = c_k - c + (x - y_k) / (steps_k local lr), as printed in the paper."""
    x = arrays(toy.initial)
    c = {n: np.zeros(v.shape) for n, v in x.items()}
    own = dict.fromkeys(toy.clients, c)
    for t in range(1, rounds + 1):
        names = list(present(t, toy.clients))
        p, ends, changes = shares(toy, names), [], []
        for k in names:
            drift = {n: c[n] - own[k][n] for n in x}

            def corrected(g: Arrays, drift: Arrays = drift) -> Arrays:
                return {n: g[n] + drift[n] for n in g}

            y = sgd(toy, k, x, change=corrected)
            span = toy.steps[k] * toy.lr
            after = {n: own[k][n] - c[n] + (x[n] - y[n]) / span for n in x}
            changes.append({n: after[n] - own[k][n] for n in x})
            ends.append(y)
            own = own | {k: after}
        move, change = average(ends, p), average(changes, p)
        x = {n: x[n] + lr * (move[n] - x[n]) for n in x}
        c = {n: c[n] + len(names) / len(toy.clients) * change[n] for n in x}
    return x, c


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("lr", [1.0, 0.7])
def test_three_rounds_equal_the_rule_in_numpy(present: Present, lora: bool, lr: float) -> None:
    toy = make(lora=lora)
    states = play(Scaffold(lr), toy, 3, present, size=2).states
    for rounds in (1, 2, 3):
        x, c = oracle(make(lora=lora), rounds, present, lr)
        assert close(states[rounds].adapter, x, 1e-12)
        assert close(states[rounds].control, c, 1e-11)


def test_the_servers_variate_is_the_mean_of_the_clients() -> None:
    """With everybody there, whatever the weights: then corrections sum to zero."""
    toy = make()
    state = play(Scaffold(), toy).states[-1]
    owns = [arrays(toy.memory[k]["control"]) for k in toy.clients]
    assert close(state.control, average(owns, shares(toy, toy.clients)), 1e-13)


def test_absent_clients_keep_their_variates() -> None:
    toy = make()
    played = play(Scaffold(), toy, 1)
    before = {k: dict(kept["control"]) for k, kept in toy.memory.items()}
    sent = Scaffold().send(played.states[-1], 2, toy.clients[:2])
    Scaffold().train(sent, toy.cohort(sent.clients))
    for k in toy.clients:
        kept = toy.memory[k]["control"]
        assert (tree.norm(tree.sub(kept, before[k])) == 0) == (k not in sent.clients)


def test_unequal_steps_do_not_move_its_fixed_point() -> None:
    """On quadratics its limit is the minimum of the mean loss, sum_k p_k T_k; FedAvg's is not."""
    for strategy, exact in ((Scaffold(), True), (FedAvg(), False)):
        toy = make(lora=False)
        adapter = strategy.adapter(play(strategy, toy, 250).states[-1])
        best = average([arrays(toy.targets[k]) for k in toy.clients], shares(toy, toy.clients))
        apart = max(abs(adapter[n].numpy() - v).max() for n, v in best.items() if "classifier" in n)
        assert apart < 1e-6 if exact else apart > 1e-2


def idle_rows(plans: Sequence[np.ndarray], width: int, fixed: bool = False) -> Iterator[Turn]:
    return turns(plans, width, True)


@pytest.mark.parametrize("chunk", [1, 3, 4])
@pytest.mark.parametrize("idle", [False, True])
def test_variates_are_option_ii_on_a_model(
    chunk: int, idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many clients are in flight, and with rows that wait for the others to end."""
    if idle:
        monkeypatch.setattr(fedpeft.local, "turns", idle_rows)
    tiny = Tiny()
    strategy = Scaffold()
    federation = tiny.federation(strategy, chunk)
    state = strategy.init(tiny.problem)
    for number in (1, 2):
        before = {k: dict(kept["control"]) for k, kept in federation.memory().items()}
        sent = strategy.send(state, number, tuple(federation.clients()))
        replies = [r for r in federation.run(number, sent) if isinstance(r, Messages)]
        for reply in replies:
            for k, client in enumerate(reply.clients):
                moved = tree.sub(state.adapter, tree.row(reply.trees["adapter"], k))
                steps = -(-tiny.sizes[int(client[1:])] // tiny.local.batch_size)
                own = before.get(client, tree.zeros_like(state.control))
                wanted = tree.add(
                    tree.sub(own, state.control), tree.scale(moved, 1 / (steps * tiny.local.lr))
                )
                found = federation.memory()[client]["control"]
                apart = max(float((found[n] - x).abs().max()) for n, x in wanted.items())
                assert apart < 1e-5
        assert sum(map(len, replies)) == 4
        state = strategy.receive(state, iter(replies))


def test_variates_are_gradients_under_any_optimizer() -> None:
    """Under AdamW the move over steps and learning rate is no gradient; the variate still is."""
    tiny = Tiny(local=Local(optimizer="adamw", lr=1e-6, batch_size=100))
    strategy = Scaffold()
    federation = tiny.federation(strategy)
    state = strategy.init(tiny.problem)
    sent = strategy.send(state, 1, tuple(federation.clients()))
    list(federation.run(1, sent))

    class Probe(Scaffold):
        def train(self, messages, cohort):  # type: ignore[no-untyped-def]
            return messages.reply(
                {"adapter": cohort.gradients(messages.trees["adapter"])}, weight=cohort.weights
            )

    (reply,) = tiny.federation(Probe()).run(1, sent)
    assert isinstance(reply, Messages)
    for k, client in enumerate(reply.clients):
        control = federation.memory()[client]["control"]
        apart = tree.sub(control, tree.row(reply.trees["adapter"], k))
        assert tree.norm(apart) <= 1e-5 * tree.norm(control)


def test_a_gradient_that_overflowed_is_left_out() -> None:
    """Under fp16 the optimizer skips such a step; the variate must not become Inf."""
    toy = make(1)
    sent = Scaffold().send(Scaffold().init(toy.problem()), 1, toy.clients)
    cohort = toy.cohort(toy.clients)
    plain, calls = cohort.gradients, 0

    def broken(at: tree.Tree, *, fixed: tree.Tree | None = None, **seams: None) -> tree.Tree:
        nonlocal calls
        calls += 1
        assert not any(seams.values()), "plain training"
        return tree.scale(plain(at, fixed=fixed), float("inf") if calls == 1 else 1.0)

    cohort.gradients = broken  # type: ignore[method-assign]
    Scaffold().train(sent, cohort)
    kept = toy.memory[toy.clients[0]]["control"]
    assert all(bool(torch.isfinite(x).all()) for x in kept.values())


@pytest.mark.parametrize("lr", [0.0, -1.0, float("inf")])
def test_a_step_size_out_of_range_is_refused_by_name(lr: float) -> None:
    with pytest.raises(FedpeftError, match=r"strategy\.lr="):
        Scaffold(lr)
