"""What a recipe's communication may be."""

from __future__ import annotations

import re

from fedpeft.codecs.settings import Codec, check_codec
from fedpeft.config import Comms, Recipe
from fedpeft.errors import FedpeftError

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{letter}i": 2 ** (10 * n) for n, letter in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?|[KMGT]i)B")


def budget_of(comms: Comms) -> int:
    """The bytes that a run may send in all; 0 for no bound.

    Raises FedpeftError for a text that is no number of bytes.
    """
    return size_of("comms.budget", comms.budget) if comms.budget else 0


def size_of(key: str, text: str) -> int:
    """The bytes that a text names. Raises FedpeftError for one that is no number of bytes."""
    found = _SIZE.fullmatch(text.strip())
    size = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise FedpeftError(
            f"{key}={text!r} must be a number and B, kB, MB, GB, TB, KiB, MiB, GiB or TiB, as "
            f"50 MB: above 0."
        )
    return size


def check_comms(recipe: Recipe) -> None:
    """Raises FedpeftError that names the settings which are out of range or do not go together."""
    up, down = recipe.comms.up, recipe.comms.down
    check_codec(up, "comms.up")
    check_codec(down, "comms.down")
    budget_of(recipe.comms)
    if up.form != Codec.form:
        raise FedpeftError(
            f"comms.up.form={up.form}: only what clients are sent can be coded as weights; of what "
            f"they reply it is the update. Leave comms.up.form out."
        )
    if down.feedback != Codec.feedback:
        raise FedpeftError(
            f"comms.down.feedback={down.feedback}: what a change leaves out is in the next one "
            f"anyway, which goes from what clients hold. Leave comms.down.feedback out."
        )
    if down.densities:
        raise FedpeftError(
            f"comms.down.densities={list(down.densities)}: what clients are sent is the same for "
            f"all who hold the same. Set comms.down.density."
        )
    if up.densities:
        _check_densities(recipe)


def _check_densities(recipe: Recipe) -> None:
    """Raises where the server would not see what its agents learn from."""
    asked = {
        f"privacy.unit={recipe.privacy.unit}": recipe.privacy.unit != "none"
        and "agents learn from the clients' losses, which no noise covers and which do not leave",
        "secure_aggregation.enabled=true": recipe.secure_aggregation.enabled
        and "agents learn from each client's loss, and the server sees sums alone",
        f"fleet.policy={recipe.fleet.policy}": recipe.fleet.asynchronous
        and "agents compare the times of a round, and here there are none: replies count whenever "
        "they arrive",
    }
    for key, why in asked.items():
        if why:
            raise FedpeftError(
                f"comms.up.densities={list(recipe.comms.up.densities)} with {key}: {why}. Set "
                f"comms.up.density in its place."
            )
