"""Clients that cheat: each is excluded and named, or the round is lost and names it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from fedpeft.errors import FedpeftError
from fedpeft.secagg import participant
from fedpeft.secagg.codec import ProtocolError
from fedpeft.secagg.envelope import Kind
from fedpeft.secagg.messages import Advert, Confirm, Masked, Parcels, Reveal
from fedpeft.secagg.session import Stage
from fedpeft.secagg.shamir import SHARE_BYTES, Random
from tests.secagg.network import World, body, losing, only

STAGES = [stage for stage in Stage if stage is not Stage.DONE]


def _flip_last(signed: bytes) -> bytes:
    return signed[:-1] + bytes([signed[-1] ^ 1])


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.value)
def test_a_bad_signature_excludes_its_client(stage: Stage) -> None:
    world = World(5)
    session = world.run(world.session(), up=only(stage, "client-3", _flip_last))
    assert session.excluded.keys() == {"client-3"}
    assert "'client-3': its signature does not verify" in session.excluded["client-3"]
    assert np.array_equal(session.total().values, world.expected(session.total().survivors))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.value)
def test_an_answer_of_an_older_round_excludes_its_client(stage: Stage) -> None:
    world = World(5)
    kept: dict[Stage, bytes] = {}

    def keep(at: Stage, name: str, blob: bytes) -> bytes | None:
        if name == "client-3":
            kept[at] = blob
        return blob

    world.run(world.session(round=1), up=keep)
    session = world.run(
        world.session(round=2), up=only(stage, "client-3", lambda answer: kept[stage])
    )
    assert session.excluded.keys() == {"client-3"}
    assert "of round 1, and this is round 2" in session.excluded["client-3"]
    assert np.array_equal(session.total().values, world.expected(session.total().survivors))


def test_an_answer_in_another_name_excludes_who_signed_it() -> None:
    world = World(5)

    def forge(answer: bytes) -> bytes:
        forged = replace(Advert.from_bytes(body(answer)), sender="client-0")
        return world.signed("client-3", forged.to_bytes())

    session = world.run(world.session(), up=only(Stage.ADVERTISE, "client-3", forge))
    assert "by 'client-3' in the name of 'client-0'" in session.excluded["client-3"]


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31)], ids=["zero", "one"])
def test_a_key_of_low_order_excludes_its_client(key: bytes) -> None:
    world = World(5)

    def forge(answer: bytes) -> bytes:
        return world.signed(
            "client-3", replace(Advert.from_bytes(body(answer)), mask_key=key).to_bytes()
        )

    session = world.run(world.session(), up=only(Stage.ADVERTISE, "client-3", forge))
    assert "X25519 public key is not valid" in session.excluded["client-3"]
    assert len(session.total().survivors) == 4


def test_a_key_that_is_not_fresh_excludes_its_client() -> None:
    world = World(5)
    stolen: list[bytes] = []

    def forge(stage: Stage, name: str, answer: bytes) -> bytes | None:
        if stage is Stage.ADVERTISE:
            stolen.append(Advert.from_bytes(body(answer)).mask_key)
            if name == "client-3":
                copy = replace(Advert.from_bytes(body(answer)), mask_key=stolen[0])
                return world.signed(name, copy.to_bytes())
        return answer

    session = world.run(world.session(), up=forge)
    assert "advertised a key twice, or another client's" in session.excluded["client-3"]
    assert len(session.total().survivors) == 4


def test_shares_that_leave_somebody_out_exclude_their_client() -> None:
    world = World(5)

    def forge(answer: bytes) -> bytes:
        shares = Parcels.from_bytes(body(answer), Kind.SHARES)
        return world.signed("client-3", replace(shares, parcels=shares.parcels[1:]).to_bytes())

    session = world.run(world.session(), up=only(Stage.SHARE, "client-3", forge))
    assert "did not seal shares for everybody" in session.excluded["client-3"]
    assert np.array_equal(session.total().values, world.expected(session.total().survivors))


@pytest.mark.parametrize("field", ["sealed", "seed_digest", "key_digest"])
def test_a_corrupted_share_is_refused_by_who_gets_it_and_names_the_dealer(field: str) -> None:
    world = World(5)

    def forge(answer: bytes) -> bytes:
        shares = Parcels.from_bytes(body(answer), Kind.SHARES)
        first = shares.parcels[0]
        wrong = replace(first, **{field: _flip_last(getattr(first, field))})
        parcels = (wrong, *shares.parcels[1:])
        return world.signed("client-3", replace(shares, parcels=parcels).to_bytes())

    session = world.run(world.session(), up=only(Stage.SHARE, "client-3", forge))
    assert world.refused.keys() == {"client-0"}
    assert world.refused["client-0"].startswith("client 'client-3': the shares that it sealed")
    assert np.array_equal(session.total().values, world.expected(session.total().survivors))


def test_masks_for_other_partners_exclude_their_client() -> None:
    world = World(5)

    def forge(answer: bytes) -> bytes:
        masked = Masked.from_bytes(body(answer), world.fixed)
        return world.signed("client-3", replace(masked, partners=bytes(32)).to_bytes())

    session = world.run(world.session(), up=only(Stage.MASK, "client-3", forge))
    assert "masked for other partners" in session.excluded["client-3"]
    assert np.array_equal(session.total().values, world.expected(session.total().survivors))


def test_a_vector_of_another_length_excludes_its_client() -> None:
    world = World(5)

    def forge(answer: bytes) -> bytes:
        masked = Masked.from_bytes(body(answer), world.fixed)
        return world.signed("client-3", replace(masked, vector=masked.vector[:-4]).to_bytes())

    session = world.run(world.session(), up=only(Stage.MASK, "client-3", forge))
    assert "ends too early" in session.excluded["client-3"]
    assert np.array_equal(session.total().values, world.expected(session.total().survivors))


def test_an_answer_too_large_is_refused_by_its_length() -> None:
    world = World(5)
    grow = only(Stage.MASK, "client-3", lambda answer: answer + bytes(1000))
    session = world.run(world.session(), up=grow)
    assert "bytes; at most" in session.excluded["client-3"]


def test_a_confirmation_of_other_lists_excludes_its_client() -> None:
    world = World(5)

    def forge(answer: bytes) -> bytes:
        confirm = Confirm.from_bytes(body(answer))
        return world.signed("client-3", replace(confirm, lists=bytes(32)).to_bytes())

    session = world.run(world.session(), up=only(Stage.CONFIRM, "client-3", forge))
    assert "confirmed other lists" in session.excluded["client-3"]
    assert list(session.total().survivors) == world.names


@pytest.mark.parametrize("which", ["seeds", "keys"])
def test_a_wrong_share_is_found_and_its_holder_excluded(which: str) -> None:
    world = World(6)
    lose = losing({"client-0": Stage.MASK})

    def forge(stage: Stage, name: str, answer: bytes) -> bytes | None:
        if (stage, name) == (Stage.UNMASK, "client-3"):
            reveal = Reveal.from_bytes(body(answer))
            shares = getattr(reveal, which)
            wrong = (_flip_last(shares[0]), *shares[1:])
            return world.signed(name, replace(reveal, **{which: wrong}).to_bytes())
        return lose(stage, name, answer)

    session = world.run(world.session(), up=forge)
    owner = "client-1" if which == "seeds" else "client-0"
    assert f"'client-3': its share of client '{owner}'" in session.excluded["client-3"]
    assert np.array_equal(session.total().values, world.expected(world.names[1:]))


def test_fewer_shares_than_asked_for_exclude_their_holder() -> None:
    world = World(5)

    def forge(answer: bytes) -> bytes:
        reveal = Reveal.from_bytes(body(answer))
        return world.signed("client-3", replace(reveal, seeds=reveal.seeds[1:]).to_bytes())

    session = world.run(world.session(), up=only(Stage.UNMASK, "client-3", forge))
    assert "4 and 0 shares, and 5 and 0 were asked for" in session.excluded["client-3"]
    assert np.array_equal(session.total().values, world.expected(world.names))


@pytest.mark.parametrize("how", ["of no one secret", "of another secret"])
@pytest.mark.parametrize("which", ["seed", "mask key"])
def test_shares_that_do_not_give_the_secret_lose_the_round_and_name_the_dealer(
    which: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the dealer announces is what it seals: nobody but the server can see the fault."""
    world = World(5)
    right = participant.split
    calls: list[int] = []

    def split(secret: bytes, threshold: int, points: Sequence[int], random: Random) -> list[bytes]:
        calls.append(len(calls))  # a client deals its seed, then its mask key; client-0 comes first
        wrong = calls[-1] == (0 if which == "seed" else 1)
        other = wrong and how == "of another secret"
        shares = right(random(32) if other else secret, threshold, points, random)
        if wrong and not other:
            shares[2] = bytes(SHARE_BYTES)
        return shares

    monkeypatch.setattr(participant, "split", split)
    lose = losing({"client-0": Stage.MASK} if which == "mask key" else {})
    with pytest.raises(ProtocolError, match="'client-0': the shares that it dealt do not give"):
        world.run(world.session(), up=lose)


def test_a_commitment_that_was_exchanged_is_seen_by_its_owner() -> None:
    world = World(5)

    def forge(answer: bytes) -> bytes:
        return world.signed(
            "client-0", replace(Advert.from_bytes(body(answer)), commitment=bytes(32)).to_bytes()
        )

    session = world.run(world.session(), up=only(Stage.ADVERTISE, "client-0", forge))
    assert "does not hold the keys that this client advertised" in world.refused["client-0"]
    assert "client-0" not in session.total().survivors


def test_a_sum_that_clients_cannot_reach_is_no_sum() -> None:
    """A client that sends noise is not seen, unless the sum is beyond what the clients can send."""
    world = World(3, bits=64)

    def forge(answer: bytes) -> bytes:
        masked = Masked.from_bytes(body(answer), world.fixed)
        words = np.frombuffer(masked.vector, "<u8") + np.uint64(2**62)
        return world.signed("client-1", replace(masked, vector=words.tobytes()).to_bytes())

    with pytest.raises(FedpeftError, match="the sum of 3 clients lies beyond"):
        world.run(world.session(), up=only(Stage.MASK, "client-1", forge))
