"""What is summed of the replies to one message, for clients and server alike.

The numbers of ``fedpeft.secure.Vectors``, in the same order: ``weight * update``, the weight, and
the weighed bit where the bound adapts. There replies are at hand; here their shapes follow from the
message that was sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedpeft.cohort.federation import client_weights
from fedpeft.errors import FedpeftError
from fedpeft.prepare import Prepared
from fedpeft.privacy.client_level import ClientLevel
from fedpeft.secagg.fixed import FixedPoint
from fedpeft.secagg.messages import MIN_CLIENTS, Setup
from fedpeft.secure import Summed
from fedpeft.strategy import Messages

CLOSE = 1e-6
"""Bounds that server and client compute on different machines may differ by this share."""


class Rules:
    """What a recipe says of its sums; the same for server and clients."""

    def __init__(self, prepared: Prepared) -> None:
        self._strategy = prepared.strategy
        self._rounds = prepared.recipe.rounds
        self._settings = prepared.recipe.secure_aggregation
        self._level = level_of(prepared)
        self._bits = self._level.adaptive is not None  # whether clients send one

    def least(self, clients: int) -> int:
        """The fewest of so many clients that are summed; as many as must share the noise."""
        sharers = self._level.least if self._level.place == "shares" else 0
        return max(MIN_CLIENTS, math.ceil(self._settings.threshold * clients), sharers)

    def summed(self, sent: Messages) -> Summed:
        """What is summed of the replies to a message (to the first of a stack)."""
        return Summed(self._strategy.expects(sent[0]), self._bits)

    def fixed_point(self, sent: Messages, examples: Sequence[int]) -> FixedPoint:
        """How clients with so many examples encode their replies to ``sent``."""
        heaviest = float(client_weights(list(examples), self._rounds).max())
        return FixedPoint(
            bits=self._settings.bits,
            clip=self._level.reach(sent),
            clients=len(examples),
            length=self.summed(sent).length,
            weight_max=heaviest,
            extras=(heaviest,) * (1 + self._bits),
        )

    def check_setup(self, setup: Setup, examples: int) -> None:
        """Raises FedpeftError for parameters that a client with so many examples refuses."""
        fixed, settings = setup.fixed, self._settings
        weight = float(client_weights([examples], self._rounds)[0])
        least = self.least(len(setup.clients))
        if fixed.bits != settings.bits:
            raise _refused("bits", fixed.bits, f"secure_aggregation.bits={settings.bits}")
        if setup.threshold < least:
            raise _refused("threshold", setup.threshold, f"at least {least}")
        if len(fixed.extras) != 1 + self._bits:
            raise _refused("extras", fixed.extras, f"{1 + self._bits} bounds")
        if min(fixed.weight_max, *fixed.extras) < weight:
            raise _refused("weight_max, extras", fixed.weight_max, f"at least {weight:g}")

    def check_sent(self, fixed: FixedPoint, sent: Messages) -> None:
        """Raises FedpeftError where sums are set up for other replies than those to ``sent``."""
        clip, length = self._level.reach(sent), self.summed(sent).length
        if not math.isclose(fixed.clip, clip, rel_tol=CLOSE):
            raise _refused("clip", fixed.clip, f"{clip:g}")
        if fixed.length != length:
            raise _refused("length", fixed.length, f"{length}")


def level_of(prepared: Prepared) -> ClientLevel:
    """What clips the updates of a recipe under secure aggregation."""
    level = prepared.level
    if level is None:
        raise FedpeftError(
            "secure_aggregation.enabled must be true for sums; the recipe says false."
        )
    return level


def _refused(name: str, value: object, rule: str) -> FedpeftError:
    return FedpeftError(
        f"secure aggregation was set up with {name}={value}, and by the recipe it must be {rule}: "
        f"this client does not take part."
    )
