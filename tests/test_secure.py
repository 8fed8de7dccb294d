"""Secure aggregation in one process: sums in the protocol's own integers, and nothing but sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch

from fedpeft.comms.ledger import totals
from fedpeft.config import Rounds, SecureAggregation
from fedpeft.engine import play_round
from fedpeft.errors import QuorumError
from fedpeft.federation import Failure, Partial
from fedpeft.message import Messages
from fedpeft.metrics import Score
from fedpeft.postprocess import Chain
from fedpeft.privacy.client_level import BELOW, Adaptive, ClientLevel
from fedpeft.privacy.randomness import Randomness
from fedpeft.secagg.fixed import FixedPoint
from fedpeft.secure import SecureFederation, Summed
from fedpeft.tree import Tree, row
from tests.kept import Memory
from tests.privacy.federated import flat, play, prepared_of, recipe_of

P = 6
NAMES = ("a", "b", "c", "d")


def level(clip: float = 2.0, **more: object) -> ClientLevel:
    own = ClientLevel(clip, 0.0, 4.0, 1, "nobody", Randomness.seeded(0))
    return dataclasses.replace(own, **more) if more else own  # type: ignore[arg-type]


class Fake:
    """Clients that reply with given updates, clipped as ``level`` says; some fail."""

    def __init__(self, rows: torch.Tensor, own: ClientLevel, fail: tuple[str, ...] = ()) -> None:
        self.rows, self.own, self.fail = rows, own, fail
        self.sizes = {name: 10 * (k + 1) for k, name in enumerate(NAMES)}
        self.weights = torch.ones(4, dtype=torch.float64)

    def clients(self) -> Mapping[str, int]:
        return self.sizes

    def run(self, round: int, *stacks: Messages) -> Iterator[Messages | Failure | Partial]:
        for sent in stacks:
            for k, name in enumerate(sent.clients):
                if name in self.fail:
                    yield Failure(name, "broken")
                    continue
                at = NAMES.index(name)
                one = sent.rows([k])
                tree = {"t": {"x": one.trees["t"]["x"] + self.rows[at].float()}}
                reply = one.reply(tree, weight=self.weights[at : at + 1])
                yield self.own.leave(one, reply, Memory())

    def evaluate(self, round: int, *stacks: Messages) -> Iterator[dict[str, Score] | Failure]:
        yield Failure("a", "no score")

    def memory(self) -> dict[str, dict[str, Tree]]:
        return {"a": {}}

    def restore(self, memory: Mapping[str, Mapping[str, Tree]]) -> None:
        self.rows = self.rows * 0


def sent(names: tuple[str, ...] = NAMES) -> Messages:
    return Messages.broadcast(names, {"t": {"x": torch.arange(P) / 5}})


ROWS = torch.randn(4, P, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SETTINGS = SecureAggregation(enabled=True, clip_norm=2.0)


def test_the_sum_is_that_of_the_protocols_integers() -> None:
    own = level()
    fake = Fake(ROWS, own)
    [found] = SecureFederation(fake, SETTINGS, own, True).run(1, sent())
    assert isinstance(found, Partial) and found.clients == 4 and not found.excluded
    rows = ROWS.float().double().numpy()
    clipped = rows * np.minimum(1, 2.0 * (1 - 1e-6) / np.linalg.norm(rows, axis=1))[:, None]
    scale = ((2**63 - 1) // 4) / 2.0
    wanted = np.rint(clipped.astype(np.float32).astype(np.float64) * scale).sum(0) / scale / 4
    assert np.abs(found.replies.trees["t"]["x"][0].numpy() - wanted).max() < 1e-6
    assert float(found.replies.scalars["weight"][0]) == pytest.approx(4.0, rel=1e-9)
    assert totals(found.up) == {"masked": 4 * 8 * (P + 1)}


def test_only_one_row_comes_out_and_no_clients_name() -> None:
    own = level()
    found = list(SecureFederation(Fake(ROWS, own), SETTINGS, own, True).run(1, sent()))
    assert len(found) == 1 and isinstance(found[0], Partial)
    assert found[0].replies.clients == ("sum",)
    assert found[0].replies.scalars.keys() == {"weight"}


def test_examples_weigh_the_mean() -> None:
    own = level(100.0)
    fake = Fake(ROWS, own)
    fake.weights = torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64)
    [found] = SecureFederation(fake, SETTINGS, own, False).run(1, sent())
    assert isinstance(found, Partial)
    wanted = (ROWS * fake.weights[:, None]).sum(0) / 100
    assert float((found.replies.trees["t"]["x"][0] - wanted).abs().max()) < 1e-6
    assert float(found.replies.scalars["weight"][0]) == pytest.approx(100.0)


def test_the_count_of_clients_below_the_bound_is_summed_too() -> None:
    own = level(2.7, place="server", noise_multiplier=1.0, adaptive=Adaptive(0.5, 0.2, 2.0))
    norms = ROWS.float().norm(dim=1)
    below = int((norms <= 2.7 * (1 - 1e-6)).sum())
    assert 0 < below < 4
    told = own.announce(sent())
    [found] = SecureFederation(Fake(ROWS, own), SETTINGS, own, True).run(1, told)
    assert isinstance(found, Partial)
    assert float(found.replies.scalars[BELOW][0]) == pytest.approx(below / 4, abs=1e-9)
    assert totals(found.up) == {"masked": 4 * 8 * (P + 2)}


@pytest.mark.parametrize(
    ("fail", "threshold", "sums"),
    [((), 0.67, True), (("a",), 0.67, True), (("a",), 0.8, False), (("a", "b"), 0.1, False)],
)
def test_too_few_are_no_sum(fail: tuple[str, ...], threshold: float, sums: bool) -> None:
    """Never fewer than three, nor than the threshold's share of those that were asked."""
    own = level()
    settings = dataclasses.replace(SETTINGS, threshold=threshold)
    found = list(SecureFederation(Fake(ROWS, own, fail), settings, own, True).run(1, sent()))
    if sums:
        assert len(found) == 1 and isinstance(found[0], Partial)
        assert found[0].clients == 4 - len(fail)
        assert dict(found[0].excluded) == dict.fromkeys(fail, "broken")
        return
    assert all(isinstance(one, Failure) for one in found)
    reasons = {one.client: one.reason for one in found if isinstance(one, Failure)}
    assert reasons.keys() == set(NAMES) and all(reasons[name] == "broken" for name in fail)
    assert all("no secure sum" in reasons[name] for name in set(NAMES) - set(fail))


def test_single_replies_are_asked_of_the_federation_behind() -> None:
    class Sums(Fake):
        def run(self, round: int, *stacks: Messages) -> Iterator[Messages | Failure | Partial]:
            yield Partial(stacks[0], 4, (), {})

    own = level()
    with pytest.raises(TypeError, match="must give single replies"):
        list(SecureFederation(Sums(ROWS, own), SETTINGS, own, True).run(1, sent()))


def test_the_rest_is_the_federations_behind() -> None:
    own = level()
    fake = Fake(ROWS, own)
    federation = SecureFederation(fake, SETTINGS, own, True)
    assert federation.clients() == fake.sizes and federation.memory() == {"a": {}}
    assert list(federation.evaluate(1, sent())) == [Failure("a", "no score")]
    federation.restore({})
    assert not fake.rows.any()


def test_vectors_and_their_mean_are_opposites() -> None:
    reply = Messages(
        ("a", "b"),
        {"t": {"x": torch.tensor([[1.0, -1.0], [0.5, 0.25]])}},
        {"weight": torch.tensor([1.0, 3.0], dtype=torch.float64)},
    )
    fixed = FixedPoint(64, 2.0, 2, 2, 3.0, (3.0,))
    summed = Summed({"t": row(reply.trees["t"], 0)}, False)
    words = fixed.encode(summed.rows(reply))
    assert words.shape == (2, 3)
    found = summed.mean(fixed.decode(words.sum(axis=0, dtype=words.dtype), 2))
    assert torch.allclose(found.trees["t"]["x"], torch.tensor([[0.625, -0.0625]]).double())
    assert float(found.scalars["weight"][0]) == pytest.approx(4.0)


def test_a_run_is_that_without_it_where_nothing_is_clipped() -> None:
    """FedAvg, weights by examples: secure sums change roundings only."""
    rounds = Rounds(count=3)
    plain, _ = play(prepared_of(recipe_of(rounds=rounds)))
    secure = SecureAggregation(enabled=True, clip_norm=100.0)
    prepared = prepared_of(recipe_of(rounds=rounds, secure_aggregation=secure))
    assert prepared.level is not None and prepared.level.place == "nobody"
    found, reports = play(prepared)
    gap = flat(found[-1].adapter) - flat(plain[-1].adapter)
    assert float(gap.norm() / (flat(plain[-1].adapter) - flat(plain[0].adapter)).norm()) < 1e-5
    assert [report.replied for report in reports] == [4, 4]
    assert reports[0].up.keys() == {"masked"}


def test_a_run_clips_what_is_longer_than_the_sums_bound() -> None:
    secure = SecureAggregation(enabled=True, clip_norm=1e-3)
    states, _ = play(prepared_of(recipe_of(secure_aggregation=secure)), 1)
    moved = flat(states[1].adapter) - flat(states[0].adapter)
    assert 1e-5 < float(moved.norm()) <= 1e-3


def test_a_round_of_too_few_ends_in_the_quorum() -> None:
    prepared = prepared_of(recipe_of(secure_aggregation=SETTINGS), (5, 9))
    federation = prepared.secured(prepared.federation())
    assert isinstance(federation, SecureFederation) and isinstance(prepared.post, Chain)
    with pytest.raises(QuorumError, match="no secure sum: 2 of 2 clients, 3 are needed"):
        state = prepared.strategy.init(prepared.problem)
        play_round(prepared.strategy, state, federation, prepared.recipe.rounds, 0, 1)
