"""Client-level releases against the plain formula, and every place where the noise may be added."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fedpeft.config import Privacy, Rounds, Sampling, SecureAggregation
from fedpeft.engine import Seam, play_round
from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.federation import Failure, Partial
from fedpeft.message import Messages
from fedpeft.postprocess import applied
from fedpeft.privacy.client_level import BELOW, BOUND, Adaptive, Bands, ClientLevel
from fedpeft.privacy.compatibility import client_level
from fedpeft.privacy.events import Gaussian, Repeated, SampledGaussian
from fedpeft.privacy.matrix import coefficients
from fedpeft.privacy.randomness import Randomness
from fedpeft.record.codec import pack, unpack
from fedpeft.secure import SecureFederation
from fedpeft.strategy import available, build
from fedpeft.tree import Tree
from tests.privacy.federated import CLIENT, SIZES, flat, play, prepared_of, recipe_of, replies_of

S = 1.5
SHAPES = {"a": (2, 3), "b": (4,)}
P = 10
LIKE = {"adapter": {name: torch.zeros(shape) for name, shape in SHAPES.items()}}


def level(
    z: float = 1.0, place: str = "server", expected: float = 4.0, **more: object
) -> ClientLevel:
    made = ClientLevel(S, z, expected, 2, place, Randomness.seeded(0))  # type: ignore[arg-type]
    return dataclasses.replace(made, **more) if more else made  # type: ignore[arg-type]


def tree(rows: torch.Tensor) -> dict[str, Tree]:
    return {
        "adapter": {
            "a": rows[:, :6].reshape(-1, 2, 3).float(),
            "b": rows[:, 6:].reshape(-1, 4).float(),
        }
    }


START = torch.arange(P, dtype=torch.float64) / 7


def sent_to(count: int) -> Messages:
    one = {name: value[0] for name, value in tree(START[None])["adapter"].items()}
    return Messages.broadcast([f"c{k}" for k in range(count)], {"adapter": one})


def replies(rows: torch.Tensor, bits: Sequence[float] | None = None) -> Messages:
    ones = torch.ones(len(rows), dtype=torch.float64)
    scalars = {"weight": ones} | (
        {} if bits is None else {BELOW: torch.tensor(bits, dtype=torch.float64)}
    )
    return Messages(tuple(f"c{k}" for k in range(len(rows))), tree(rows), scalars)


def released(
    own: ClientLevel, rows: torch.Tensor, bits: Sequence[float] | None = None
) -> np.ndarray:
    """The update that the strategy gets, from updates as they came from the clients."""
    stacks = [replies(rows, bits)] if len(rows) else []
    found = list(own.enter([sent_to(max(1, len(rows)))], LIKE, iter(stacks)))
    assert len(found) == 1 and float(found[0].scalars["weight"]) == 1.0
    got = found[0].trees["adapter"]
    whole = torch.cat([got["a"].flatten(), got["b"].flatten()]).double()
    return (whole - START.float()).numpy()


def rows_of(norms: Sequence[float], seed: int = 0) -> torch.Tensor:
    stream = torch.Generator().manual_seed(seed)
    raw = torch.randn(len(norms), P, generator=stream, dtype=torch.float64)
    return raw / raw.norm(dim=1, keepdim=True) * torch.tensor(norms, dtype=torch.float64)[:, None]


# -- one release


@pytest.mark.parametrize("came", [0, 1, 3, 6])
def test_a_release_is_the_clipped_sum_with_noise_over_the_expected_number(came: int) -> None:
    """The server clips again, and divides by n = 4, however many came: also by none at all."""
    rows = rows_of([0.3, 1.4, 9.0, 2.0, 1.0, 100.0][:came])
    noise = Randomness.seeded(0).normal(P).numpy()
    total = np.zeros(P)
    for row in rows.float().double().numpy():
        total += row * min(1.0, S / np.linalg.norm(row))
    wanted = (total + 2.0 * S * noise) / 4.0
    assert np.abs(released(level(2.0), rows) - wanted).max() < 1e-6


def test_the_noise_has_the_stated_deviation() -> None:
    """DP3, of a client: z S / n for each number."""
    own = level(2.0)
    found = np.concatenate([released(own, rows_of([1.0, 1.0])) for _ in range(400)])
    mean = released(level(1e-9), rows_of([1.0, 1.0]))
    noise = found.reshape(-1, P) - mean
    assert noise.std() == pytest.approx(2.0 * S / 4.0, rel=0.05)
    assert np.abs(np.corrcoef(noise.T) - np.eye(P)).max() < 5 / math.sqrt(400)


def test_one_client_moves_the_sum_by_at_most_the_bound_whoever_else_came() -> None:
    with_it = released(level(1e-9), rows_of([1.0, 7.0, 50.0]))
    without = released(level(1e-9), rows_of([1.0, 7.0, 50.0])[:2])
    assert np.linalg.norm(with_it - without) * 4 == pytest.approx(S, rel=1e-5)


def test_an_update_that_is_not_finite_adds_nothing() -> None:
    own, sent = level(), sent_to(2)
    bad = tree(START + rows_of([1.0, 1.0]))
    bad["adapter"]["a"][1, 0, 0] = math.nan
    left = own.leave(sent, sent.reply(bad, weight=torch.ones(2)))
    assert not left.trees["adapter"]["a"][1].any() and not left.trees["adapter"]["b"][1].any()
    assert bool(left.trees["adapter"]["a"][0].any())


def test_what_leaves_is_the_clipped_update_and_nothing_else() -> None:
    own, sent, rows = level(), sent_to(3), rows_of([0.4, 3.0, 0.0])
    reply = sent.reply(tree(START + rows), weight=torch.ones(3), loss=torch.ones(3))
    left = own.leave(sent, reply)
    assert left.scalars.keys() == {"weight"}
    got = torch.cat([left.trees["adapter"][n].flatten(1) for n in "ab"], dim=1).double()
    wanted = rows * torch.tensor([1.0, S / 3.0, 1.0])[:, None]
    assert float((got - wanted).norm()) < 1e-5
    assert bool((got.norm(dim=1) <= S).all())


def test_all_clients_must_be_sent_the_same() -> None:
    own = level()
    other = Messages(("c0", "c1"), {"adapter": {n: torch.randn(2, *s) for n, s in SHAPES.items()}})
    for sent in ([other], [sent_to(1), sent_to(1)]):
        with pytest.raises(FedpeftError, match="sends all clients the same"):
            list(own.enter(sent, LIKE, iter([])))


# -- where the noise is added


def test_local_noise_is_twice_the_bound_for_each_client() -> None:
    """2 z S: an update is replaced by any other, not taken away."""
    own, sent = level(2.0, "client"), sent_to(2000)
    left = own.leave(sent, sent.reply(tree(START.expand(2000, P)), weight=torch.ones(2000)))
    noise = torch.cat([left.trees["adapter"][n].flatten(1) for n in "ab"], dim=1)
    assert float(noise.std()) == pytest.approx(2 * 2.0 * S, rel=0.02)
    off = np.corrcoef(noise.numpy()[:100]) - np.eye(100)
    assert np.abs(off).max() < 1 and not torch.equal(noise[0], noise[1])


def test_local_updates_are_averaged_over_who_came_and_not_clipped_again() -> None:
    rows = rows_of([30.0, 40.0, 1.0])
    found = released(level(2.0, "client"), rows)
    assert np.abs(found - rows.mean(0).numpy()).max() < 1e-5
    assert not list(level(2.0, "client").enter([sent_to(2)], LIKE, iter([])))


def test_shares_add_up_to_the_servers_noise() -> None:
    """The fewest clients that a round may have make z S together."""
    own = level(3.0, "shares", least=5)
    sent = sent_to(5)
    sums = []
    for _ in range(400):
        left = own.leave(sent, sent.reply(tree(START.expand(5, P)), weight=torch.ones(5)))
        sums.append(torch.cat([left.trees["adapter"][n].flatten(1) for n in "ab"], 1).sum(0))
    assert float(torch.stack(sums).std()) == pytest.approx(3.0 * S, rel=0.05)


def test_too_few_shares_of_the_noise_are_no_release() -> None:
    own = level(3.0, "shares", least=3)
    with pytest.raises(QuorumError, match="2 clients' shares do not make up the noise"):
        list(own.enter([sent_to(2)], LIKE, iter([replies(rows_of([1.0, 1.0]))])))


def test_nothing_that_leaves_is_beyond_reach() -> None:
    """Of the fixed point of secure sums, whose range must hold what clients send."""
    for place in ("client", "shares", "server"):
        own, sent = level(3.0, place), sent_to(500)
        reply = sent.reply(tree(START + rows_of([20.0] * 500)), weight=torch.ones(500))
        left = own.leave(sent, reply)
        most = max(float(value.abs().max()) for value in left.trees["adapter"].values())
        assert most <= own.reach(sent)
        assert most > own.reach(sent) / 12


# -- the bound that adapts


def norms_of(seed: int, count: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).lognormal(0.0, 1.0, count))


@pytest.mark.parametrize("first", [0.1, 10.0])
def test_the_bound_converges_to_the_median_through_the_real_class(first: float) -> None:
    """DP7: announce, leave, enter; log-normal norms of median 1."""
    own = level(0.5, expected=100.0, clip_norm=first, adaptive=Adaptive(0.5, 0.2, 100 / 20))
    sent, path = sent_to(100), []
    for round_ in range(60):
        told = own.announce(sent)
        assert told.scalars[BOUND].tolist() == [own.clip_norm] * 100
        rows = rows_of(norms_of(round_, 100).tolist(), round_)
        reply = told.reply(tree(START + rows), weight=torch.ones(100))
        left = own.leave(told, reply)
        assert set(left.scalars) == {"weight", BELOW}
        list(own.enter([told], LIKE, iter([left])))
        path.append(own.clip_norm)
    assert np.mean(path[-15:]) == pytest.approx(1.0, abs=0.12)
    assert path[0] > first if first < 1 else path[0] < first  # trap F1: the sign


def test_an_adaptive_round_is_the_formula() -> None:
    """Andrew et al.: the noise on the update is larger, as the bits take their share."""
    own = level(1.0, expected=40.0, adaptive=Adaptive(0.3, 0.2, 2.0))
    rows, bits = rows_of([1.0, 3.0, 0.2]), [1.0, 0.0, 1.0]
    stream = Randomness.seeded(0)
    noise, bit_noise = stream.normal(P).numpy(), float(stream.normal(1))
    clipped = rows.float().double().numpy()
    clipped = clipped * np.minimum(1, S / np.linalg.norm(clipped, axis=1))[:, None]
    z = (1.0**-2 - (2 * 2.0) ** -2) ** -0.5
    found = released(own, rows, bits)
    assert np.abs(found - (clipped.sum(0) + z * S * noise) / 40).max() < 1e-6
    share = (2 - 3 / 2 + 2.0 * bit_noise) / 40 + 0.5
    assert own.clip_norm == pytest.approx(S * math.exp(-0.2 * (share - 0.3)), rel=1e-12)


def test_the_bit_says_unclipped() -> None:
    own = level(adaptive=Adaptive(0.5, 0.2, 2.0))
    told = own.announce(sent_to(3))
    reply = told.reply(tree(START + rows_of([1.4, 1.6, 0.0])), weight=torch.ones(3))
    assert own.leave(told, reply).scalars[BELOW].tolist() == [1.0, 0.0, 1.0]


# -- correlated noise


def test_the_noise_of_all_rounds_is_the_inverse_of_the_matrix() -> None:
    """DP8 through the real class: y = sens S z C^-1 xi, by a plain solve in numpy."""
    rounds, separation, bands, z = 12, 4, 4, 0.7
    own = level(z, expected=5.0, bands=Bands(bands, rounds, separation))
    found = np.stack([released(own, rows_of([])) * 5.0 for _ in range(rounds)])
    c = np.zeros((rounds, rounds))
    for i in range(rounds):
        for j in range(max(0, i - bands + 1), i + 1):
            c[i, j] = coefficients(bands)[i - j]
    stream = Randomness.seeded(0)
    xi = np.stack([stream.normal(P).numpy() for _ in range(rounds)])
    # brute force: a client in the rounds i, i + 4, ..., whichever i it begins with
    sens = max(np.linalg.norm(c[:, i::separation].sum(1)) for i in range(separation))
    wanted = z * S * sens * np.linalg.solve(c, xi)
    assert sens == pytest.approx(own.bands.sensitivity, rel=1e-12) if own.bands else False
    assert np.abs(found - wanted).max() < 1e-5
    prefix = np.abs(np.cumsum(found, 0) - np.cumsum(wanted, 0))
    assert prefix.max() < 1e-5


def test_rounds_of_another_layout_cannot_share_correlated_noise() -> None:
    """RoLoRA trains other tensors in every other round."""
    own = level(bands=Bands(3, 9, 3))
    released(own, rows_of([1.0]))
    other = {"adapter": {"a": torch.zeros(2, 3)}}
    sent = Messages.broadcast(["c0"], other)
    with pytest.raises(FedpeftError, match=r"release 10 and 6 numbers: set privacy\.bands=0"):
        list(own.enter([sent], other, iter([])))


@pytest.mark.parametrize("kind", ["bands", "adaptive"])
def test_memory_goes_on_bit_by_bit(kind: str) -> None:
    """Stopped after round 3 of 6 and restored through the checkpoint's codec."""

    def made(seed: int) -> ClientLevel:
        if kind == "bands":
            own = level(1.0, bands=Bands(3, 6, 3))
        else:
            own = level(1.0, expected=40.0, adaptive=Adaptive(0.5, 0.2, 2.0))
        own.randomness = Randomness.seeded(seed)
        return own

    def go(own: ClientLevel) -> list[np.ndarray]:
        bits = None if kind == "bands" else [1.0, 0.0]
        return [released(own, rows_of([1.0, 2.0]), bits) for _ in range(3)]

    whole = made(0)
    go(whole)
    tensors: dict[str, torch.Tensor] = {}
    kept = unpack(pack(whole.memory(), "post", tensors), tensors)
    again, fresh = made(1), made(1)
    whole.randomness = Randomness.seeded(1)
    again.restore(kept)
    assert again.clip_norm == whole.clip_norm and len(again.past) == len(whole.past)
    wanted, found, others = go(whole), go(again), go(fresh)
    assert all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert not np.array_equal(wanted[0], others[0])


# -- whole federations


SECURE = SecureAggregation(on=True)


@pytest.mark.parametrize("name", sorted(n for n in available() if not client_level(build(n, {}))))
@pytest.mark.parametrize("noise", ["server", "client", "shares"])
def test_every_linear_strategy_plays(name: str, noise: str) -> None:
    privacy = dataclasses.replace(CLIENT, noise=noise, noise_multiplier=0.1)  # type: ignore[arg-type]
    secure = SECURE if noise == "shares" else SecureAggregation()
    prepared = prepared_of(recipe_of(name, privacy=privacy, secure_aggregation=secure))
    states, reports = play(prepared)
    assert [report.replied for report in reports] == [4, 4]
    assert not any(report.excluded for report in reports)
    if prepared.strategy.shares:
        first, last = (flat(prepared.strategy.adapter(states[k])) for k in (0, -1))
        assert bool(torch.isfinite(last).all()) and not torch.equal(first, last)


def test_a_whole_round_is_the_formula() -> None:
    """FedAvg: the new adapter is the old one plus the release, from the clients' own training."""
    rounds = Rounds(count=3, weighting="equal", sampling=Sampling("uniform"))
    privacy = dataclasses.replace(CLIENT, clip_norm=0.05)
    plain = prepared_of(recipe_of(rounds=rounds))
    [reply] = replies_of(plain, ["c0", "c1", "c2", "c3"])
    start = plain.network.initial
    rows = torch.cat(
        [(reply.trees["adapter"][n].double() - start[n]).flatten(1) for n in sorted(start)], dim=1
    ).numpy()
    norms = np.linalg.norm(rows, axis=1)
    assert (norms > 0.05).any()
    prepared = prepared_of(recipe_of(rounds=rounds, privacy=privacy))
    own = prepared.level
    assert own is not None and own.expected == 4.0
    own.randomness = Randomness.seeded(9)
    states, _ = play(prepared, 1)
    noise = Randomness.seeded(9).normal(rows.shape[1]).numpy()
    clipped = rows * np.minimum(1, 0.05 / norms)[:, None]
    wanted = (clipped.sum(0) + 0.05 * noise) / 4
    moved = (flat(states[1].adapter) - flat(start)).numpy()
    assert np.abs(moved - wanted).max() < 1e-6


def test_dropouts_weaken_the_signal_and_not_the_noise() -> None:
    rounds = Rounds(count=3, weighting="equal", failure_rate=0.5, quorum=0.1)
    privacy = dataclasses.replace(CLIENT, noise_multiplier=1e-9, clip_norm=1e-3)
    prepared = prepared_of(recipe_of(rounds=rounds, privacy=privacy))
    states, reports = play(prepared, 3)
    partly = [k for k, report in enumerate(reports) if 0 < report.replied < 4]
    assert partly, "the seed must drop somebody"
    for k in partly:
        moved = flat(states[k + 1].adapter) - flat(states[k].adapter)
        assert float(moved.norm()) <= reports[k].replied * 1e-3 / 4 * (1 + 1e-4)


def test_a_poisson_round_without_clients_releases_noise() -> None:
    rounds = Rounds(count=3, weighting="equal", sampling=Sampling("poisson", rate=0.4))
    prepared = prepared_of(recipe_of(rounds=rounds, privacy=CLIENT))
    own, strategy, federation = prepared.level, prepared.strategy, prepared.federation()
    assert own is not None and own.expected == pytest.approx(1.6)
    own.randomness = Randomness.seeded(3)
    state = strategy.init(prepared.problem)
    after, report = play_round(strategy, state, federation, rounds, 0, 1, Seam(prepared.post, ()))
    noise = Randomness.seeded(3).normal(len(flat(state.adapter)))
    moved = flat(after.adapter) - flat(state.adapter)
    assert report.replied == 0 and not report.down
    assert float((moved - noise / 1.6).norm() / noise.norm()) < 1e-5


def test_clients_weights_must_be_equal() -> None:
    """An intake that registers other weights refuses the replies, by the round loop's own check."""
    rounds = Rounds(count=3, weighting="examples")
    prepared = prepared_of(recipe_of(rounds=Rounds(count=3, weighting="equal"), privacy=CLIENT))
    strategy, federation = prepared.strategy, prepared.federation()
    with pytest.raises(QuorumError, match=r"weight 1\.0 claimed, but it is registered with 5\.0"):
        play_round(
            strategy,
            strategy.init(prepared.problem),
            federation,
            rounds,
            0,
            1,
            Seam(prepared.post, ("c0", "c1", "c2", "c3")),
        )


def test_two_exchanges_are_two_releases() -> None:
    prepared = prepared_of(recipe_of("fedask", privacy=CLIENT))
    terms = prepared.terms
    assert prepared.strategy.exchanges == 2 and terms is not None
    assert terms.event(1) == Repeated(Gaussian(1.0), 2)
    one = prepared_of(recipe_of(privacy=CLIENT)).terms
    assert one is not None and one.event(1) == Gaussian(1.0)
    poisson = Rounds(count=3, weighting="equal", sampling=Sampling("poisson", rate=0.5))
    drawn = prepared_of(recipe_of("fedask", privacy=CLIENT, rounds=poisson)).terms
    assert drawn is not None and drawn.event(1) == Repeated(SampledGaussian(0.5, 1.0), 2)


@pytest.mark.parametrize("bits", [32, 64])
def test_secure_sums_are_plain_sums_but_for_rounding(bits: int) -> None:
    """The same noise in both: that of the server."""
    found = []
    for on in (False, True):
        secure = SecureAggregation(on=on, bits=bits)
        prepared = prepared_of(recipe_of(privacy=CLIENT, secure_aggregation=secure))
        assert prepared.level is not None
        prepared.level.randomness = Randomness.seeded(2)
        federation = prepared.secured(prepared.federation())
        assert isinstance(federation, SecureFederation) == on
        found.append(flat(play(prepared, 1)[0][-1].adapter))
    off = float((found[0] - found[1]).abs().max())
    assert (0 < off < 1e-7) if bits == 32 else off < 1e-7


def test_a_secure_round_of_too_few_shares_gives_no_sum() -> None:
    """Whatever the threshold of secure aggregation is: noise must be whole before a sum is seen."""
    privacy = dataclasses.replace(CLIENT, noise="shares")
    secure = SecureAggregation(on=True, threshold=0.1)
    rounds = Rounds(count=3, weighting="equal", quorum=1.0)
    prepared = prepared_of(
        recipe_of(privacy=privacy, secure_aggregation=secure, rounds=rounds), (5, 9, 3, 12, 4)
    )
    own = prepared.level
    assert own is not None and own.least == 5
    strategy = prepared.strategy
    sent = strategy.send(strategy.init(prepared.problem), 1, ["c0", "c1", "c2", "c3"])
    found = list(prepared.secured(prepared.federation()).run(1, sent))
    assert all(isinstance(one, Failure) for one in found) and len(found) == 4
    sent = strategy.send(strategy.init(prepared.problem), 1, ["c0", "c1", "c2", "c3", "c4"])
    [whole] = prepared.secured(prepared.federation()).run(1, sent)
    assert isinstance(whole, Partial) and whole.clients == 5


def test_updates_are_relative_to_what_was_sent() -> None:
    """What was sent under no such name counts from zero: FedASK's sketches."""
    sent = sent_to(2)
    moved = applied(sent.rows([0]), {"other": {"x": torch.ones(1, 2)}})
    assert moved["other"]["x"].tolist() == [[1.0, 1.0]]


def test_a_budget_finds_the_noise_of_the_whole_run() -> None:
    privacy = Privacy("client", epsilon=2.0, delta=1e-3)
    terms = prepared_of(recipe_of(privacy=privacy), SIZES).terms
    assert terms is not None and isinstance(terms.mechanism, ClientLevel)
    # three Gaussians of z are one of z / sqrt(3); delta by the analytic formula
    z = terms.mechanism.noise_multiplier / math.sqrt(3)
    normal = torch.distributions.Normal(0.0, 1.0)
    low, high = (
        float(normal.cdf(torch.tensor(x).double())) for x in (0.5 / z - 2 * z, -0.5 / z - 2 * z)
    )
    assert 0.98e-3 < low - math.exp(2.0) * high <= 1e-3
