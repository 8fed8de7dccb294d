"""The last stages of a client: one list, one answer, no secret kept; and its state in between."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.secagg.codec import ProtocolError
from fedpeft.secagg.envelope import Kind
from fedpeft.secagg.messages import Confirm, Reveal, Setup, Signatures, Survivors
from fedpeft.secagg.primitives import digest
from fedpeft.secagg.session import Stage
from tests.secagg.network import NAME, ROUND, World, at, body, losing, only, refuses


def lists(world: World, request: bytes, survivors: str, dropouts: str) -> bytes:
    """A list of survivors and dropouts, by the digits of their names."""
    both = (tuple(f"client-{k}" for k in digits) for digits in (survivors, dropouts))
    place = Survivors.from_bytes(request).place
    return Survivors(place, *both).to_bytes()


@pytest.mark.parametrize(
    ("survivors", "dropouts", "message"),
    [
        ("01234", "3", "client 'client-3' is listed both as survivor and as dropout"),
        ("0123", "34", "client 'client-3' is listed both as survivor and as dropout"),
        ("0123", "", "client 'client-4': survivors and dropouts must be those who shared keys"),
        ("01235", "4", "client 'client-5': survivors and dropouts must be those"),
        ("0123", "45", "client 'client-5': survivors and dropouts must be those"),
        ("0234", "1", "is not listed as survivor"),
        ("012", "34", "3 clients survive; the threshold is 4"),
        ("", "01234", "is not listed as survivor"),
    ],
)
def test_lists_against_the_rules_are_refused(survivors: str, dropouts: str, message: str) -> None:
    world, session, request = at(Stage.CONFIRM)
    refuses(world, lists(world, request, survivors, dropouts), message)
    world.run(session)
    assert session.excluded == {}


def test_lists_of_an_older_round_are_refused() -> None:
    world = World(5)
    old = world.upto(world.session(1), Stage.CONFIRM)[NAME]
    world.upto(world.session(2), Stage.CONFIRM)
    refuses(world, old, "the list of survivors is of round 1, and this is round 2")


def test_one_list_is_confirmed_and_no_second() -> None:
    world, _, request = at(Stage.CONFIRM)
    world.answer(NAME, request)
    refuses(world, request, "came where CONFIRMED is due")
    refuses(world, lists(world, request, "0123", "4"), "came where CONFIRMED is due")


def test_nothing_is_unmasked_twice() -> None:
    world, _, request = at(Stage.UNMASK)
    world.answer(NAME, request)
    refuses(world, request, "no round is under way here")


def test_a_survivors_seed_and_a_dropouts_key_are_given_and_nothing_else() -> None:
    world = World(5)
    session = world.session()
    request = world.upto(session, Stage.UNMASK, down=losing({"client-4": Stage.MASK}))[NAME]
    client = world.participants[NAME]
    own = client._round
    assert own is not None
    held = client._open(own.inbox, own, client._adverts(own.roster, Setup.from_bytes(own.setup)))
    reveal = Reveal.from_bytes(body(world.answer(NAME, request)))
    assert reveal.seeds == tuple(held[f"client-{k}"][0] for k in range(4))
    assert reveal.keys == (held["client-4"][1],)


def test_different_lists_for_different_clients_are_found_out() -> None:
    """The attack: one half is told that client-4 survived, the other half that it dropped out."""
    world, session, request = at(Stage.CONFIRM)
    other = lists(world, request, "0123", "4")
    answers = {
        n: world.answer(n, other if n in ("client-0", "client-2") else request) for n in world.names
    }
    place = Survivors.from_bytes(request).place
    everybody = Signatures(Kind.CONFIRMED, place, tuple(answers.values())).to_bytes()
    refuses(world, everybody, "client 'client-0' was shown other lists of survivors")
    agreeing = tuple(answers[n] for n in ("client-1", "client-3", "client-4"))
    few = Signatures(Kind.CONFIRMED, place, agreeing).to_bytes()
    refuses(world, few, "3 survivors confirmed the lists; the threshold is 4")
    assert session.stage is Stage.CONFIRM


def test_confirmations_that_are_forged_doubled_or_of_nobody_are_refused() -> None:
    world, _, request = at(Stage.UNMASK)
    message = Signatures.from_bytes(request, Kind.CONFIRMED)
    one = Confirm.from_bytes(body(message.signed[0]))
    forged = world.signed("client-4", one.to_bytes())
    stranger = world.signed("client-4", replace(one, sender="client-9").to_bytes())
    stale = world.signed(
        "client-0", replace(one, place=replace(one.place, context=digest("x"))).to_bytes()
    )
    rest = message.signed[1:]
    cases = {
        (forged, *rest): "client 'client-0': its signature does not verify",
        (stranger, *rest): "client 'client-9': it is no survivor",
        (rest[0], *rest): "client 'client-1': it is no survivor, or confirmed twice",
        (stale, *rest): "client 'client-0': its confirmation is of another session",
        rest[:3]: "3 survivors confirmed the lists; the threshold is 4",
    }
    for signed, text in cases.items():
        refuses(world, replace(message, signed=signed).to_bytes(), text)


def test_stages_come_in_order() -> None:
    world = World(4)
    requests: list[bytes] = []
    session = world.session()
    while asked := session.requests():
        requests.append(asked[NAME])
        world.exchange(session)
    fresh = World(4)
    for request in requests[1:]:
        refuses(fresh, request, "no round is under way here")
    fresh.answer(NAME, requests[0])
    for request in requests[2:]:
        refuses(fresh, request, "came where ROSTER is due")
    for kind in (Kind.ADVERT, Kind.SHARES, Kind.MASKED, Kind.CONFIRM, Kind.REVEAL):
        changed = requests[1][:4] + bytes([kind]) + requests[1][5:]
        refuses(fresh, changed, "came where ROSTER is due")


# state


def test_a_round_goes_on_from_saved_states() -> None:
    world = World(5)
    session = world.session()
    while session.requests():
        saved = {name: client.state() for name, client in world.participants.items()}
        for name in world.names:
            world.participants[name] = world.participant(name)
            world.participants[name].restore(saved[name])
            assert world.participants[name].state() == saved[name]
        world.exchange(session)
    assert session.excluded == {} and world.refused == {}
    assert np.array_equal(session.total().values, world.expected(world.names))


def test_secrets_are_gone_after_unmask() -> None:
    world = World(4)
    client = world.participants[NAME]
    session = world.session()
    world.upto(session, Stage.UNMASK)
    own = client._round
    assert own is not None
    secrets = (own.share_secret, own.mask_secret, own.seed)
    assert all(secret in client.state() for secret in secrets)
    world.run(session)
    assert client._round is None and not any(secret in client.state() for secret in secrets)
    again = world.participant(NAME)
    again.restore(client.state())
    world.participants[NAME] = again
    refuses(world, world.session(ROUND).requests()[NAME], f"took part in round {ROUND}")


def test_a_state_that_is_damaged_older_or_anothers_is_refused() -> None:
    world, _, _ = at(Stage.MASK)
    client = world.participants[NAME]
    state = client.state()
    for k in range(0, len(state), 37):
        with pytest.raises(ProtocolError, match="is damaged"):
            client.restore(state[:k] + bytes([state[k] ^ 1]) + state[k + 1 :])
        with pytest.raises(ProtocolError, match="is damaged"):
            client.restore(state[:k])
    with pytest.raises(ProtocolError, match="is another client's"):
        client.restore(world.participants["client-2"].state())
    with pytest.raises(ProtocolError, match="older than what it has done"):
        client.restore(world.participant(NAME).state())
    assert client.state() == state


def test_a_client_that_refuses_is_a_dropout_and_the_round_goes_on() -> None:
    world = World(5)

    def damage(request: bytes) -> bytes:
        return request[:-1] + bytes([request[-1] ^ 1])

    session = world.run(world.session(), down=only(Stage.MASK, NAME, damage))
    assert world.refused.keys() == {NAME}
    assert np.array_equal(session.total().values, world.expected(session.total().survivors))
