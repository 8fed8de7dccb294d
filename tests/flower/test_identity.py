"""Keys of nodes: from files of the node's operator, never from a message."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedpeft.config import SecureAggregation
from fedpeft.errors import FedpeftError
from fedpeft.federation import Failure
from fedpeft.flower.client_app import app
from fedpeft.flower.federation import FlowerFederation, Patience
from fedpeft.flower.identity import (
    own_keyring,
    read_identities,
    read_secret,
    simulated_identities,
    simulated_keyring,
)
from fedpeft.flower.secure import SecureFlowerFederation
from fedpeft.prepare import prepare
from fedpeft.secagg.primitives import identity, new_identity
from tests.flower.nodes import InProcess
from tests.flower.securely import (
    NAMES,
    assert_same,
    in_process,
    nodes,
    on_real_nodes,
    partial,
    recipe_of,
    sent,
    write_keys,
)

pytestmark = pytest.mark.usefixtures("flower_task")


def pem(key: Any) -> bytes:
    found: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return found


def test_a_secret_key_is_read_from_pem_and_from_hexadecimal_digits(tmp_path: Path) -> None:
    secret, _ = new_identity()
    for text in (
        pem(Ed25519PrivateKey.from_private_bytes(secret)),
        secret.hex().encode(),
        f" {secret.hex().upper()}\n".encode(),
    ):
        (tmp_path / "key").write_bytes(text)
        assert read_secret(tmp_path / "key") == secret


def test_what_is_no_secret_key_is_refused_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "key"
    secret = new_identity()[0].hex()
    for text in (
        secret[:-2].encode(),
        secret.encode() + b"00",
        pem(X25519PrivateKey.generate()),
        b"-----BEGIN PRIVATE KEY-----\n" + secret.encode(),
        b"\xff\xfe",
        b"",
    ):
        path.write_bytes(text)
        with pytest.raises(FedpeftError, match="holds no Ed25519 secret key") as caught:
            read_secret(path)
        assert secret[:16] not in str(caught.value)
    with pytest.raises(FedpeftError, match=r"identity='.*nowhere' cannot be read \(No such file"):
        read_secret(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is no JSON"),
        ("[]", "must be an object"),
        ('{"c0": 7}', "the public key of client 'c0' must be 64 hexadecimal digits"),
        ('{"c0": "00"}', "the public key of client 'c0' must be 64 hexadecimal digits"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "all.json").write_text(text)
    with pytest.raises(FedpeftError, match=reason):
        read_identities(tmp_path / "all.json")


def test_a_real_node_needs_both_files() -> None:
    with pytest.raises(FedpeftError, match="needs node config identity and identities: "):
        own_keyring({"client": "c0"})
    with pytest.raises(FedpeftError, match="needs node config identities: "):
        own_keyring({"identity": "x"})


def test_simulated_keys_belong_to_seed_and_client() -> None:
    ring = simulated_keyring(3, "b", ("a", "b"))
    assert ring.identities == simulated_identities(3, ("a", "b"))
    assert ring.identities["b"] == identity(ring.secret) != ring.identities["a"]
    assert simulated_identities(4, ("a", "b"))["b"] != ring.identities["b"]
    assert ring.secret.hex() not in repr(ring) and repr(ring.secret) not in repr(ring)


def test_real_nodes_with_their_own_keys_give_the_same_sum(tiny: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny)
    prepared, config = prepare(recipe), write_keys(tmp_path / "keys")
    found = partial(
        on_real_nodes(prepared, InProcess(config, app=app), tmp_path / "keys").run(
            1, sent(prepared)
        )
    )
    assert_same(found, partial(in_process(recipe).run(1, sent(prepared))))


def test_an_impostor_is_excluded_alone(tiny: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny)
    prepared, config = prepare(recipe), write_keys(tmp_path / "keys")
    listed = json.loads((tmp_path / "keys" / "all.json").read_text())
    secret, listed["c2"] = new_identity()[0], "set below"
    listed["c2"] = identity(secret).hex()
    (tmp_path / "own.json").write_text(json.dumps(listed))
    (tmp_path / "own.key").write_text(secret.hex())
    paths = {"identity": str(tmp_path / "own.key"), "identities": str(tmp_path / "own.json")}
    config[12] = {"client": "c2", **paths}
    found = partial(
        on_real_nodes(prepared, InProcess(config, app=app), tmp_path / "keys").run(
            1, sent(prepared)
        )
    )
    assert_same(found, partial(in_process(recipe, ("c2",)).run(1, sent(prepared))))
    assert "client 'c2': its signature does not verify" in found.excluded["c2"]


def test_clients_whose_lists_the_server_wrote_are_not_believed(tiny: Path, tmp_path: Path) -> None:
    """A server that plays c2 with a key of its own is refused by those who know c2's key."""
    prepared, config = prepare(recipe_of(tiny)), write_keys(tmp_path / "keys")
    secret, public = new_identity()
    listed = json.loads((tmp_path / "keys" / "all.json").read_text()) | {"c2": public.hex()}
    (tmp_path / "server.json").write_text(json.dumps(listed))
    (tmp_path / "own.key").write_text(secret.hex())
    paths = {"identity": str(tmp_path / "own.key"), "identities": str(tmp_path / "server.json")}
    config[12] = {"client": "c2", **paths}
    federation = on_real_nodes(prepared, InProcess(config, app=app), tmp_path / "keys")
    federation._identities = read_identities(tmp_path / "server.json")
    reasons = {one.client: one.reason for one in federation.run(1, sent(prepared))}
    assert reasons.keys() == set(NAMES)
    for name in ("c0", "c1", "c3"):
        assert reasons[name].startswith("stage share: ProtocolError: client 'c2': its signature")


def test_the_server_needs_every_clients_public_key(tiny: Path) -> None:
    prepared = prepare(recipe_of(tiny))
    inner = FlowerFederation(InProcess(nodes()), prepared.recipe, 4)
    with pytest.raises(FedpeftError, match="1 clients have no public key.*'c3' first"):
        SecureFlowerFederation(prepared, inner, simulated_identities(0, NAMES[:3]))


def reasons_of(tiny: Path, recipe: Any, config: dict[int, dict[str, Any]], kind: str) -> set[str]:
    """What real nodes say to a request for training."""
    prepared = prepare(recipe)
    grid = InProcess(config, app=app)
    inner = FlowerFederation(grid, recipe, 4, None, Patience(0.05, 5.0))
    found = [outcome for _, outcome in inner.ask(kind, 1, [sent(prepared)])]
    assert len(found) == 4
    return {one.reason if isinstance(one, Failure) else "answered" for one in found}


def test_a_client_gives_nothing_in_clear_where_the_recipe_or_its_operator_forbid(
    tiny: Path, tmp_path: Path
) -> None:
    secure = recipe_of(tiny)
    plain = dataclasses.replace(secure, secure_aggregation=SecureAggregation())
    keys, bare = write_keys(tmp_path / "keys"), {k: {"client": n} for k, n in enumerate(NAMES)}
    assert reasons_of(tiny, plain, bare, "train") == {"answered"}
    [reason] = reasons_of(tiny, secure, keys, "train")
    assert "answers under secure aggregation only" in reason
    [reason] = reasons_of(tiny, plain, keys, "train")
    assert "node config identity: this node trains under secure aggregation only" in reason
    [reason] = reasons_of(tiny, plain, keys, "train.secure")
    assert "the recipe does not say so" in reason
    [reason] = reasons_of(tiny, secure, bare, "train.secure")
    assert "blob 'secagg' is missing from the request" in reason


def test_a_real_node_never_takes_a_simulations_keys(tiny: Path) -> None:
    prepared = prepare(recipe_of(tiny))
    inner = FlowerFederation(
        InProcess(nodes(), app=app), prepared.recipe, 4, None, Patience(0.05, 5.0)
    )
    federation = SecureFlowerFederation(prepared, inner, simulated_identities(0, NAMES))
    found = list(federation.run(1, sent(prepared)))
    assert len(found) == 4
    for one in found:
        assert isinstance(one, Failure)
        assert "needs node config identity and identities" in one.reason
