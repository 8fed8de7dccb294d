"""The server's last step: shares checked, secrets put together, masks taken off the sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedpeft.errors import FedpeftError
from fedpeft.secagg import masking
from fedpeft.secagg.codec import ProtocolError
from fedpeft.secagg.fixed import Words
from fedpeft.secagg.messages import Advert, Parcel, Reveal, Setup, Survivors
from fedpeft.secagg.primitives import mask, public_key
from fedpeft.secagg.shamir import combine


@dataclass(frozen=True)
class Unmasking:
    """What the server knows when vectors are in.

    transcript: digest of the roster. parcels: dealer -> holder -> what the dealer announced.
    """

    setup: Setup
    transcript: bytes
    adverts: Mapping[str, Advert]
    parcels: Mapping[str, Mapping[str, Parcel]]
    lists: Survivors

    def check(self, reveal: Reveal) -> None:
        """Raises ProtocolError unless the shares are those that were dealt to the sender."""
        asked = (len(self.lists.survivors), len(self.lists.dropouts))
        if (len(reveal.seeds), len(reveal.keys)) != asked:
            raise ProtocolError(
                f"client {reveal.sender!r}: it gives {len(reveal.seeds)} and {len(reveal.keys)} "
                f"shares, and {asked[0]} and {asked[1]} were asked for"
            )
        dealt = [("seed", *each) for each in zip(self.lists.survivors, reveal.seeds, strict=True)]
        dealt += [("key", *each) for each in zip(self.lists.dropouts, reveal.keys, strict=True)]
        for kind, dealer, share in dealt:
            parcel = self.parcels[dealer][reveal.sender]
            told = parcel.seed_digest if kind == "seed" else parcel.key_digest
            holder = reveal.sender
            if masking.share_digest(kind, self.transcript, dealer, holder, share) != told:
                raise ProtocolError(
                    f"client {holder!r}: its share of client {dealer!r}'s {kind} is not the one "
                    f"that it was dealt"
                )

    def remove_masks(self, total: Words, reveals: Mapping[str, Reveal]) -> None:
        """Takes all masks off ``total``, in place; ``reveals`` passed ``check``, >= threshold.

        Raises ProtocolError that names a dealer whose shares do not give what it committed to.
        """
        holders = sorted(reveals)[: self.setup.threshold]
        fixed = self.setup.fixed
        for k, owner in enumerate(self.lists.survivors):
            shares = {self.setup.point(h): reveals[h].seeds[k] for h in holders}
            seed = self._secret(owner, shares, self._is_seed)
            total -= mask(masking.self_mask_key(seed, self.transcript), fixed)
        for k, owner in enumerate(self.lists.dropouts):
            shares = {self.setup.point(h): reveals[h].keys[k] for h in holders}
            secret = self._secret(owner, shares, self._is_mask_key)
            for peer in self.lists.survivors:
                pair = mask(masking.pair_mask_key(secret, owner, self.adverts[peer]), fixed)
                if masking.adds(peer, owner):
                    total -= pair
                else:
                    total += pair

    def _is_seed(self, owner: str, secret: bytes) -> bool:
        committed = self.adverts[owner].commitment
        return masking.commitment(secret, self.setup.place().context, owner) == committed

    def _is_mask_key(self, owner: str, secret: bytes) -> bool:
        return public_key(secret) == self.adverts[owner].mask_key

    def _secret(
        self, owner: str, shares: Mapping[int, bytes], is_right: Callable[[str, bytes], bool]
    ) -> bytes:
        try:
            secret = combine(shares)
        except FedpeftError:
            secret = b""
        if not secret or not is_right(owner, secret):
            raise ProtocolError(
                f"client {owner!r}: the shares that it dealt do not give what it committed to; the "
                f"round's sum is lost; begin the round again without this client"
            )
        return secret
