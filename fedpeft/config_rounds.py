"""Which other settings a round's bounds on replies go with."""

from __future__ import annotations

from fedpeft.config import Recipe
from fedpeft.config_comms import size_of
from fedpeft.errors import FedpeftError


def check_rounds(recipe: Recipe) -> None:
    """Raises FedpeftError that names the settings which do not go together."""
    rounds = recipe.rounds
    size_of("rounds.max_reply", rounds.max_reply)
    if rounds.reject_norm and recipe.secure_aggregation.enabled:
        raise FedpeftError(
            f"rounds.reject_norm={rounds.reject_norm:g} with secure_aggregation.enabled: the "
            f"server sees no single update. Leave it out; clients clip to "
            f"secure_aggregation.clip_norm."
        )
