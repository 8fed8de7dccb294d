"""Who signs as whom under secure aggregation: the nodes' Ed25519 keys.

On real nodes both come from the node's operator, by node config, and never from a message:
``identity`` is a file with the node's own secret key (PEM, as ``openssl genpkey -algorithm
ed25519`` writes it, or 64 hexadecimal digits), ``identities`` a JSON file with every client's
public key::

    {"client-000": "64 hexadecimal digits", "client-001": ...}

The node must be able to write into the folder of ``identity`` (see ``store``). A server that handed
out the public keys could play all other clients itself, and see the last one's vector. In a
simulation keys follow from the recipe's seed: it is one machine, and nothing is hidden from it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedpeft.errors import FedpeftError
from fedpeft.secagg.primitives import KEY_BYTES, derive, identity


@dataclass(frozen=True)
class Keyring:
    """A client's Ed25519 secret, 32 bytes, and all clients' public keys by name."""

    secret: bytes = field(repr=False)
    identities: Mapping[str, bytes]


def own_keyring(node_config: Mapping[str, object]) -> Keyring:
    """The keys that a real node's operator gave it. Raises FedpeftError where they are missing."""
    missing = [key for key in ("identity", "identities") if not node_config.get(key)]
    if missing:
        raise FedpeftError(
            f"secure_aggregation.enabled needs node config {' and '.join(missing)}: identity=FILE "
            f"with this node's Ed25519 secret key, identities=FILE with all clients' public keys "
            f"(JSON, name -> hex). Take neither from the server that aggregates."
        )
    secret = read_secret(Path(str(node_config["identity"])))
    return Keyring(secret, read_identities(Path(str(node_config["identities"]))))


def simulated_keyring(seed: int, client: str, clients: tuple[str, ...]) -> Keyring:
    """A simulated client's keys, the same in every process of the run. They protect nobody."""
    return Keyring(_simulated_secret(seed, client), simulated_identities(seed, clients))


@functools.lru_cache(maxsize=1)
def simulated_identities(seed: int, clients: tuple[str, ...]) -> Mapping[str, bytes]:
    """All simulated clients' public keys."""
    return {name: identity(_simulated_secret(seed, name)) for name in clients}


def _simulated_secret(seed: int, client: str) -> bytes:
    return derive(f"simulation {seed}".encode(), "simulated identity", client.encode())


def read_secret(path: Path) -> bytes:
    """An Ed25519 secret key, 32 bytes, from PEM or hexadecimal digits.

    Raises FedpeftError, which says nothing of the content, where the file holds none.
    """
    text = _read(path, "identity")
    if text.lstrip().startswith(b"-----BEGIN"):
        try:
            key = load_pem_private_key(text, password=None)
        except (ValueError, TypeError):
            key = None
        if isinstance(key, Ed25519PrivateKey):
            return key.private_bytes_raw()
    else:
        found = _from_hex(text.decode("ascii", "replace"))
        if found is not None:
            return found
    raise FedpeftError(
        f"identity={str(path)!r} holds no Ed25519 secret key: it must be unencrypted PEM, or "
        f"{2 * KEY_BYTES} hexadecimal digits."
    )


def read_identities(path: Path) -> dict[str, bytes]:
    """All clients' public keys by name. Raises FedpeftError where the file is no such list."""
    try:
        listed = json.loads(_read(path, "identities"))
    except (ValueError, RecursionError) as error:
        raise FedpeftError(f"identities={str(path)!r} is no JSON: {error}") from error
    if not isinstance(listed, dict):
        raise FedpeftError(f"identities={str(path)!r} must be an object: client -> public key.")
    found = {}
    for name, value in listed.items():
        key = _from_hex(value) if isinstance(value, str) else None
        if key is None:
            raise FedpeftError(
                f"identities={str(path)!r}: the public key of client {name!r} must be "
                f"{2 * KEY_BYTES} hexadecimal digits."
            )
        found[name] = key
    return found


def _from_hex(text: str) -> bytes | None:
    try:
        found = bytes.fromhex(text.strip())
    except ValueError:
        return None
    return found if len(found) == KEY_BYTES else None


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FedpeftError(
            f"{key}={str(path)!r} cannot be read ({error.strerror}): name a file on this machine."
        ) from error
