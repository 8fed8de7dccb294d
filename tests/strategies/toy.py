"""The toy federation of ``fedpeft.conformance``, under the name that the oracles import it by."""

from __future__ import annotations

from fedpeft.conformance.play import (
    Played,
    Present,
    arrays,
    distance,
    equal,
    everyone,
    meaning,
    play,
    some,
)
from fedpeft.conformance.toy import (
    FAN_IN_FAN_OUT,
    LAYERS,
    OTHERS,
    Arrays,
    Toy,
    ToyCohort,
    a_of,
    b_of,
    make,
)

__all__ = [
    "FAN_IN_FAN_OUT",
    "LAYERS",
    "OTHERS",
    "Arrays",
    "Played",
    "Present",
    "Toy",
    "ToyCohort",
    "a_of",
    "arrays",
    "b_of",
    "distance",
    "equal",
    "everyone",
    "make",
    "meaning",
    "play",
    "some",
]
