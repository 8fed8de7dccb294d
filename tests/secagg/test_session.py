"""A whole round over an in-memory transport: sums, dropouts at every stage, clients that cheat."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.secagg import masking
from fedpeft.secagg.fixed import FixedPoint
from fedpeft.secagg.messages import (
    Advert,
    Masked,
    Setup,
    default_threshold,
)
from fedpeft.secagg.primitives import digest, mask
from fedpeft.secagg.session import Session, Stage
from tests.secagg.network import ROUND, World, body, losing, roster_of

STAGES = [stage for stage in Stage if stage is not Stage.DONE]


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("clients", range(3, 11))
def test_the_sum_is_that_of_the_vectors_up_to_rounding(clients: int, bits: int) -> None:
    world = World(clients, bits)
    session = world.run(world.session())
    total = session.total()
    assert session.excluded == {} and list(total.survivors) == world.names
    exact = np.sum(list(world.vectors.values()), axis=0)
    half = clients / 2 / world.fixed.scale
    assert np.abs(total.values - exact)[:30].max() <= half * (1 + 1e-9) + 1e-14
    assert abs(total.values[30] - exact[30]) <= half * 3 / 1.5 * (1 + 1e-9) + 1e-14
    assert np.array_equal(total.values, world.expected(total.survivors))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.value)
@pytest.mark.parametrize("clients", [5, 7, 10])
def test_dropouts_at_every_stage_are_tolerated_down_to_the_threshold(
    clients: int, stage: Stage
) -> None:
    world = World(clients, seed=clients)
    session = world.session()
    gone = world.names[1 : 1 + clients - default_threshold(clients)]
    world.run(session, up=losing(dict.fromkeys(gone, stage)))
    summed = world.names if stage in (Stage.CONFIRM, Stage.UNMASK) else session.requests()
    survivors = [n for n in world.names if n in summed or n not in gone]
    total = session.total()
    assert list(total.survivors) == survivors
    assert np.array_equal(total.values, world.expected(survivors))
    assert session.excluded == dict.fromkeys(gone, f"stage {stage.value}: no answer")


def test_dropouts_at_all_stages_of_one_round_are_tolerated() -> None:
    world = World(10)
    session = world.session(threshold=6)
    lost = {f"client-{k}": stage for k, stage in enumerate(STAGES[:4])}
    world.run(session, up=losing(lost))
    assert list(session.total().survivors) == world.names[3:]
    assert np.array_equal(session.total().values, world.expected(world.names[3:]))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.value)
def test_below_the_threshold_the_round_is_lost_with_the_names_of_who_is_missing(
    stage: Stage,
) -> None:
    world = World(6)  # threshold 4
    gone = dict.fromkeys(world.names[:3], stage)
    session = world.session()
    with pytest.raises(QuorumError, match=rf"stage {stage.value} .* 3 of 6 clients .*'client-0'"):
        world.run(session, up=losing(gone))
    with pytest.raises(FedpeftError, match="there is no sum"):
        session.total()


def test_requests_that_are_lost_are_dropouts_too() -> None:
    world = World(5)
    session = world.run(world.session(), down=losing({"client-2": Stage.MASK}))
    assert "client-2" not in session.total().survivors
    assert np.array_equal(session.total().values, world.expected(session.total().survivors))


@pytest.mark.parametrize("clients", [0, 1, 2])
def test_fewer_than_three_clients_are_refused(clients: int) -> None:
    fixed = FixedPoint(32, 1.0, 10, 30)
    with pytest.raises(FedpeftError, match=f"{clients} clients cannot aggregate securely"):
        Session(0, {f"c{k}": bytes(32) for k in range(clients)}, fixed)


@pytest.mark.parametrize(
    ("clients", "threshold"), [(3, 2), (4, 2), (6, 3), (7, 3), (10, 5), (5, 6)]
)
def test_a_threshold_of_half_or_fewer_or_below_three_is_refused(
    clients: int, threshold: int
) -> None:
    with pytest.raises(FedpeftError, match=f"threshold is {threshold} of {clients} clients"):
        World(clients).session(threshold=threshold)


def test_the_default_threshold_is_two_thirds_rounded_up() -> None:
    found = [default_threshold(n) for n in range(3, 13)]
    assert found == [3, 3, 4, 4, 5, 6, 6, 7, 8, 8]


def test_more_clients_than_fixed_point_was_set_up_for_are_refused() -> None:
    world = World(5)
    world.fixed = FixedPoint(32, 0.5, 4, 30, 3.0, (3.0,))
    with pytest.raises(FedpeftError, match="set up for 4"):
        world.session()


def test_an_answer_that_comes_twice_is_counted_once() -> None:
    world = World(4)
    session = world.session()
    while requests := session.requests():
        for name, request in requests.items():
            answer = world.answer(name, request)
            session.receive(name, answer)
            session.receive(name, answer)
        session.close()
    assert session.excluded == {}
    assert np.array_equal(session.total().values, world.expected(world.names))


def test_who_was_not_asked_is_not_heard() -> None:
    world = World(5)
    session = world.session()
    world.upto(session, Stage.MASK, down=losing({"client-1": Stage.SHARE}))
    session.receive("client-1", b"late")
    session.receive("stranger", b"hello")
    world.run(session)
    assert session.excluded["client-1"] == "stage share: no answer"
    assert session.excluded["stranger"] == "stage mask: it answered and was not asked"
    assert np.array_equal(session.total().values, world.expected(session.total().survivors))


def test_a_late_vector_stays_masked_when_its_mask_key_is_known() -> None:
    """The point of the second mask: a dropout's pairwise masks are known, its own is not."""
    world = World(5)
    session = world.session()
    requests = world.upto(session, Stage.MASK)
    late = Masked.from_bytes(body(world.answer("client-0", requests["client-0"])), world.fixed)
    own = world.participants["client-0"]._round
    assert own is not None
    vector = np.frombuffer(late.vector, world.fixed.dtype).copy()
    for signed in roster_of(own.roster).signed:
        peer = Advert.from_bytes(body(signed))
        if peer.sender != "client-0":
            vector -= mask(
                masking.pair_mask_key(own.mask_secret, "client-0", peer), world.fixed
            )  # client-0 is the first name: it adds
    plain = world.fixed.encode(world.vectors["client-0"])
    assert not (vector == plain).any()
    vector -= mask(masking.self_mask_key(own.seed, digest("roster", own.roster)), world.fixed)
    assert np.array_equal(vector, plain)


def test_a_masked_vector_is_uniform() -> None:
    """Chi-square of the bytes of one client's vector of constant input, and between two rounds."""
    world = World(3)
    world.fixed = FixedPoint(32, 0.5, 3, 20_000)
    world.vectors = dict.fromkeys(world.names, np.full(20_000, 0.25))
    found = []
    for round in (1, 2):
        requests = world.upto(session := world.session(round), Stage.MASK)
        answer = body(world.answer("client-1", requests["client-1"]))
        found.append(np.frombuffer(Masked.from_bytes(answer, world.fixed).vector, np.uint8))
        assert session.stage is Stage.MASK
    for sample in (*found, found[0] ^ found[1]):
        for place in range(4):  # each byte of the word
            counts = np.bincount(sample[place::4], minlength=256)
            chi2 = float(((counts - 20_000 / 256) ** 2 / (20_000 / 256)).sum())
            assert 170 < chi2 < 360  # 255 degrees of freedom: mean 255, deviation 22.6
    words = found[0].view("<u4") / 2.0**32
    assert abs(words.mean() - 0.5) < 0.01 and abs(words.var() - 1 / 12) < 0.002
    assert abs(np.corrcoef(words[:-1], words[1:])[0, 1]) < 0.03


def test_the_setup_is_that_of_the_session() -> None:
    world = World(4)
    for request in world.session().requests().values():
        setup = Setup.from_bytes(request)
        assert setup.round == ROUND and list(setup.clients) == world.names
        assert setup.fixed == world.fixed and setup.threshold == 3


def test_sessions_draw_fresh_nonces() -> None:
    world = World(4)
    made = [Session(1, world.identities, world.fixed).requests()["client-0"] for _ in range(2)]
    assert made[0] != made[1]
