"""Which codec makes a message smaller, and what it does."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fedpeft.errors import FedpeftError

Name = Literal["none", "dense", "topk", "randk", "dare", "compeft", "powersgd"]
Kind = Literal["fp32", "fp16", "bf16", "int8", "int4", "qsgd"]
Way = Literal["auto", "bitmask", "golomb", "coo", "varint"]

CAST = ("fp32", "fp16", "bf16")
"""The kinds of values that are a cast, number by number."""
POSITIONED = ("topk", "compeft")
"""The codecs that send where the kept numbers are."""
SPARSE = ("topk", "randk", "dare", "compeft")
"""The codecs that keep some of the numbers."""
_MOST_ALPHA = 1000.0


@dataclass(frozen=True)
class Codec:
    """How d numbers of a message are written.

    codec: ``none`` sends tensors as they are, without a payload. ``dense`` writes all d numbers.
    ``topk`` keeps the ceil(density * d) largest by magnitude; ``randk`` as many at random, the same
    for everybody who knows the seed, times d/k; ``dare`` each number with probability density,
    divided by it (arXiv 2311.03099). ``compeft`` keeps the signs of the floor(density * d) largest
    and one scale (arXiv 2311.13171). ``powersgd`` writes each matrix as a product of rank ``rank``
    (arXiv 1905.13727), other tensors dense.
    values: how the numbers that are sent are written: a cast; ``int8`` and ``int4`` in steps of
    the largest of each ``block``, rounded at random without bias; ``qsgd`` in ``levels`` steps of
    the norm of each block (arXiv 1610.02132). ``powersgd`` casts only, ``compeft`` has its own.
    density: of the numbers that ``topk``, ``randk``, ``dare`` and ``compeft`` keep, above 0.
    densities: in its place, several to choose from, ascending: the server orders each client one
    anew after every round, by a bandit (``fedpeft.comms.densities``); uplink only.
    positions: how ``topk`` and ``compeft`` write where the kept numbers are; ``auto`` is the
    smallest for each client, or all numbers where that is smaller yet.
    scope: whether ``topk`` chooses among all numbers or in each tensor by itself.
    feedback: whether what a codec loses is added to the client's next update. ``auto``: where the
    codec is biased and would stall without.
    form: whether what is written is the change or the weights themselves; downlink only.
    block: numbers that share a scale, of ``int8``, ``int4`` and ``qsgd``.
    levels: of ``qsgd``, at most 127.
    rank: of ``powersgd``.
    alpha: ``compeft``'s factor of the standard deviation; 0 is the one that fits best,
    sum |kept| / (k * sigma).
    rescale: what ``dare`` divides by instead of the density, between it and 1 (DAREx-q, arXiv
    2410.09344); 0 is the density.
    """

    codec: Name = "none"
    values: Kind = "fp32"
    density: float = 0.1
    densities: tuple[float, ...] = ()
    positions: Way = "auto"
    scope: Literal["all", "tensor"] = "all"
    feedback: Literal["auto", "always", "never"] = "auto"
    form: Literal["update", "weights"] = "update"
    block: int = 256
    levels: int = 127
    rank: int = 4
    alpha: float = 0.0
    rescale: float = 0.0


def biased(settings: Codec) -> bool:
    """Whether the expectation of what arrives is another than what was sent.

    A cast counts as unbiased: what it rounds off is below the values' last digit. DAREx-q trades a
    bias for less variance on purpose and keeps no memory, so it does not count either.
    """
    return settings.codec in ("topk", "compeft", "powersgd")


def feeds_back(settings: Codec) -> bool:
    """Whether the sender keeps what the codec loses and adds it next time."""
    return settings.feedback == "always" or (settings.feedback == "auto" and biased(settings))


def check_codec(settings: Codec, where: str) -> None:
    """Raises FedpeftError for settings out of range, or that mean nothing to the codec.

    where: the key above these settings in the recipe, as ``comms.up``.
    """
    _check_ranges(settings, where)
    _check_densities(settings, where)
    _check_meaning(settings, where)
    _check_feedback(settings, where)


def _check_ranges(settings: Codec, where: str) -> None:
    for name in ("density", "rescale"):
        value = getattr(settings, name)
        if not (0 < value <= 1 or (name == "rescale" and value == 0)):
            least = "0 for the density, or above 0" if name == "rescale" else "above 0"
            raise FedpeftError(f"{where}.{name}={value}: must be {least} and at most 1.")
    most = max(settings.densities, default=settings.density)
    if settings.codec == "dare" and 0 < settings.rescale < most:
        raise FedpeftError(
            f"{where}.rescale={settings.rescale}: DAREx-q divides by a number between "
            f"{where}.density={most} and 1; 0 is the density."
        )
    if not 0 <= settings.alpha <= _MOST_ALPHA:
        raise FedpeftError(
            f"{where}.alpha={settings.alpha}: must be 0 (the best fit) to {_MOST_ALPHA:g}."
        )
    for name, most in (("block", 1 << 16), ("levels", 127), ("rank", 1 << 16)):
        value = getattr(settings, name)
        if not 1 <= value <= most:
            raise FedpeftError(f"{where}.{name}={value}: must be between 1 and {most}.")


def _check_densities(settings: Codec, where: str) -> None:
    """Raises for densities that leave nothing to choose."""
    own, key = settings.densities, f"{where}.densities={list(settings.densities)}"
    if not own:
        return
    ascending = all(a < b for a, b in pairwise(own))
    if not (len(own) > 1 and own[0] > 0 and own[-1] <= 1 and ascending):
        raise FedpeftError(
            f"{key}: must be two numbers or more, ascending, above 0 and at most 1; for one alone "
            f"set {where}.density."
        )
    if settings.density != Codec.density:
        raise FedpeftError(
            f"{where}.density={settings.density} with {key}: the server chooses among these. Leave "
            f"one of the two out."
        )


def _check_meaning(settings: Codec, where: str) -> None:
    """Raises for a setting other than its default that the codec would not look at."""
    name, default = settings.codec, Codec()
    meant = {
        "values": name not in ("none", "compeft"),
        "density": name in SPARSE,
        "densities": name in SPARSE,
        "positions": name in POSITIONED,
        "scope": name == "topk",
        "feedback": name != "none" or settings.feedback == "never",
        "form": name != "none",
        "block": settings.values not in CAST,
        "levels": settings.values == "qsgd",
        "rank": name == "powersgd",
        "alpha": name == "compeft",
        "rescale": name == "dare",
    }
    for key, means in meant.items():
        value = getattr(settings, key)
        if not means and value != getattr(default, key):
            raise FedpeftError(
                f"{where}.{key}={value} means nothing with {where}.codec={name} and "
                f"{where}.values={settings.values}: leave it out, or choose another codec."
            )
    if name == "powersgd" and settings.values not in CAST:
        raise FedpeftError(
            f"{where}.values={settings.values}: with {where}.codec=powersgd the factors are cast "
            f"only ({', '.join(CAST)}): the error of a step would multiply."
        )


def _check_feedback(settings: Codec, where: str) -> None:
    """Raises where fed-back errors would grow: what is lost must be less than what was sent."""
    if settings.feedback != "always":
        return
    if settings.codec == "dare":
        raise FedpeftError(
            f"{where}.feedback=always with {where}.codec=dare: the kept numbers are divided by "
            f"{where}.density, so what is fed back would grow. Use randk or topk."
        )
    if settings.values == "qsgd" and settings.levels**2 < settings.block:
        raise FedpeftError(
            f"{where}.feedback=always with {where}.levels={settings.levels}: what is fed back "
            f"would grow unless levels is at least the root of {where}.block={settings.block}."
        )


def varies(settings: Codec) -> bool:
    """Whether a payload's length depends on the numbers in it, or on what clients learn."""
    by_positions = settings.codec in POSITIONED and settings.positions not in ("bitmask", "coo")
    learned = bool(settings.densities)
    return settings.codec == "dare" or settings.values == "qsgd" or by_positions or learned
