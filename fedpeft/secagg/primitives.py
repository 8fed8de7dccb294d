"""The cryptography that the protocol is made of; all of it from the package ``cryptography``.

Every key and digest is bound to a purpose and to the transcript of its round, so that nothing from
one place can be used in another.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedpeft.secagg.codec import ProtocolError
from fedpeft.secagg.fixed import FixedPoint, Words
from fedpeft.secagg.shamir import Random

KEY_BYTES = 32
SIGNATURE_BYTES = 64
NONCE_BYTES = 12
TAG_BYTES = 16

_DOMAIN = b"fedpeft secure aggregation 1"


def _text(purpose: str, parts: tuple[bytes, ...]) -> bytes:
    """An encoding of purpose and parts that no other purpose and parts have."""
    every = (_DOMAIN, purpose.encode(), *parts)
    return b"".join(len(part).to_bytes(8, "little") + part for part in every)


def digest(purpose: str, *parts: bytes) -> bytes:
    """SHA-256 of parts for one purpose. It hides parts that hold 32 random bytes."""
    return hashlib.sha256(_text(purpose, parts)).digest()


def derive(secret: bytes, purpose: str, *parts: bytes) -> bytes:
    """A 32-byte key for one purpose (HKDF-SHA256, RFC 5869)."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=_text(purpose, parts)).derive(secret)


def public_key(secret: bytes) -> bytes:
    """The X25519 public key (RFC 7748) of 32 secret bytes."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agree(secret: bytes, public: bytes, owner: str) -> bytes:
    """The secret that two X25519 keys share. Raises ProtocolError for a key of low order."""
    try:
        peer = X25519PublicKey.from_public_bytes(public)
        return X25519PrivateKey.from_private_bytes(secret).exchange(peer)
    except ValueError as error:
        raise ProtocolError(f"client {owner!r}: its X25519 public key is not valid") from error


def new_identity() -> tuple[bytes, bytes]:
    """A client's long-term Ed25519 keys (RFC 8032), 32 bytes each: secret and public.

    The public one goes to whoever keeps the list of identities.
    """
    secret = os.urandom(KEY_BYTES)
    return secret, identity(secret)


def identity(secret: bytes) -> bytes:
    """The Ed25519 public key of 32 secret bytes."""
    return Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def sign(secret: bytes, body: bytes) -> bytes:
    """``body`` and its Ed25519 signature."""
    key = Ed25519PrivateKey.from_private_bytes(secret)
    return body + key.sign(digest("signature", body))


def verified(public: bytes, signed: bytes, owner: str) -> bytes:
    """The body of what ``sign`` made. Raises ProtocolError where ``owner`` did not sign it."""
    body, signature = signed[:-SIGNATURE_BYTES], signed[-SIGNATURE_BYTES:]
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, digest("signature", body))
    except (InvalidSignature, ValueError) as error:
        raise ProtocolError(
            f"client {owner!r}: its signature does not verify; the message was changed on its way, "
            f"or the list of identities is out of date"
        ) from error
    return body


def seal(key: bytes, plain: bytes, context: bytes, random: Random) -> bytes:
    """Nonce, ciphertext and tag of ChaCha20-Poly1305 (RFC 8439), bound to ``context``."""
    nonce = random(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, plain, context)


def unseal(key: bytes, sealed: bytes, context: bytes, owner: str) -> bytes:
    """What ``seal`` was given. Raises ProtocolError that names ``owner`` where it was changed."""
    nonce, cipher = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, cipher, context)
    except InvalidTag as error:
        raise ProtocolError(
            f"client {owner!r}: the shares that it sealed do not open; they were changed on their "
            f"way, or are of another round"
        ) from error


def mask(key: bytes, fixed: FixedPoint) -> Words:
    """Uniform integers modulo 2^bits ``[size]``: ChaCha20's key stream under all 32 bytes of a key.

    The key is derived for one mask and never used again, so that the nonce may be zero.
    """
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(fixed.size * fixed.dtype.itemsize)), fixed.dtype)
