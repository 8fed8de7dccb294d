"""LoRA-A2 against its rule in numpy: which ranks a client chooses, and what travels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft import tree
from fedpeft.comms.ledger import message_bytes
from fedpeft.config import Local
from fedpeft.errors import FedpeftError
from fedpeft.strategies.lora_a2 import LoraA2, as_rows, from_rows
from fedpeft.strategies.rolora import RoLoRA
from fedpeft.strategy import Messages
from tests.strategies.oracle import average, close, dense, ideal, off, sgd, shares
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
from tests.tiny import Tiny

RANKS = sum(r for _, r, _, _ in LAYERS.values())


def chosen(toy: Toy, client: str, w: Arrays, by_b: bool, count: int) -> dict[str, np.ndarray]:
    """Masks of the ``count`` ranks of largest ||s dX O||_F, the dense norms, over all layers."""
    gradient, scored = toy.gradient(client, w), []
    for layer, (_, r, _, s) in LAYERS.items():
        for i in range(r):
            b = (gradient if by_b else w)[b_of(layer)][:, i]
            a = (w if by_b else gradient)[a_of(layer)][i]
            scored.append((float(np.linalg.norm(s * np.outer(b, a))), layer, i))
    masks = {layer: np.zeros(r) for layer, (_, r, _, _) in LAYERS.items()}
    for _, layer, i in sorted(scored)[-count:]:
        masks[layer][i] = 1.0
    return masks


def oracle(toy: Toy, rounds: int, present: Present, rank: int) -> Arrays:
    w = arrays(toy.initial)
    for t in range(1, rounds + 1):
        names, by_b, ends = list(present(t, toy.clients)), t % 2 == 1, []
        trained = [n for n in w if ("lora_A" if by_b else "lora_B") not in n]
        for c in names:
            masks = chosen(toy, c, w, by_b, min(rank * len(LAYERS), RANKS))

            def masked(g: Arrays, masks: dict[str, np.ndarray] = masks) -> Arrays:
                of_b = {b_of(x): g[b_of(x)] * m[None, :] for x, m in masks.items()}
                of_a = {a_of(x): g[a_of(x)] * m[:, None] for x, m in masks.items()}
                return g | of_b | of_a

            ends.append(sgd(toy, c, w, trained, masked))
        w = average(ends, shares(toy, names))
    return w


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_four_rounds_equal_the_rule_in_numpy(present: Present, rank: int) -> None:
    toy = make()
    states = play(LoraA2(rank), toy, 4, present, size=2).states
    for rounds in (1, 2, 3, 4):
        assert close(states[rounds].adapter, oracle(make(), rounds, present, rank))


@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_every_round_is_exact(rounds: int) -> None:
    """A2-4."""
    toy = make()
    played = play(LoraA2(1), toy, rounds, some)
    found = dense(toy, arrays(played.states[-1].adapter))
    assert off(found, ideal(toy, played.sent[-1].clients)) <= 1e-14


@pytest.mark.parametrize("rank", [3, 50])
def test_with_all_ranks_it_is_rolora(rank: int) -> None:
    """A2-3."""
    one, two = (play(s, make(), 4, some).states[-1].adapter for s in (LoraA2(rank), RoLoRA()))
    assert close(one, arrays(two), 1e-14)


def test_what_was_not_chosen_stays_as_sent_whatever_the_optimizer_does() -> None:
    """A2-1, where weight decay moves entries without a gradient."""
    local = Local(optimizer="adamw", lr=0.1, weight_decay=0.5, batch_size=4)
    tiny, strategy = Tiny(local=local), LoraA2(1)
    federation = tiny.federation(strategy)
    state = strategy.init(tiny.problem)
    for number in (1, 2, 3):
        names = tuple(federation.clients())
        replies = [
            r
            for r in federation.run(number, strategy.send(state, number, names))
            if isinstance(r, Messages)
        ]
        own = tree.row(strategy._dense(state, replies[0]), 0)
        after = strategy.receive(state, iter([replies[0].rows([0])]))
        lora = [n for n in own if "lora" in n]
        touched = sum(int((own[n] != 0).any(0 if "lora_B" in n else 1).sum()) for n in lora)
        assert touched == len(lora), "one rank per layer of two, on average"
        for name in lora:
            same = own[name] == 0
            assert torch.equal(after.adapter[name][same], state.adapter[name][same])
        state = strategy.receive(state, iter(replies))


def test_a_reply_holds_the_chosen_ranks_and_their_numbers() -> None:
    toy = make()
    played = play(LoraA2(1), toy, 2)
    wide = [max(sizes) for sizes in zip(*((o, i) for o, _, i, _ in LAYERS.values()), strict=True)]
    heads = {n for n in toy.initial if "lora_" not in n}
    for reply, letter, width in zip(played.replies, "BA", wide, strict=True):
        assert reply.trees.keys() == {letter}
        assert reply.trees[letter].keys() == {"index", "move"} | heads
        ranks = reply.trees[letter]
        assert ranks["index"].shape == (5, len(LAYERS)) and ranks["index"].dtype == torch.int32
        assert ranks["move"].shape == (5, len(LAYERS), width)
        assert bool((ranks["index"].diff(dim=1) > 0).all()), "each once, in order"
    assert len({tuple(own.tolist()) for own in played.replies[0].trees["B"]["index"]}) > 1


def test_few_ranks_of_many_cost_little() -> None:
    """A rank of 8 per layer to choose 1 from: an eighth of RoLoRA's adapter bytes, and numbers."""
    tiny = Tiny(adapter={"kind": "lora", "r": 8, "target_modules": ["query", "value"]})
    up = []
    for strategy in (LoraA2(1), RoLoRA()):
        sent = strategy.send(strategy.init(tiny.problem), 1, ("c0", "c1"))
        (reply,) = tiny.federation(strategy).run(1, sent)
        assert isinstance(reply, Messages)
        trees = {part: own for part, own in reply[0].trees.items() if part != "heads"}
        up.append(
            sum(x.nbytes for own in trees.values() for n, x in own.items() if "class" not in n)
        )
        assert sum(message_bytes(reply[0]).values()) > 0
    assert up[0] == 2 * 4 + up[1] / 8, "two numbers, and 2 of 16 columns"


def test_a_number_out_of_range_ends_no_run() -> None:
    toy, strategy = make(), LoraA2(1)
    state = strategy.init(toy.problem())
    reply = strategy.train(strategy.send(state, 1, toy.clients), toy.cohort(toy.clients))
    bad = {**reply.trees["B"], "index": reply.trees["B"]["index"] + 10_000}
    forged = reply.reply({**reply.trees, "B": bad}, **reply.scalars)
    after = strategy.receive(state, iter([forged])).adapter
    assert all(bool(torch.isfinite(x).all()) for x in after.values())


def test_rows_of_ranks_go_back_to_their_layers() -> None:
    toy = make()
    for part in ("lora_A", "lora_B"):
        x = {n: torch.randn(2, *v.shape) for n, v in toy.initial.items() if part in n}
        again = from_rows(as_rows(x), {n: v[0] for n, v in x.items()})
        assert all(torch.equal(again[n], v) for n, v in x.items())


def test_no_rank_at_all_is_refused_by_name() -> None:
    with pytest.raises(FedpeftError, match=r"strategy\.rank=0"):
        LoraA2(0)
