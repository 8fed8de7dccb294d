"""Mechanisms as data: what was released, so that any accountant can say later what it cost.

An event says nothing of epsilon. Its neighbouring relation is add-or-remove one unit (an example or
a client, as the mechanism that made it says), its noise multiplier is the noise's standard
deviation over the sensitivity. The idea is dp_accounting's DpEvent; only what fedpeft's mechanisms
need is here, and all of it composes into (rate, noise multiplier) -> how often.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from fedpeft.errors import FedpeftError, suggest

Counts: TypeAlias = dict[tuple[float, float], int]
"""(sampling rate, noise multiplier) -> how many releases; rate 1 is the plain Gaussian."""

History: TypeAlias = tuple[tuple[tuple[float, float], int], ...]
"""The sorted items of Counts: hashable, so that what it costs can be cached."""

MOST_TIMES = 10**12
_DEEPEST = 32


@dataclass(frozen=True)
class Nothing:
    """No release."""


@dataclass(frozen=True)
class Gaussian:
    """One release with Gaussian noise, in which the unit takes part for certain.

    noise_multiplier: standard deviation over L2 sensitivity, positive and finite.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        noise = _number("noise_multiplier", self.noise_multiplier)
        object.__setattr__(self, "noise_multiplier", noise)


@dataclass(frozen=True)
class SampledGaussian:
    """One release with Gaussian noise over a Poisson sample: each unit is in it with ``rate``.

    Only independent draws per unit count (Poisson). Fixed-size samples and shuffled passes are
    other mechanisms and must not be described as this one. rate: in (0, 1].
    """

    rate: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        rate = _number("rate", self.rate)
        if rate > 1:
            raise FedpeftError(
                f"rate={self.rate} is no probability. Give a sampling rate in (0, 1], e.g. "
                "expected batch / examples."
            )
        object.__setattr__(self, "rate", rate)
        noise = _number("noise_multiplier", self.noise_multiplier)
        object.__setattr__(self, "noise_multiplier", noise)


@dataclass(frozen=True)
class Repeated:
    """The same event ``times`` times (1 to 10^12), each with fresh noise; adaptive is allowed."""

    event: Event
    times: int

    def __post_init__(self) -> None:
        _check_event(self.event)
        if type(self.times) is not int or not 1 <= self.times <= MOST_TIMES:
            raise FedpeftError(
                f"times={self.times!r} must be a whole number from 1 to {MOST_TIMES}. For no "
                "release use Nothing()."
            )


@dataclass(frozen=True)
class Composed:
    """All of ``events``, in any order, each with its own noise."""

    events: tuple[Event, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "events", tuple(self.events))
        for event in self.events:
            _check_event(event)


Event: TypeAlias = Nothing | Gaussian | SampledGaussian | Repeated | Composed

_KINDS: Mapping[str, frozenset[str]] = {
    "nothing": frozenset(),
    "gaussian": frozenset({"noise_multiplier"}),
    "sampled_gaussian": frozenset({"rate", "noise_multiplier"}),
    "repeated": frozenset({"event", "times"}),
    "composed": frozenset({"events"}),
}


def flatten(event: Event) -> Counts:
    """How often each (rate, noise multiplier) occurs; equal ones are added, Nothing is left out.

    Order does not matter under composition, so this is all that an accountant needs. Raises
    FedpeftError where repetitions of repetitions make more than 10^12 of one.
    """
    counts: Counts = {}
    waiting: list[tuple[Event, int]] = [(event, 1)]
    while waiting:
        one, times = waiting.pop()
        match one:
            case Repeated(event=inner, times=more):
                waiting.append((inner, times * more))
            case Composed(events=events):
                waiting += [(inner, times) for inner in events]
            case Gaussian(noise_multiplier=noise):
                counts[1.0, noise] = counts.get((1.0, noise), 0) + times
            case SampledGaussian(rate=rate, noise_multiplier=noise):
                counts[rate, noise] = counts.get((rate, noise), 0) + times
            case Nothing():
                pass
    if max(counts.values(), default=0) > MOST_TIMES:
        raise FedpeftError(f"a privacy event repeats one release more than {MOST_TIMES} times.")
    return counts


def history(event: Event) -> History:
    """``flatten`` as a sorted tuple; equal for events that release the same in any order."""
    return tuple(sorted(flatten(event).items()))


def join(one: History, other: History, times: int = 1) -> History:
    """``one`` and ``other``, the latter ``times`` times, as one history."""
    counts = dict(one)
    for release, n in other:
        counts[release] = counts.get(release, 0) + n * times
    return tuple(sorted(counts.items()))


def unflatten(counts: Mapping[tuple[float, float], int]) -> Event:
    """The canonical event of ``counts``: equal counts give equal events, whatever their order."""
    parts: list[Event] = []
    for (rate, noise), times in sorted(counts.items()):
        one = Gaussian(noise) if rate == 1 else SampledGaussian(rate, noise)
        parts.append(one if times == 1 else Repeated(one, times))
    if not parts:
        return Nothing()
    return parts[0] if len(parts) == 1 else Composed(tuple(parts))


def compose(events: Iterable[Event]) -> Event:
    """All of ``events`` as one canonical event; see ``unflatten``."""
    return unflatten(flatten(Composed(tuple(events))))


def as_json(event: Event) -> dict[str, object]:
    """The event as plain JSON values; ``from_json`` reads it back, equal to the last bit."""
    match event:
        case Gaussian(noise_multiplier=noise):
            return {"kind": "gaussian", "noise_multiplier": noise}
        case SampledGaussian(rate=rate, noise_multiplier=noise):
            return {"kind": "sampled_gaussian", "rate": rate, "noise_multiplier": noise}
        case Repeated(event=inner, times=times):
            return {"kind": "repeated", "event": as_json(inner), "times": times}
        case Composed(events=events):
            return {"kind": "composed", "events": [as_json(inner) for inner in events]}
        case Nothing():
            return {"kind": "nothing"}


def from_json(value: object) -> Event:
    """The event that ``as_json`` wrote. Raises FedpeftError for anything else."""
    return _parse(value, _DEEPEST)


def _parse(value: object, deeper: int) -> Event:
    if deeper == 0:
        raise FedpeftError(f"a privacy event is nested deeper than {_DEEPEST} levels. Flatten it.")
    match value:
        case {"kind": str(kind)} if isinstance(value, dict):
            fields = {name: field for name, field in value.items() if name != "kind"}
            _check_fields(kind, fields)
        case _:
            raise FedpeftError(
                f"a privacy event must be a JSON object with a kind, not {str(value)[:80]!r}."
            )
    match kind:
        case "gaussian":
            return Gaussian(_read(fields["noise_multiplier"]))
        case "sampled_gaussian":
            return SampledGaussian(_read(fields["rate"]), _read(fields["noise_multiplier"]))
        case "repeated":
            return Repeated(_parse(fields["event"], deeper - 1), _whole(fields["times"]))
        case "composed":
            events = fields["events"]
            if not isinstance(events, list):
                raise FedpeftError(f"events of a composed event must be a list, not {events!r}.")
            return Composed(tuple(_parse(inner, deeper - 1) for inner in events))
        case _:
            return Nothing()


def _check_fields(kind: str, fields: Mapping[str, object]) -> None:
    if kind not in _KINDS:
        raise FedpeftError(f"privacy event of kind {kind!r} is unknown. {suggest(kind, _KINDS)}")
    if fields.keys() != _KINDS[kind]:
        raise FedpeftError(
            f"a privacy event of kind {kind!r} must hold exactly {sorted(_KINDS[kind])}, it holds "
            f"{sorted(fields)}."
        )


def _read(value: object) -> float:
    if not isinstance(value, int | float):
        raise FedpeftError(f"a figure of a privacy event must be a number, not {value!r}.")
    return value


def _whole(value: object) -> int:
    if type(value) is not int:
        raise FedpeftError(f"times of a privacy event must be a whole number, not {value!r}.")
    return value


def _number(name: str, value: float) -> float:
    """``value`` as a positive, finite float. Raises FedpeftError where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FedpeftError(f"{name}={value!r} must be a number, not a {type(value).__name__}.")
    if not 0 < value <= sys.float_info.max:
        raise FedpeftError(
            f"{name}={value} must be positive and finite. For no release use Nothing()."
        )
    return float(value)


def _check_event(event: object) -> None:
    if not isinstance(event, Nothing | Gaussian | SampledGaussian | Repeated | Composed):
        raise FedpeftError(f"{event!r} is not a privacy event. Use one of {', '.join(_KINDS)}.")
