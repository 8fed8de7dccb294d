"""Client-level privacy over whole federations: every linear strategy, sampling, secure sums."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from fedpeft.config import Privacy, Rounds, Sampling, SecureAggregation
from fedpeft.engine import Seam, play_round
from fedpeft.errors import QuorumError
from fedpeft.federation import Failure, Partial
from fedpeft.privacy.client_level import ClientLevel
from fedpeft.privacy.compatibility import client_level
from fedpeft.privacy.events import Gaussian, Repeated, SampledGaussian
from fedpeft.privacy.randomness import Randomness
from fedpeft.secure import SecureFederation
from fedpeft.strategy import available, build
from tests.privacy.federated import CLIENT, SIZES, flat, play, prepared_of, recipe_of, replies_of

SECURE = SecureAggregation(enabled=True)


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
        secure = SecureAggregation(enabled=on, bits=bits)
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
    secure = SecureAggregation(enabled=True, threshold=0.1)
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
