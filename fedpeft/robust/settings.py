"""Which robust rule, for how many attackers, and how many updates it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedpeft.errors import FedpeftError, QuorumError

Rule = Literal[
    "none",
    "norm_clip",
    "median",
    "trimmed_mean",
    "krum",
    "multi_krum",
    "bulyan",
    "geometric_median",
    "fltrust",
]
BY_DISTANCE = ("krum", "multi_krum", "bulyan")
"""The rules that choose among the updates by the distances between them."""
BY_WEIGHT = ("none", "norm_clip", "geometric_median")
"""The rules that can weigh clients unequally."""


@dataclass(frozen=True)
class Robust:
    """How a round's n updates become one.

    rule: ``none`` is the mean by weight. ``norm_clip`` shortens long updates, then takes the mean.
    ``median`` and ``trimmed_mean`` work on each coordinate alone. ``krum`` takes the one update
    with the nearest neighbours, ``multi_krum`` the mean of several, ``bulyan`` a trimmed mean of
    those. ``geometric_median`` (RFA) is nearest to all. ``fltrust`` weighs every update by its
    cosine to one that the server trains on examples of its own.
    attackers: f, how many of the n updates may be arbitrary. It is assumed, never measured: with
    more the result is anybody's. Sets what ``krum``, ``multi_krum`` and ``bulyan`` do; for
    ``median``, ``trimmed_mean`` and ``geometric_median`` it only sets the least n; the others have
    no such bound.
    trim: ``trimmed_mean`` leaves out floor(trim * n) of the smallest and of the largest values of a
    coordinate; 0 <= trim < 1/2.
    keep: how many updates ``multi_krum`` averages (0: n - f, the most that is allowed).
    clip_norm: the norm that ``norm_clip`` shortens to (0: the median of the n norms).
    steps: of ``geometric_median``, at most; it stops where the objective changes by less than one
    in a million. smoothing: its distances count as at least this much.
    weighted: whether ``norm_clip`` and ``geometric_median`` count clients by weight. A client that
    can claim a large weight is then as strong as many: leave it off unless weights are registered.
    space: where ``krum``, ``multi_krum`` and ``bulyan`` measure distances: between the ``factors``
    that were sent, or between the products B A that they stand for. The combination itself is of
    the factors in either case.
    """

    rule: Rule = "none"
    attackers: int = 0
    trim: float = 0.2
    keep: int = 0
    clip_norm: float = 0.0
    steps: int = 100
    smoothing: float = 1e-6
    weighted: bool = False
    space: Literal["factors", "product"] = "factors"

    def cut(self, updates: int) -> int:
        """How many of n values ``trimmed_mean`` leaves out at each end: floor(trim * n)."""
        return math.floor(self.trim * updates + 1e-9)  # 0.29 * 100 is 28.999999999999996

    @property
    def least(self) -> int:
        """The smallest n that the rule takes with these settings."""
        f = self.attackers
        match self.rule:
            case "median" | "geometric_median":
                return 2 * f + 1
            case "trimmed_mean":
                return max(1, math.ceil(f / self.trim - 1e-9)) if f else 1
            case "krum":
                return 2 * f + 3
            case "multi_krum":
                return max(2 * f + 3, self.keep + f)
            case "bulyan":
                return 4 * f + 3
            case _:
                return 1

    def check(self, updates: int) -> None:
        """Whether these settings can combine so many updates.

        Raises FedpeftError for a setting that is out of range or means nothing to the rule, and
        QuorumError where there are fewer updates than ``least``: the round then has no result.
        """
        self.check_settings()
        if updates < self.least:
            raise QuorumError(
                f"robust.rule={self.rule} with {self._bound} needs at least {self.least} updates, "
                f"there are {updates}: sample more clients, assume fewer robust.attackers, or take "
                f"robust.rule={'multi_krum' if self.rule == 'bulyan' else 'median'}."
            )

    def check_settings(self) -> None:
        """Raises FedpeftError for a setting that is out of range or means nothing to the rule."""
        self._check_ranges()
        self._check_meaning()

    @property
    def _bound(self) -> str:
        """The settings that ``least`` comes from."""
        extra = {"trimmed_mean": f", robust.trim={self.trim}"}
        if self.keep:
            extra["multi_krum"] = f", robust.keep={self.keep}"
        return f"robust.attackers={self.attackers}{extra.get(self.rule, '')}"

    def _check_ranges(self) -> None:
        for name, value in (
            ("attackers", self.attackers),
            ("keep", self.keep),
            ("steps", self.steps),
        ):
            if value < 0:
                raise FedpeftError(
                    f"robust.{name}={value!r}: is a number of things, give 0 or more."
                )
        if not 0 <= self.trim < 0.5:
            raise FedpeftError(
                f"robust.trim={self.trim!r}: this share is cut at both ends, give 0 or more and "
                "less than 0.5, or take robust.rule=median."
            )
        if not 0 <= self.clip_norm < math.inf:
            raise FedpeftError(
                f"robust.clip_norm={self.clip_norm!r}: must be a finite norm > 0, or 0 for the "
                "median of the updates' norms."
            )
        if not 0 < self.smoothing < math.inf:
            raise FedpeftError(
                f"robust.smoothing={self.smoothing!r}: is a distance that is divided by, give a "
                "finite number > 0."
            )

    def _check_meaning(self) -> None:
        if self.rule == "trimmed_mean" and self.attackers and not self.trim:
            raise FedpeftError(
                f"robust.trim=0 cuts nothing, so robust.attackers={self.attackers} would stay in "
                "the mean: give the share of attackers or more."
            )
        if self.space == "product" and self.rule not in BY_DISTANCE:
            raise FedpeftError(
                f"robust.space=product: robust.rule={self.rule} measures no distances between "
                f"clients. Leave it at factors, or take one of {', '.join(BY_DISTANCE)}."
            )
        if self.weighted and self.rule not in BY_WEIGHT:
            raise FedpeftError(
                f"robust.weighted=True: robust.rule={self.rule} counts every client once. Leave it "
                f"off, or take one of {', '.join(BY_WEIGHT[1:])}."
            )
