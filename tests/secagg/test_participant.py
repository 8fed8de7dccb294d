"""What a client refuses, whoever asks: nothing out of turn, nothing twice, no two stories."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.errors import FedpeftError
from fedpeft.secagg.codec import ProtocolError
from fedpeft.secagg.envelope import Kind
from fedpeft.secagg.messages import Advert, Parcels, Setup
from fedpeft.secagg.participant import Participant
from fedpeft.secagg.primitives import identity, new_identity
from fedpeft.secagg.session import Session, Stage
from tests.secagg.network import NAME, ROUND, World, at, body, losing, refuses, roster_of

# advertise


def test_a_round_is_never_repeated() -> None:
    world, _, request = at(Stage.ADVERTISE)
    world.answer(NAME, request)
    refuses(world, request, f"round {ROUND} is refused: this client took part in round {ROUND}")
    for round in (ROUND, ROUND - 1):
        other = world.session(round).requests()[NAME]
        refuses(world, other, f"round {round} is refused")
    world.answer(NAME, world.session(ROUND + 1).requests()[NAME])


def test_a_higher_round_takes_the_place_of_one_that_was_given_up() -> None:
    world = World(4)
    world.upto(world.session(1), Stage.CONFIRM)
    session = world.run(world.session(2))
    assert np.array_equal(session.total().values, world.expected(world.names))


def test_a_round_with_clients_of_unknown_identity_is_refused() -> None:
    world = World(5)
    known = {n: key for n, key in world.identities.items() if n != "client-4"}
    client = Participant(NAME, world.secrets[NAME], known)
    with pytest.raises(ProtocolError, match=r"no identity for \['client-4'\]"):
        client.answer(world.session().requests()[NAME], lambda: world.vectors[NAME])


def test_a_round_without_this_client_is_refused() -> None:
    world = World(5)
    own = Participant(
        "other", world.secrets[NAME], {**world.identities, "other": identity(world.secrets[NAME])}
    )
    with pytest.raises(ProtocolError, match="this client is not in it"):
        own.answer(world.session().requests()[NAME], lambda: world.vectors[NAME])


def test_fewer_clients_in_a_sum_than_the_client_allows_are_refused() -> None:
    world = World(6)
    client = Participant(NAME, world.secrets[NAME], world.identities, least=5)
    with pytest.raises(ProtocolError, match="may sum as few as 4 clients, and .* from 5"):
        client.answer(world.session(threshold=4).requests()[NAME], lambda: world.vectors[NAME])
    client.answer(world.session(threshold=5).requests()[NAME], lambda: world.vectors[NAME])


def test_parameters_against_the_rules_are_refused() -> None:
    """The server's own check is not relied on: the bytes are changed."""
    world, _, request = at(Stage.ADVERTISE, clients=6)
    threshold = request.index((4).to_bytes(4, "little") + (6).to_bytes(4, "little"))
    for low in (0, 1, 2, 3, 7):
        changed = request[:threshold] + low.to_bytes(4, "little") + request[threshold + 4 :]
        refuses(world, changed, f"threshold is {low} of 6 clients")
    setup = Setup.from_bytes(request)
    two = object.__new__(Setup)
    for name, value in {**vars(setup), "clients": setup.clients[:2], "threshold": 2}.items():
        object.__setattr__(two, name, value)
    refuses(world, two.to_bytes(), "2 clients cannot aggregate securely")


def test_a_client_whose_key_is_not_in_the_list_is_told_so() -> None:
    secret, public = new_identity()
    Participant("c", secret, {"c": public})
    for known in ({}, {"c": new_identity()[1]}):
        with pytest.raises(FedpeftError, match="client 'c': its public key in the list"):
            Participant("c", secret, known)


# share


def test_a_bad_signature_in_the_roster_is_refused_and_names_the_client() -> None:
    world, _, request = at(Stage.SHARE)
    roster = roster_of(request)
    signed = roster.signed[3]
    for place in (60, 100, 150, len(signed) - 1):  # sender's keys, commitment, signature
        wrong = signed[:place] + bytes([signed[place] ^ 4]) + signed[place + 1 :]
        changed = replace(roster, signed=(*roster.signed[:3], wrong, *roster.signed[4:]))
        refuses(world, changed.to_bytes(), "client 'client-3': its signature does not verify")


def test_keys_that_the_server_put_in_place_of_a_clients_are_refused() -> None:
    world, _, request = at(Stage.SHARE)
    roster = roster_of(request)
    advert = replace(Advert.from_bytes(body(roster.signed[3])), mask_key=bytes(range(32)))
    forged = world.signed("client-2", advert.to_bytes())
    changed = replace(roster, signed=(*roster.signed[:3], forged, roster.signed[4]))
    refuses(world, changed.to_bytes(), "client 'client-3': its signature does not verify")


def test_keys_of_an_older_round_are_refused_and_name_the_client() -> None:
    world = World(5)
    old = world.upto(world.session(1), Stage.SHARE)[NAME]
    roster = roster_of(world.upto(world.session(2), Stage.SHARE)[NAME])
    mixed = replace(roster, signed=(*roster.signed[:3], roster_of(old).signed[3], roster.signed[4]))
    refuses(world, mixed.to_bytes(), "client 'client-3': its advert is of round 1, and .* round 2")
    refuses(world, old, "the roster is of round 1")


def test_keys_of_another_session_of_the_same_round_are_refused() -> None:
    world, _, request = at(Stage.SHARE)
    twin = World(5)
    session = Session(ROUND, twin.identities, twin.fixed)  # another nonce
    other = roster_of(twin.upto(session, Stage.SHARE)[NAME])
    roster = roster_of(request)
    mixed = replace(roster, signed=(*roster.signed[:3], other.signed[3], roster.signed[4]))
    refuses(world, mixed.to_bytes(), "client 'client-3': its advert is of another session")


def test_rosters_that_are_too_short_doubled_or_without_this_client_are_refused() -> None:
    world, _, request = at(Stage.SHARE)
    roster = roster_of(request)
    one, two, three, four, five = roster.signed
    cases = {
        (one, two, three): "3 clients advertised keys; the threshold is 4",
        (one, two, three, four, four): "client 'client-3': it is not in the round, or .* twice",
        (one, three, two, four, five): "client 'client-1': it is not in the round, or .* twice",
        (one, three, four, five): "does not hold the keys that this client advertised",
    }
    for signed, message in cases.items():
        refuses(world, replace(roster, signed=signed).to_bytes(), message)


@pytest.mark.parametrize("which", ["share_key", "mask_key"])
def test_a_key_that_two_clients_advertise_is_refused(which: str) -> None:
    """A colluding client and server, which does not check: the copy is signed rightly."""
    world, _, request = at(Stage.SHARE)
    roster = roster_of(request)
    first, last = (Advert.from_bytes(body(roster.signed[k])) for k in (0, 4))
    copy = replace(last, **{which: getattr(first, which)})
    forged = world.signed("client-4", copy.to_bytes())
    changed = replace(roster, signed=(*roster.signed[:4], forged))
    refuses(world, changed.to_bytes(), "the roster holds a key twice")


# mask


def test_the_vector_is_asked_for_in_its_stage_only() -> None:
    world = World(4)
    session = world.session()
    asked: list[Stage] = []

    def vector(name: str) -> np.ndarray:
        asked.append(session.stage)
        return world.vectors[name]

    while requests := session.requests():
        for name, request in requests.items():
            answer = world.participants[name].answer(request, lambda name=name: vector(name))
            session.receive(name, answer)
        session.close()
    assert asked == [Stage.MASK] * 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 100.0])
def test_a_vector_that_cannot_be_encoded_is_refused_on_the_client(bad: float) -> None:
    world, session, request = at(Stage.MASK)
    world.vectors[NAME] = world.vectors[NAME].copy()
    world.vectors[NAME][3] = bad
    refuses(world, request, "number 3 of the vector (is not finite|lies beyond)")
    world.run(session)
    assert session.excluded == {NAME: "stage mask: no answer"}
    assert np.array_equal(session.total().values, world.expected(session.total().survivors))


@pytest.mark.parametrize("shape", [(30,), (32,), (1, 31), ()])
def test_a_vector_of_another_shape_is_refused_on_the_client(shape: tuple[int, ...]) -> None:
    world, _, request = at(Stage.MASK)
    world.vectors[NAME] = np.zeros(shape)
    refuses(world, request, "shape")


def test_shares_from_nobody_known_or_too_few_or_without_its_own_are_refused() -> None:
    world = World(6)  # threshold 4
    session = world.session()
    request = world.upto(session, Stage.MASK, down=losing({"client-5": Stage.ADVERTISE}))[NAME]
    inbox = Parcels.from_bytes(request, Kind.INBOX)
    zero, one, two, three, four = inbox.parcels
    stranger = replace(four, peer="client-5")
    cases = {
        (zero, one, two): "3 clients shared keys",
        (zero, two, three, four): "this one is left out",
        (zero, one, two, three, stranger): "client 'client-5': it sealed shares but advertised no",
        (zero, one, two, replace(four, peer="client-3")): "client 'client-3': the shares .* open",
    }
    for parcels, message in cases.items():
        refuses(world, replace(inbox, parcels=parcels).to_bytes(), message)


def test_shares_of_an_older_round_are_refused() -> None:
    world = World(5)
    old = world.upto(world.session(1), Stage.MASK)[NAME]
    new = world.upto(world.session(2), Stage.MASK)[NAME]
    refuses(world, old, "the inbox is of round 1, and this is round 2")
    inbox, stale = (Parcels.from_bytes(r, Kind.INBOX) for r in (new, old))
    mixed = replace(inbox, parcels=(*inbox.parcels[:3], stale.parcels[3], inbox.parcels[4]))
    refuses(world, mixed.to_bytes(), "client 'client-3': the shares that it sealed do not open")


def test_shares_for_another_receiver_are_refused() -> None:
    world = World(5)
    requests = world.upto(world.session(), Stage.MASK)
    refuses(world, requests["client-2"], "client 'client-0': the shares that it sealed do not open")


def test_the_masked_vector_is_given_once() -> None:
    world, _, request = at(Stage.MASK)
    world.answer(NAME, request)
    refuses(world, request, "came where SURVIVORS is due; each is answered once")


def test_different_rosters_for_different_clients_are_found_out() -> None:
    """The attack: client-1 is not shown client-4, the others are; all signatures are right."""
    world, _, request = at(Stage.SHARE)
    roster = roster_of(request)
    fewer = replace(roster, signed=roster.signed[:4]).to_bytes()
    answers = {n: world.answer(n, fewer if n == NAME else request) for n in world.names[:4]}
    parcels = []
    for name, answer in answers.items():
        sent = Parcels.from_bytes(body(answer), Kind.SHARES).parcels
        parcels += [replace(each, peer=name) for each in sent if each.peer == NAME]
    place = Parcels.from_bytes(body(answers[NAME]), Kind.SHARES).place
    inbox = Parcels(Kind.INBOX, place, NAME, tuple(parcels))
    refuses(world, inbox.to_bytes(), "client 'client-0': the shares that it sealed do not open")
