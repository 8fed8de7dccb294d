"""FFA-LoRA against its rule in numpy: exactness, the frozen A, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch

from fedpeft import tree
from fedpeft.engine import play_round
from fedpeft.errors import FedpeftError
from fedpeft.lowrank import lora_pairs
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.ffa_lora import FfaLora, orthonormal_a
from fedpeft.strategy import Messages
from fedpeft.tree import Tree
from tests.strategies.toy import (
    LAYERS,
    Arrays,
    Present,
    Toy,
    a_of,
    arrays,
    b_of,
    equal,
    everyone,
    make,
    play,
    some,
)
from tests.tiny import LOCAL, LORA, Tiny

Start = Literal["kaiming", "orthonormal"]
BOTH = pytest.mark.parametrize("start", ["kaiming", "orthonormal"])
SQUARE = [layer for layer in LAYERS if ".layer.1." in layer]


def frozen(adapter: Tree) -> Tree:
    return tree.select(adapter, lambda name: "lora_A" in name)


def oracle(toy: Toy, rounds: int, present: Present, a: Arrays) -> Arrays:
    """B_k and the head by SGD under the given A, then their weighted mean."""
    w = {**arrays(toy.initial), **a}
    for t in range(1, rounds + 1):
        names = list(present(t, toy.clients))
        total = sum(toy.weights[c] for c in names)
        mean = {name: 0.0 * value for name, value in w.items() if name not in a}
        for client in names:
            own = {name: value.copy() for name, value in w.items()}
            for _ in range(toy.steps[client]):
                gradient = toy.gradient(client, own)
                own = {**a, **{n: own[n] - toy.lr * gradient[n] for n in mean}}
            mean = {n: mean[n] + toy.weights[client] / total * own[n] for n in mean}
        w = {**mean, **a}
    return w


@BOTH
@pytest.mark.parametrize("present", [everyone, some])
def test_three_rounds_equal_the_rule_in_numpy(start: Start, present: Present) -> None:
    toy, strategy = make(), FfaLora(start)
    states = play(strategy, toy, 3, present, size=2).states
    a = arrays(frozen(strategy.adapter(states[0])))
    for rounds in (1, 2, 3):
        adapter = strategy.adapter(states[rounds])
        expected = oracle(toy, rounds, present, a)
        assert adapter.keys() == expected.keys()
        for name, value in expected.items():
            assert abs(adapter[name].numpy() - value).max() <= 1e-12


@BOTH
def test_the_update_of_the_mean_is_the_mean_of_the_updates(start: Start) -> None:
    """FA1, for unequal weights and s != 1; FedAvg's factors fail the same test."""
    for strategy, exact in ((FfaLora(start), True), (FedAvg(), False)):
        toy = make()
        played = play(strategy, toy, 2)
        weight = played.replies[-1].scalars["weight"]
        for layer in LAYERS:
            own = torch.stack([toy.update(toy.trained[c], layer) for c in toy.clients])
            ideal = torch.einsum("k,kij->ij", weight / weight.sum(), own)
            obtained = toy.update(strategy.adapter(played.states[-1]), layer)
            error = float((obtained - ideal).norm() / ideal.norm())
            assert error <= 1e-14 if exact else error > 1e-4


@BOTH
def test_a_is_bit_identical_on_all_clients_and_in_all_rounds(start: Start) -> None:
    """FA2."""
    toy, strategy = make(dtype=torch.float32), FfaLora(start)
    first = frozen(strategy.adapter(strategy.init(toy.problem())))
    played = play(strategy, toy, present=some, size=2)
    for state in played.states:
        assert equal(frozen(strategy.adapter(state)), first)
    for client in toy.clients:
        assert equal(frozen(toy.trained[client]), first)


def test_the_result_depends_on_the_scaling_only_through_the_learning_rate() -> None:
    """FA3: under SGD (s, lr) and (c s, lr / c^2) give the same updates."""
    toy, other = make(), make()
    c = 4.0
    other.scaling = {layer: c * s for layer, s in toy.scaling.items()}
    other.lr = toy.lr / c**2
    one, two = (FfaLora().adapter(play(FfaLora(), t).states[-1]) for t in (toy, other))
    for layer in LAYERS:
        apart = toy.update(one, layer) - other.update(two, layer)
        assert float(apart.norm()) <= 1e-14 < float(toy.update(one, layer).norm())


def clipped_update(factor: float, bound: float, per: Literal["client", "example"]) -> Tree:
    """dW by layer after two rounds of the real engine, s = factor, lr and clip norm to match it."""
    adapter = {**LORA, "lora_alpha": 2.0 * factor, "head": "frozen"}
    local = replace(LOCAL, lr=1e8 / factor**2, clip_norm=bound * factor, clip_per=per)
    tiny = Tiny(adapter=adapter, local=local)
    strategy, state = FfaLora(), FfaLora().init(tiny.problem)
    for number in (1, 2):
        state, _ = play_round(strategy, state, tiny.federation(strategy), tiny.rounds, 0, number)
    final, scaling = strategy.adapter(state), tiny.problem.scaling
    assert set(scaling.values()) == {factor}
    pairs = lora_pairs(final, "ffa_lora").items()
    return {layer: scaling[layer] * final[b] @ final[a] for layer, (a, b) in pairs}


@pytest.mark.parametrize("per", ["client", "example"])
def test_scale_rate_and_clip_norm_are_one_setting(per: Literal["client", "example"]) -> None:
    """FA3 with clipping: (s, lr, C) and (c s, lr / c^2, c C) are the same; the head is frozen."""
    one, two = clipped_update(1.0, 1e-11, per), clipped_update(3.0, 1e-11, per)
    loose = clipped_update(1.0, 1e3, per)
    for layer, update in one.items():
        size = float(update.norm())
        assert size > 0 and float((update - two[layer]).norm()) < 1e-4 * size
        assert float((update - loose[layer]).norm()) > 0.1 * size, "nothing was clipped"


def test_updates_stay_in_the_row_space_of_a() -> None:
    """FA4."""
    toy, strategy = make(), FfaLora()
    adapter = strategy.adapter(play(strategy, toy).states[-1])
    for layer in LAYERS:
        update, a = toy.update(adapter, layer), adapter[a_of(layer)]
        outside = update - update @ torch.linalg.pinv(a) @ a
        assert float(outside.norm()) <= 1e-13 < float(update.norm())


def test_a_is_absent_from_every_message_and_eight_bytes_stand_for_it() -> None:
    """FA5."""
    toy = make()
    played = play(FfaLora(), toy)
    for messages in played.sent + played.replies:
        assert not frozen(messages.trees["adapter"])
        assert messages.trees["adapter"].keys() == toy.initial.keys() - frozen(toy.initial).keys()
    for sent in played.sent:
        assert all(len(seed) == 8 for seed in sent.blobs["seed"])
    b = sum(toy.initial[b_of(layer)].numel() for layer in LAYERS)
    sent_up = tree.numel(tree.row(played.replies[0].trees["adapter"], 0))
    assert sent_up == b + 15, "B of all layers and the head of 12 + 3 numbers"


def test_clients_with_different_seeds_are_an_error() -> None:
    toy, strategy = make(2), FfaLora()
    sent = [
        strategy.send(strategy.init(toy.problem(seed=seed)), 1, toy.clients)[0] for seed in (1, 2)
    ]
    mixed = Messages.stack(toy.clients, sent)
    with pytest.raises(ValueError, match="unpack"):
        strategy.train(mixed, toy.cohort(toy.clients))


@BOTH
def test_layers_and_runs_have_their_own_a(start: Start) -> None:
    """Layers of equal shape included; the run's seed decides, and nothing else."""
    toy, strategy = make(), FfaLora(start)
    one, again, other = (
        frozen(strategy.adapter(strategy.init(toy.problem(seed=seed)))) for seed in (1, 1, 2)
    )
    assert equal(one, again)
    for name, tensor in one.items():
        assert float((tensor - other[name]).norm()) > 0.1
        assert float((tensor - toy.initial[name]).norm()) > 0.1
    left, right = (one[a_of(layer)] for layer in SQUARE)
    assert left.shape == right.shape and float((left - right).norm()) > 0.1


def wide(start: Start, r: int, d_in: int) -> torch.Tensor:
    name = a_of("layer")
    initial = {name: torch.zeros(r, d_in), b_of("layer"): torch.zeros(3, r)}
    toy = make()
    toy.initial = initial
    return FfaLora(start).init(toy.problem()).frozen[name]


def test_kaiming_is_uniform_with_pefts_bound() -> None:
    a = wide("kaiming", 64, 400)
    bound = 1 / math.sqrt(400)
    assert a.dtype == torch.float32
    assert 0.999 * bound < float(a.abs().max()) <= bound
    assert float(a.mean()) == pytest.approx(0.0, abs=0.01 * bound)
    assert float(a.square().sum()) == pytest.approx(64 / 3, rel=0.02), "E ||A||^2 = r / 3"


def test_orthonormal_rows_are_orthonormal_and_unbiased() -> None:
    """Uniform over all such A only if the triangular factor's diagonal is positive."""
    for r, d_in in ((8, 8), (8, 64), (1, 5)):
        a = orthonormal_a(torch.Size((r, d_in)), torch.Generator().manual_seed(r))
        assert torch.allclose(a @ a.T, torch.eye(r, dtype=torch.float64), atol=1e-13)
        stream = torch.Generator().manual_seed(r)
        upper = a @ torch.randn(d_in, r, generator=stream, dtype=torch.float64)
        assert float(upper.tril(-1).abs().max()) <= 1e-13
        assert bool((upper.diagonal() > 0).all())


def test_the_generator_of_a_is_fixed() -> None:
    """A seed stands for A only while the generator stays: these are its first numbers."""
    first = [-0.01616, -0.468041, -0.183338, 0.268173]
    assert wide("kaiming", 1, 4).tolist()[0] == pytest.approx(first, abs=1e-6)
    first = [-0.146676, 0.014944, -0.402263, 0.903575]
    assert wide("orthonormal", 1, 4).tolist()[0] == pytest.approx(first, abs=1e-6)


def test_more_rows_than_entries_cannot_be_orthonormal() -> None:
    with pytest.raises(FedpeftError, match=r"init_a='orthonormal'.*adapter\.r=5.*at most 4"):
        wide("orthonormal", 5, 4)
    assert wide("kaiming", 5, 4).shape == (5, 4)


@pytest.mark.parametrize(
    "extra", ["layer.lora_magnitude_vector.default.weight", "layer.lora_embedding_A.default", None]
)
def test_adapters_that_are_not_plain_lora_are_refused(extra: str | None) -> None:
    toy = make(lora=extra is not None)
    if extra is not None:
        toy.initial[extra] = torch.ones(2, 2)
    match = rf"has '{extra}'" if extra else "has neither"
    with pytest.raises(FedpeftError, match=rf"ffa_lora.*{match}.*adapter\.kind=lora"):
        FfaLora().init(toy.problem())


def test_an_adapter_that_does_not_start_from_zero_is_refused() -> None:
    toy = make()
    name = b_of(SQUARE[0])
    toy.initial[name] = torch.ones_like(toy.initial[name])
    with pytest.raises(FedpeftError, match=r"B must start from zero.*lora_B.*adapter\.start"):
        FfaLora().init(toy.problem())
