"""The usual mistakes of private federated learning, one test or one named refusal for each.

The sentence that a test is about is the first of its docstring. What another file tests at length
is tested here by the case that matters.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus.accountants import RDPAccountant
from scipy.stats import beta

from fedpeft.config import Evaluation, Local, Privacy, Recipe, Rounds, Sampling, SecureAggregation
from fedpeft.config_privacy import check_privacy
from fedpeft.errors import FedpeftError
from fedpeft.privacy.accountants import epsilon
from fedpeft.privacy.compatibility import check_compatible, record_level
from fedpeft.privacy.events import Gaussian, Repeated, SampledGaussian, flatten
from fedpeft.privacy.guard import Guard
from fedpeft.privacy.ledger import Budget, Ledger
from fedpeft.privacy.randomness import Randomness
from fedpeft.privacy.record_level import NoisySteps
from fedpeft.privacy.terms import Terms, terms_of
from fedpeft.strategy import Messages, available, build
from tests.privacy.federated import (
    STEP,
    flat,
    mechanism_of,
    play,
    prepared_of,
    recipe_of,
    replies_of,
    seeded,
)

RECORD = Privacy("record", noise_multiplier=1.0, delta=1e-3)
CLIENT = Privacy("client", noise_multiplier=1.0, delta=1e-3)
SIZES = np.array([40, 40, 10, 40])


def terms(recipe: Recipe, exchanges: int = 1) -> Terms:
    found = terms_of(recipe, SIZES, exchanges)
    assert found is not None
    return found


def update(reply: Messages, start: dict[str, torch.Tensor], k: int = 0) -> torch.Tensor:
    return flat({n: v[k].double() - start[n].double() for n, v in reply.trees["adapter"].items()})


@pytest.mark.parametrize("privacy", [RECORD, CLIENT], ids=["record", "client"])
def test_delta_is_not_one_over_the_number_of_batches(privacy: Privacy) -> None:
    """Delta = 1 / #batches; delta >= 1 / n."""
    units = int(SIZES.sum()) if privacy.unit == "record" else len(SIZES)
    for delta in (1 / 4, 1 / 3, 1 / units):
        with pytest.raises(FedpeftError, match="below one over the number of"):
            terms(recipe_of(privacy=dataclasses.replace(privacy, delta=max(delta, 1 / units))))


def test_the_epsilon_of_one_round_or_of_one_client_is_not_the_total(tmp_path: Path) -> None:
    """Epsilon of one round / one client printed as total."""
    recipe = recipe_of(privacy=RECORD, local=Local(batch_size=10))
    guard = Guard(terms(recipe), tmp_path / "privacy.jsonl", recipe)
    sizes = {"a": 40, "b": 10}
    guard.admit(1, sizes)
    once = guard.statement().epsilon
    guard.admit(2, sizes)
    twice = guard.statement().epsilon
    guard.close()
    assert twice[0] > 1.2 * once[0]
    assert once[0] > once[2]  # the worst client's


@pytest.mark.parametrize(
    ("name", "settings"),
    [("fed_sb", {"start": "gradients"}), ("lora_a2", {})],
)
def test_a_start_from_the_clients_data_is_refused(name: str, settings: dict[str, Any]) -> None:
    """Data-dependent init (Fed-SB gradient, LoRA-A2 probe) uncharged."""
    with pytest.raises(FedpeftError, match="which no noise covers"):
        check_compatible(recipe_of(name, privacy=RECORD), build(name, settings))
    for start in ("random", "public", "weights"):
        check_compatible(recipe_of("fed_sb", privacy=RECORD), build("fed_sb", {"start": start}))


def test_pruning_and_calibration_see_what_is_noised() -> None:
    """HetLoRA's prune: by what a client trained, of which every step is noised."""
    assert not record_level(build("hetlora", {}))
    prepared = prepared_of(recipe_of("hetlora", privacy=RECORD))
    assert prepared.strategy.asks() == frozenset()


def test_clipping_is_per_example_and_not_per_batch() -> None:
    """Per-batch instead of per-sample clipping: two equal examples add twice one's gradient."""
    privacy = Privacy("record", noise_multiplier=1e-9, clip_norm=0.5)
    prepared = prepared_of(recipe_of(privacy=privacy, local=STEP), (6,))
    [reply] = replies_of(prepared, ["c0"])
    total = update(reply, prepared.network.initial) * 6
    assert 0.5 * 1.5 < float(total.norm()) <= 6 * 0.5


def test_the_bound_does_not_follow_private_norms_for_free() -> None:
    """Clip threshold chosen from private norms: an adapting bound takes a share of the noise."""
    rounds = Rounds(count=3, weighting="equal", sampling=Sampling("uniform"))
    adaptive = dataclasses.replace(CLIENT, noise_multiplier=0.2, adaptive=True)
    found = terms(recipe_of(privacy=adaptive, rounds=rounds))
    own = found.mechanism
    assert found.event(1) == Gaussian(0.2)  # accounted with the bits in it
    assert not isinstance(own, type(mechanism_of(prepared_of(recipe_of(privacy=RECORD)))))
    level = prepared_of(recipe_of(privacy=adaptive, rounds=rounds)).level
    assert level is not None and level.adaptive is not None
    size = 40_000
    noise = level._noise(size)
    share = 0.2 / math.sqrt(1 - (0.2 / (2 * level.adaptive.bits_std)) ** 2)
    assert share > 1.1 * 0.2
    assert float(noise.std()) == pytest.approx(share, rel=0.02)


def test_noise_comes_after_the_clip() -> None:
    """Noise before clip: what leaves a client may be far longer than the bound."""
    local = dataclasses.replace(CLIENT, noise="client", noise_multiplier=10.0, clip_norm=0.01)
    [reply] = replies_of(prepared_of(recipe_of(privacy=local)), ["c0"])
    assert float(flat({n: v[0] for n, v in reply.trees["adapter"].items()}).norm()) > 0.1


def test_the_expected_batch_is_below_and_not_the_realised_one() -> None:
    """Dividing by realised batch."""
    steps = NoisySteps(1e-12, torch.ones(1), torch.tensor([4.0]), Randomness.seeded(0))
    for came in (1.0, 9.0):  # so many examples, each of clipped gradient one
        found = steps.release(torch.full((1, 3), came), np.array([0]))
        assert torch.allclose(found, torch.full((1, 3), came / 4))


def test_clients_do_not_weigh_by_their_examples() -> None:
    """n_k-weighted average with sensitivity S / m."""
    recipe = recipe_of(privacy=CLIENT, rounds=Rounds(count=3, weighting="examples"))
    with pytest.raises(FedpeftError, match=r"Set rounds\.weighting=equal"):
        check_privacy(recipe)


def test_what_stays_with_a_client_is_noised_too() -> None:
    """Noising only what is uploaded while local state is un-noised (FedSA)."""
    prepared = seeded(prepared_of(recipe_of("fedsa_lora", privacy=RECORD)), 1)
    federation = prepared.federation()
    strategy = prepared.strategy
    sent = strategy.send(strategy.init(prepared.problem), 1, ["c0"])
    kept = []
    for seed in (1, 2):
        seeded(prepared, seed)
        federation.restore({})
        list(federation.run(1, sent))
        memory = federation.memory()["c0"]
        kept.append({n: v for tree in memory.values() for n, v in tree.items()})
    assert any("lora_B" in name for name in kept[0])
    assert all(not torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


@pytest.mark.parametrize("name", ["fedavg", "ffa_lora", "fed_sb"])
def test_the_head_is_not_outside_the_clipped_set(name: str) -> None:
    """Head or LayerNorm trained outside the clipped set: all that moves, moves by C at most."""
    privacy = Privacy("record", noise_multiplier=1e-9, clip_norm=0.5)
    prepared = prepared_of(recipe_of(name, privacy=privacy, local=STEP), (1,))
    strategy = prepared.strategy
    state = strategy.init(prepared.problem)
    sent = strategy.send(state, 1, ["c0"])
    [reply] = replies_of(prepared, ["c0"])
    moved = [
        (value[0].double() - sent.trees[part][n][0].double())
        for part, tree in reply.trees.items()
        for n, value in tree.items()
        if n in sent.trees.get(part, {})
    ]
    assert any("classifier" in n for tree in reply.trees.values() for n in tree)
    assert 0.1 < math.sqrt(sum(float(x.square().sum()) for x in moved)) <= 0.5 * (1 + 1e-5)


def test_the_fraction_of_clients_amplifies_nothing_for_records() -> None:
    """q . frac "amplification"; expected participation."""
    for sampling in (Sampling("uniform", fraction=0.5), Sampling("poisson", rate=0.5)):
        rounds = Rounds(count=8, weighting="equal", sampling=sampling)
        found = terms(recipe_of(privacy=RECORD, rounds=rounds, local=Local(batch_size=10)))
        assert flatten(found.event(40)) == {(0.25, 1.0): 4}
        assert found.rounds == 8  # and not the four that are expected


def test_a_sample_of_fixed_size_amplifies_nothing() -> None:
    """Replace-one vs add/remove mix-up: a sample without replacement is no Poisson sample."""
    for kind in ("uniform", "fixed"):
        sampling = Sampling(kind, fraction=0.25, size=1)  # type: ignore[arg-type]
        rounds = Rounds(count=8, weighting="equal", sampling=sampling)
        assert terms(recipe_of(privacy=CLIENT, rounds=rounds)).event(1) == Gaussian(1.0)
    drawn = Rounds(count=8, weighting="equal", sampling=Sampling("poisson", rate=0.25))
    poisson = terms(recipe_of(privacy=CLIENT, rounds=drawn))
    assert poisson.event(1) == SampledGaussian(0.25, 1.0)


def test_local_noise_is_for_a_replacement() -> None:
    """Replace-one vs add/remove: an update that a client noises can become any other, 2 S."""
    local = dataclasses.replace(CLIENT, noise="client", noise_multiplier=3.0, clip_norm=0.5)
    prepared = prepared_of(recipe_of(privacy=local))
    [reply] = replies_of(prepared, ["c0", "c1", "c2", "c3"])
    noise = torch.cat([v.flatten() for v in reply.trees["adapter"].values()])
    wide = 4 / math.sqrt(2 * noise.numel())
    assert float(noise.std()) == pytest.approx(2 * 3.0 * 0.5, rel=wide)


def test_the_clip_is_flat_over_all_layers() -> None:
    """Per-layer clipping with C each but accounting for C total (sensitivity C sqrt(L))."""
    privacy = Privacy("record", noise_multiplier=1e-9, clip_norm=0.5)
    prepared = prepared_of(recipe_of(privacy=privacy, local=STEP), (1,))
    [reply] = replies_of(prepared, ["c0"])
    start = prepared.network.initial
    norms = [
        float((v[0].double() - start[n].double()).norm()) for n, v in reply.trees["adapter"].items()
    ]
    assert sum(n > 0 for n in norms) >= 3
    assert math.sqrt(sum(n * n for n in norms)) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("strategy", ["fedavg", {"name": "fedprox", "mu": 5.0}])
def test_decay_and_proximal_terms_are_outside_the_clip(strategy: Any) -> None:
    """Weight decay / prox inside per-sample gradients: they are added to the clipped mean."""
    decay = 0.5 if strategy == "fedavg" else 0.0
    local = dataclasses.replace(STEP, steps=2, weight_decay=decay)
    privacy = Privacy("record", noise_multiplier=1e-9, clip_norm=1e-6)
    prepared = prepared_of(recipe_of(strategy, privacy=privacy, local=local), (5,))
    [reply] = replies_of(prepared, ["c0"])
    start = flat(prepared.network.initial)
    moved = update(reply, prepared.network.initial)
    if decay:  # x (1 - 0.5)^2: gradients as short as that change nothing
        assert float((moved + 0.75 * start).norm() / start.norm()) < 1e-5
    else:  # the first step's 1e-6, and the second's, five times as far back
        assert 1e-6 < float(moved.norm()) < 1e-5


def test_scores_on_private_data_are_named_as_not_covered(tmp_path: Path) -> None:
    """Non-private validation for early stopping / model selection: nothing stops by a score."""
    recipe = recipe_of(privacy=CLIENT, evaluation=Evaluation(every=1))
    guard = Guard(terms(recipe), tmp_path / "privacy.jsonl", recipe)
    text = "\n".join(guard.statement().lines())
    guard.close()
    assert "hold-out scores" in text and "the search for hyper-parameters" in text
    assert not {f.name for f in dataclasses.fields(Evaluation)} & {"patience", "stop", "best"}


def test_batches_are_not_passes_over_shuffled_data() -> None:
    """Shuffled loader with Poisson accountant."""
    prepared = prepared_of(recipe_of(privacy=RECORD, local=Local(batch_size=10, epochs=3)), (40,))
    plan = mechanism_of(prepared).plan(np.arange(40))
    counts = np.bincount(plan[plan >= 0], minlength=40)
    assert len(set((plan >= 0).sum(1).tolist())) > 2  # batches of many sizes
    assert counts.max() > counts.min() + 2  # and not each example three times


def test_noise_is_not_that_of_another_client_round_or_run() -> None:
    """Reusing noise seed across clients / rounds."""
    privacy = Privacy("record", noise_multiplier=1e4)
    noise = []
    for _ in range(2):
        prepared = prepared_of(recipe_of(privacy=privacy, local=STEP), (5, 5))
        start = prepared.network.initial
        for number in (1, 2):
            [reply] = replies_of(prepared, ["c0", "c1"], number)
            noise += [update(reply, start, k).numpy() for k in (0, 1)]
    off = np.corrcoef(np.stack(noise)) - np.eye(8)
    assert np.abs(off).max() < 5 / math.sqrt(noise[0].size)


def test_momentum_costs_nothing() -> None:
    """EMA / momentum are fine (post-processing): they are allowed, and change no event."""
    plain = terms(recipe_of(privacy=RECORD, local=Local(batch_size=10)))
    local = Local(optimizer="sgd", momentum=0.9, batch_size=10)
    assert terms(recipe_of(privacy=RECORD, local=local)).event(40) == plain.event(40)
    for name in ("fedavgm", "fedadam", "fedyogi", "fedadagrad"):
        check_compatible(recipe_of(name, privacy=CLIENT), build(name, {}))


# -- the invariants that are not above


def test_dp4_the_ledger_is_opacus_for_one_client_and_never_falls(tmp_path: Path) -> None:
    """DP4: ledger epsilon monotone, equals Opacus for one client."""
    opacus, found = RDPAccountant(), []
    with Ledger.open(tmp_path / "privacy.jsonl", Budget(math.inf, 1e-5, "rdp")) as ledger:
        for round_ in range(1, 5):
            ledger.charge(round_, {"a": Repeated(SampledGaussian(0.1, 1.0), 5)})
            for _ in range(5):
                opacus.step(noise_multiplier=1.0, sample_rate=0.1)
            found.append(ledger.epsilon("a"))
    assert found == sorted(found) and found[0] > 0
    wanted = opacus.get_epsilon(delta=1e-5)
    assert wanted * 0.995 <= found[-1] <= wanted * 1.005


def test_dp6_a_canary_does_not_show_more_than_was_promised() -> None:
    """DP6: a one-step audit of a client's release, with the worst-case neighbour, stays below.

    The threshold test of the release's component along the canary's gradient; 95 % one-sided
    Clopper-Pearson bounds over 400 trials.
    """
    z, trials, dims = 1.0, 400, 50
    steps = NoisySteps(1.0, torch.tensor([z]), torch.ones(1), Randomness.seeded(4))
    canary = torch.zeros(1, dims)
    canary[0, 0] = 1.0  # clipped to C = 1
    who = np.array([0])
    without = [float(steps.release(0 * canary, who)[0, 0]) for _ in range(trials)]
    with_it = [float(steps.release(canary, who)[0, 0]) for _ in range(trials)]
    best = 0.0
    for cut in np.linspace(0, 2, 9):
        hits, alarms = sum(x > cut for x in with_it), sum(x > cut for x in without)
        low = float(beta.ppf(0.05, hits, trials - hits + 1)) if hits else 0.0
        high = float(beta.ppf(0.95, alarms + 1, trials - alarms))
        best = max(best, math.log(max(low - 1e-5, 1e-12) / high))
    assert 0.5 < best <= epsilon(Gaussian(z), 1e-5, "prv")


def test_dp10_epsilon_does_not_depend_on_other_clients_sizes() -> None:
    """DP10, with noise found for a budget: as long as sizes are few, each has its own."""
    budget = Privacy("record", epsilon=4.0, delta=1e-4, accountant="rdp")
    noise = []
    for others in ((60,), (400, 90)):
        prepared = prepared_of(
            recipe_of(privacy=budget, local=Local(batch_size=10)), (200, *others)
        )
        noise.append(mechanism_of(prepared).multiplier(200))
    assert noise[0] == noise[1]


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (1, "test_little_noise_and_a_wide_clip_are_plain_training"),
        (2, "test_adding_one_example_changes_the_sum_by_at_most_the_clip_norm"),
        (3, "test_the_released_mean_has_the_stated_variance"),
        (5, "test_adding_one_example_changes_the_sum_by_at_most_the_clip_norm"),
        (7, "test_the_bound_converges_to_the_median_through_the_real_class"),
        (8, "test_the_noise_of_all_rounds_is_the_inverse_of_the_matrix"),
        (9, "test_it_can_be_recomputed_from_the_ledger_by_another_accountant"),
    ],
)
def test_the_other_invariants_are_tested_elsewhere(number: int, name: str) -> None:
    """DP1, DP2, DP3, DP5, DP7, DP8, DP9: one of these files has the test, and it says so."""
    files = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    [text] = [text for text in files if f"def {name}(" in text]
    own = text.split(f"def {name}(")[1].split("\ndef ")[0]
    assert f"DP{number}" in own


def test_seeds_are_not_in_the_run_folder_of_a_secure_run(tmp_path: Path) -> None:
    """Neither the key nor anything that it can be guessed from is written down."""
    recipe = recipe_of(privacy=RECORD, secure_aggregation=SecureAggregation())
    made = terms(recipe)
    guard = Guard(made, tmp_path / "privacy.jsonl", recipe)
    guard.admit(1, {"a": 40})
    guard.write()
    guard.close()
    key = made.mechanism.randomness.key
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert key not in written and key.hex().encode() not in written
    assert json.loads((tmp_path / "privacy.json").read_text())["void"] == ""


def test_every_strategy_was_thought_of() -> None:
    """A new one shows up here: its row of the table is made from what it declares."""
    assert len(available()) >= 26
    states, _ = play(prepared_of(recipe_of(privacy=RECORD)), 1)
    assert len(states) == 2
