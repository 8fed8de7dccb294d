"""What both halves of the protocol compute alike: mask keys, and the shares' keys and contexts."""

from __future__ import annotations

from fedpeft.secagg.messages import Advert
from fedpeft.secagg.primitives import agree, derive, digest


def self_mask_key(seed: bytes, transcript: bytes) -> bytes:
    """The key of the mask that only its owner adds; ``seed`` is shared among all."""
    return derive(seed, "self mask", transcript)


def pair_mask_key(secret: bytes, own: str, peer: Advert) -> bytes:
    """The key of the mask that two clients share; the one whose name comes first adds it.

    secret: the X25519 mask key of ``own``. The other one subtracts the mask.
    """
    names = sorted([own, peer.sender])
    shared = agree(secret, peer.mask_key, peer.sender)
    return derive(shared, "pair mask", peer.place.context, *(name.encode() for name in names))


def adds(own: str, peer: str) -> bool:
    """Whether ``own`` adds the mask that it shares with ``peer``, and does not subtract it."""
    return own < peer


def commitment(seed: bytes, setup: bytes, owner: str) -> bytes:
    """What an advert says of the seed: nothing, and nobody can open it to another seed."""
    return digest("seed", setup, owner.encode(), seed)


def seal_context(transcript: bytes, sender: str, receiver: str) -> bytes:
    """What sealed shares are bound to: round, sender and receiver."""
    return digest("sealed shares", transcript, sender.encode(), receiver.encode())


def share_digest(kind: str, transcript: bytes, dealer: str, holder: str, share: bytes) -> bytes:
    """What a dealer says of each share, so that a wrong one is known by who gave it.

    kind: ``seed`` or ``key``.
    """
    return digest(f"{kind} share", transcript, dealer.encode(), holder.encode(), share)
