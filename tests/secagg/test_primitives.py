"""The primitives against vectors of their RFCs and against one in plain Python."""

from __future__ import annotations

import hashlib
import hmac
import os
import struct

import numpy as np
import pytest

from fedpeft.secagg.codec import ProtocolError
from fedpeft.secagg.fixed import FixedPoint
from fedpeft.secagg.primitives import (
    agree,
    derive,
    digest,
    identity,
    mask,
    new_identity,
    public_key,
    seal,
    sign,
    unseal,
    verified,
)


def chacha20_block(key: bytes, counter: int) -> bytes:
    """RFC 8439, section 2.3, with a nonce of zeros."""
    start = [
        *struct.unpack("<4I", b"expand 32-byte k"),
        *struct.unpack("<8I", key),
        counter,
        0,
        0,
        0,
    ]
    x = list(start)

    def turn(value: int, by: int) -> int:
        return ((value << by) | (value >> (32 - by))) & 0xFFFFFFFF

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for one, two, three, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[one] = (x[one] + x[two]) & 0xFFFFFFFF
            x[three] = turn(x[three] ^ x[one], by)

    for _ in range(10):
        for k in range(4):
            quarter(k, k + 4, k + 8, k + 12)
        for k in range(4):
            quarter(k, 4 + (k + 1) % 4, 8 + (k + 2) % 4, 12 + (k + 3) % 4)
    return struct.pack("<16I", *((a + b) & 0xFFFFFFFF for a, b in zip(x, start, strict=True)))


@pytest.mark.parametrize("bits", [32, 64])
def test_a_mask_is_the_key_stream_of_chacha20(bits: int) -> None:
    key = bytes(range(32))
    fixed = FixedPoint(bits, 1.0, 3, 50)
    stream = b"".join(chacha20_block(key, k) for k in range(7))
    found = mask(key, fixed)
    assert found.dtype == fixed.dtype and found.tobytes() == stream[: 50 * bits // 8]


def test_chacha20_of_zeros_is_that_of_the_rfc() -> None:
    """RFC 8439, appendix A.1, test vector 1."""
    expected = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    assert mask(bytes(32), FixedPoint(32, 1.0, 3, 8)).tobytes().hex() == expected


def test_every_bit_of_the_key_changes_the_mask() -> None:
    fixed = FixedPoint(32, 1.0, 3, 64)
    masks = {mask(bytes(32), fixed).tobytes()}
    for bit in range(256):
        masks.add(mask((1 << bit).to_bytes(32, "little"), fixed).tobytes())
    assert len(masks) == 257


def test_agreement_is_that_of_the_rfc() -> None:
    """RFC 7748, section 6.1."""
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    alice = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    known = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    assert public_key(bob).hex() == known
    assert agree(bob, alice, "alice").hex() == shared


def test_derived_keys_are_hkdf_and_differ_by_purpose_and_parts() -> None:
    """RFC 5869 by hand: extract with a salt of zeros, expand once."""
    secret = os.urandom(32)
    parts = (b"fedpeft secure aggregation 1", b"purpose", b"one", b"two")
    info = b"".join(len(p).to_bytes(8, "little") + p for p in parts)
    extracted = hmac.digest(bytes(32), secret, hashlib.sha256)
    expected = hmac.digest(extracted, info + b"\x01", hashlib.sha256)
    assert derive(secret, "purpose", b"one", b"two") == expected
    others = [("purpose", b"on", b"etwo"), ("purpose", b"onetwo"), ("purpos", b"eone", b"two")]
    assert expected not in {derive(secret, name, *rest) for name, *rest in others}


def test_digests_differ_where_parts_do() -> None:
    assert digest("a", b"bc") != digest("ab", b"c") != digest("a", b"b", b"c")


def test_only_the_owner_of_an_identity_signs() -> None:
    secret, public = new_identity()
    assert identity(secret) == public and new_identity()[0] != secret
    signed = sign(secret, b"text")
    assert verified(public, signed, "c") == b"text"
    for forged in (b"", signed[:-1], b"next" + signed[4:], sign(os.urandom(32), b"text")):
        with pytest.raises(ProtocolError, match="client 'c': its signature does not verify"):
            verified(public, forged, "c")
    with pytest.raises(ProtocolError, match="client 'c'"):
        verified(b"short", signed, "c")


def test_what_is_sealed_opens_with_its_key_and_context_only() -> None:
    key = os.urandom(32)
    sealed = seal(key, b"shares", b"round 1", os.urandom)
    assert unseal(key, sealed, b"round 1", "c") == b"shares"
    changed = bytes([sealed[0] ^ 1]) + sealed[1:]
    for wrong in (
        (os.urandom(32), sealed, b"round 1"),
        (key, sealed, b"round 2"),
        (key, changed, b"round 1"),
    ):
        with pytest.raises(
            ProtocolError, match="client 'c': the shares that it sealed do not open"
        ):
            unseal(*wrong, "c")
    assert seal(key, b"shares", b"round 1", os.urandom) != sealed


def test_masks_are_uniform_on_average() -> None:
    fixed = FixedPoint(64, 1.0, 3, 4000)
    words = mask(bytes(range(32)), fixed).astype(np.float64) / 2.0**64
    assert abs(words.mean() - 0.5) < 0.02 and abs(words.var() - 1 / 12) < 0.005
