"""What the malicious clients of a study do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedpeft.errors import FedpeftError

Kind = Literal[
    "none", "sign_flip", "scaling", "gaussian", "little_is_enough", "label_flip", "backdoor"
]
ON_DATA = ("label_flip", "backdoor")
"""The attacks that begin with other training examples (``fedpeft.data.poison``)."""


@dataclass(frozen=True)
class Attack:
    """Simulated malicious clients, for tests and studies only.

    kind: ``sign_flip`` sends -factor times the honest update, ``scaling`` factor times it.
    ``gaussian`` sends noise instead. ``little_is_enough`` sends what the attackers' own honest
    updates leave plausible: their mean less z standard deviations. ``label_flip`` trains on class
    C - 1 - y for y. ``backdoor`` trains some examples, with a trigger written into them, on class
    ``target``, and sends factor times the update.
    share: of all clients, how many are malicious. They are the same in every round.
    factor: of ``sign_flip``, ``scaling`` and ``backdoor``.
    std: standard deviation of each number that ``gaussian`` sends.
    z: of ``little_is_enough``; 0: the largest that the paper calls safe (``tampering.safe_z``).
    target, trigger: the backdoor's class number, and the token numbers that should call it up.
    position: which token of an example the trigger overwrites first; 1 spares one that all texts
    begin with. poisoned: the share of an attacker's examples that get the trigger.
    """

    kind: Kind = "none"
    share: float = 0.2
    factor: float = 10.0
    std: float = 1.0
    z: float = 0.0
    target: int = 0
    trigger: tuple[int, ...] = ()
    position: int = 1
    poisoned: float = 0.5

    def check(self) -> None:
        """Raises FedpeftError for a setting that is out of range."""
        for name, share in (("share", self.share), ("poisoned", self.poisoned)):
            if not 0 <= share <= 1:
                raise FedpeftError(f"attack.{name}={share!r}: is a share, give 0 to 1.")
        for name, value in (("factor", self.factor), ("std", self.std), ("z", self.z)):
            if not 0 <= value < math.inf:
                raise FedpeftError(f"attack.{name}={value!r}: give a finite number >= 0.")
        for name, number in (("target", self.target), ("position", self.position)):
            if number < 0:
                raise FedpeftError(f"attack.{name}={number!r}: counts from 0, give 0 or more.")
        if self.kind == "backdoor" and not (self.trigger and min(self.trigger) >= 0):
            raise FedpeftError(
                f"attack.trigger={self.trigger!r}: a backdoor needs one or more token numbers >= 0 "
                "to be called up by; take some that are rare in the data."
            )
