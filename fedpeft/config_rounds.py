"""Which other settings a round's retries and its bound on updates go with."""

from __future__ import annotations

from typing import Any

from fedpeft.codecs.settings import feeds_back
from fedpeft.config import Recipe
from fedpeft.config_comms import size_of
from fedpeft.errors import FedpeftError
from fedpeft.strategy import Strategy


def check_rounds(recipe: Recipe, strategy: Strategy[Any]) -> None:
    """Raises FedpeftError that names the settings which do not go together."""
    rounds, comms = recipe.rounds, recipe.comms
    size_of("rounds.max_reply", rounds.max_reply)
    if rounds.reject_norm and recipe.secure_aggregation.enabled:
        raise FedpeftError(
            f"rounds.reject_norm={rounds.reject_norm:g} with secure_aggregation.enabled: the "
            f"server sees no single update. Leave it out; clients clip to "
            f"secure_aggregation.clip_norm."
        )
    if not rounds.retries:
        return
    if recipe.privacy.unit != "none":
        raise FedpeftError(
            f"rounds.retries={rounds.retries} with privacy.unit={recipe.privacy.unit}: a round "
            f"that is tried again uses the data again, and is charged once. Set rounds.retries=0, "
            f"and go on with `fedpeft resume`, which charges again."
        )
    coded = comms.down.codec != "none" or (comms.up.codec != "none" and feeds_back(comms.up))
    if strategy.remembers or strategy.keeps or coded:
        raise FedpeftError(
            f"rounds.retries={rounds.retries}: clients of strategy.name={recipe.strategy['name']} "
            f"or of the codecs of comms keep what they make in a round, and cannot take it back. "
            f"Set rounds.retries=0, and go on with `fedpeft resume`."
        )
