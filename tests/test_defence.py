"""Robust rules and attacks at the seam: what the rules make of a whole federation's updates."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpeft.attacks.settings import Attack
from fedpeft.attacks.tampering import attackers, tamper
from fedpeft.config import Local, Rounds
from fedpeft.data.examples import Examples
from fedpeft.defence import Attackers, RobustRule, start_of
from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.evaluate import score
from fedpeft.message import Messages
from fedpeft.prepare import Prepared
from fedpeft.robust.rules import combine
from fedpeft.robust.settings import Robust, Rule
from tests.privacy.federated import STEP, flat, play, prepared_of, recipe_of, replies_of
from tests.tiny import tiny_population

SIZES = (5, 9, 3, 12, 7, 8, 6)
NAMES = [f"c{k}" for k in range(len(SIZES))]


def updates_of(prepared: Prepared) -> Tensor:
    """The clients' updates by hand, in the order of names: ``[K, P]``."""
    plain = dataclasses.replace(
        prepared, recipe=dataclasses.replace(prepared.recipe, robust=Robust())
    )
    [reply] = replies_of(plain, NAMES)
    start, sent = prepared.network.initial, reply.trees["adapter"]
    rows = [(sent[n].double() - start[n].double()).flatten(1) for n in sorted(start)]
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize(
    "settings",
    [
        Robust("norm_clip", clip_norm=0.05),
        Robust("median", attackers=2),
        Robust("trimmed_mean", trim=0.2),
        Robust("krum", attackers=2),
        Robust("multi_krum", attackers=1),
        Robust("bulyan", attackers=1),
        Robust("geometric_median"),
    ],
    ids=lambda own: own.rule,
)
def test_a_round_moves_by_what_the_rule_makes_of_the_updates(settings: Robust) -> None:
    prepared = prepared_of(recipe_of(robust=settings), SIZES)
    rows = updates_of(prepared)
    wanted = combine(settings, rows, torch.ones(len(rows), dtype=torch.float64))
    states, reports = play(prepared, 1)
    moved = flat(states[1].adapter) - flat(states[0].adapter)
    assert reports[0].replied == len(SIZES)
    assert float((moved - wanted).norm() / wanted.norm()) < 1e-5
    assert float((moved - rows.mean(0)).norm() / wanted.norm()) > 1e-3  # and not by the mean


def test_products_are_compared_where_asked_for() -> None:
    """Krum's distances by brute force: of s B A by layer, and of the head."""
    settings = Robust("krum", attackers=2, space="product")
    prepared = prepared_of(recipe_of(robust=settings), SIZES)
    plain = dataclasses.replace(prepared, recipe=recipe_of())
    [reply] = replies_of(plain, NAMES)
    own, scaling = reply.trees["adapter"], prepared.network.scaling
    parts = [own[n].double().flatten(1) for n in sorted(own) if "lora_" not in n]
    for layer, s in scaling.items():
        a, b = (own[f"{layer}.lora_{x}.default.weight"].double() for x in "AB")
        parts.append((s * b @ a).flatten(1))
    whole = torch.cat(parts, dim=1)
    apart = (whole[:, None] - whole[None]).square().sum(2)
    wanted = combine(settings, updates_of(prepared), None, None, apart)
    states, _ = play(prepared, 1)
    moved = flat(states[1].adapter) - flat(states[0].adapter)
    assert float((moved - wanted).norm() / wanted.norm()) < 1e-5


def test_products_that_replies_do_not_hold_are_refused() -> None:
    """FFA-LoRA sends B alone."""
    settings = Robust("krum", attackers=2, space="product")
    prepared = prepared_of(recipe_of("ffa_lora", robust=settings), SIZES)
    with pytest.raises(
        FedpeftError, match=r"both factors of every layer: set robust\.space=factors"
    ):
        play(prepared, 1)


def test_weights_are_heard_where_the_rule_hears_them() -> None:
    settings = Robust("geometric_median", weighted=True)
    rounds = Rounds(count=3, weighting="examples")
    prepared = prepared_of(recipe_of(robust=settings, rounds=rounds), SIZES)
    wanted = combine(settings, updates_of(prepared), torch.tensor(SIZES, dtype=torch.float64))
    states, _ = play(prepared, 1)
    moved = flat(states[1].adapter) - flat(states[0].adapter)
    assert float((moved - wanted).norm() / wanted.norm()) < 1e-5


def test_too_few_updates_are_no_round() -> None:
    prepared = prepared_of(recipe_of(robust=Robust("krum", attackers=3)), SIZES)
    with pytest.raises(QuorumError, match="needs at least 9 updates, there are 7"):
        play(prepared, 1)


def test_nobodys_replies_are_nobodys_update() -> None:
    sent = Messages.broadcast(["a"], {"t": {"x": torch.ones(2)}})
    assert not list(RobustRule(Robust("median")).enter([sent], {"t": {"x": torch.ones(2)}}, []))


def public(rows: int = 9) -> Examples:
    return tiny_population((rows,), held=0, seed=5).examples


def test_fltrust_trains_its_root_on_the_servers_examples_alone() -> None:
    settings = Robust("fltrust")
    people = dataclasses.replace(tiny_population(SIZES), public=public())
    prepared = prepared_of(recipe_of(robust=settings, local=STEP), population=people)
    rows = updates_of(prepared)
    # the root by hand: a federation whose only client holds the server's examples
    server = prepared_of(recipe_of(local=STEP), population=tiny_population((9,), held=0, seed=5))
    start = prepared.network.initial
    sent = prepared.strategy.send(prepared.strategy.init(prepared.problem), 1, ["server"])
    root = prepared._root(sent).trees["adapter"]
    [alone] = replies_of(server, ["c0"])
    moved = flat({n: root[n][0].double() - start[n] for n in start})
    other = flat({n: alone.trees["adapter"][n][0].double() - start[n] for n in start})
    assert float((moved - other).norm() / other.norm()) < 1e-5
    wanted = combine(settings, rows, None, moved)
    states, _ = play(prepared, 1)
    assert float((flat(states[1].adapter) - flat(start) - wanted).norm() / wanted.norm()) < 1e-5


def test_fltrust_without_examples_of_the_server_says_so() -> None:
    prepared = prepared_of(recipe_of(robust=Robust("fltrust")), SIZES)
    with pytest.raises(FedpeftError, match=r"name a split that it owns with data\.public"):
        play(prepared, 1)


def test_clients_must_be_sent_the_same() -> None:
    other = Messages(("a", "b"), {"t": {"x": torch.tensor([[1.0], [2.0]])}})
    same = Messages.broadcast(["a", "b"], {"t": {"x": torch.ones(1)}})
    for sent in ([other], [same, same]):
        with pytest.raises(FedpeftError, match="need a strategy that sends all clients the same"):
            start_of(sent)
    assert start_of([same]).clients == ("a",)


# -- attacks


ATTACKS: list[dict[str, Any]] = [
    {"kind": "sign_flip"},
    {"kind": "scaling", "factor": 3.0},
    {"kind": "gaussian"},
    {"kind": "little_is_enough", "z": 1.5},
    {"kind": "backdoor", "trigger": (3,)},
]


@pytest.mark.parametrize("given", ATTACKS, ids=lambda own: str(own["kind"]))
def test_only_the_attackers_rows_change_and_by_the_attack(given: dict[str, Any]) -> None:
    attack = Attack(share=0.3, **given)
    bad = attackers(attack, NAMES, 0)
    assert len(bad) == 2
    prepared = prepared_of(recipe_of(), SIZES)
    sent = prepared.strategy.send(prepared.strategy.init(prepared.problem), 1, NAMES)
    [reply] = replies_of(prepared, NAMES)
    parts = [reply.rows([0, 1, 2]), reply.rows([3, 4, 5, 6])]
    like = prepared.strategy.expects(sent[0])
    found = list(Attackers(attack, bad, 0).enter([sent], like, iter(parts)))
    assert [stack.clients for stack in found] == [part.clients for part in parts]
    start = prepared.network.initial
    rows = updates_of(prepared)
    which = [k for k, name in enumerate(NAMES) if name in bad]
    wanted = rows.clone()
    wanted[which] = tamper(attack, rows[which], [NAMES[k] for k in which], 7, 0, 1)
    got = torch.cat(
        [
            torch.cat(
                [(s.trees["adapter"][n].double() - start[n]).flatten(1) for n in sorted(start)], 1
            )
            for s in found
        ]
    )
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5
    honest = [k for k in range(7) if k not in which]
    assert float((got[honest] - rows[honest]).abs().max()) < 1e-6
    assert float((got[which] - rows[which]).norm()) > 0.01


def test_label_flips_are_in_the_data_and_not_at_the_seam() -> None:
    prepared = prepared_of(recipe_of(), SIZES)
    sent = prepared.strategy.send(prepared.strategy.init(prepared.problem), 1, NAMES)
    [reply] = replies_of(prepared, NAMES)
    own = Attackers(Attack("label_flip"), frozenset(NAMES), 0)
    [found] = own.enter([sent], prepared.strategy.expects(sent[0]), iter([reply]))
    assert found is reply


def test_noise_of_an_attack_goes_on_after_a_resume() -> None:
    """Which round it is comes back from the checkpoint."""
    own = Attackers(Attack("gaussian"), frozenset(NAMES), 0)
    sent = Messages.broadcast(["a"], {"t": {"x": torch.ones(2)}})
    for _ in range(3):
        list(own.enter([sent], {"t": {"x": torch.ones(2)}}, []))
    again = Attackers(Attack("gaussian"), frozenset(NAMES), 0)
    again.restore(own.memory())
    assert again.rounds == 3
    again.restore({})
    assert again.rounds == 3


def learnt(rule: Rule, kind: str) -> float:
    """Loss on the clients' own training data after 8 rounds, three of nine attacking."""
    people = tiny_population((12,) * 9)
    assert people.examples.labels is not None
    tokens = people.examples.tokens[people.examples.starts[:-1].long()]
    people.examples.labels.copy_((tokens > 25).long())  # something that can be learnt
    people = dataclasses.replace(people, test=people.examples)
    attack = Attack(kind=kind, share=1 / 3, factor=4.0)  # type: ignore[arg-type]
    local = Local(optimizer="adamw", lr=0.02, batch_size=12, epochs=2)
    recipe = recipe_of(robust=Robust(rule), attack=attack, local=local)
    prepared = prepared_of(recipe, population=people)
    states, _ = play(prepared, 8)
    adapter = prepared.strategy.adapter(states[-1])
    return score(prepared.network, prepared.lane, adapter, people.test, {}).loss


def test_sign_flips_break_the_mean_and_not_the_median() -> None:
    honest, mean, median = (
        learnt("none", "none"),
        learnt("none", "sign_flip"),
        learnt("median", "sign_flip"),
    )
    assert honest < 0.95 and median < 0.95  # chance is ln 3 = 1.1
    assert mean > 1.2
