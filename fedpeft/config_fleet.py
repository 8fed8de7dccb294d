"""What a recipe's fleet may be, and what it may be put together with."""

from __future__ import annotations

from fedpeft.config import Recipe
from fedpeft.errors import FedpeftError
from fedpeft.fleet.settings import Fleet


def check_fleet(recipe: Recipe) -> None:
    """Raises FedpeftError that names the settings which do not go together, and what to do."""
    fleet = recipe.fleet
    if fleet.preset == "none":
        if fleet != Fleet():
            raise FedpeftError(
                "fleet.preset=none has no devices, and other keys of fleet: are set: name devices "
                "with fleet.preset, such as jetson80, or leave fleet: out."
            )
        return
    if recipe.rounds.failure_rate > 0:
        raise FedpeftError(
            f"rounds.failure_rate={recipe.rounds.failure_rate:g} with fleet.preset={fleet.preset}: "
            f"under a clock a client drops out at some moment. Use fleet.dropout in its place."
        )
    if recipe.secure_aggregation.enabled:
        raise FedpeftError(
            "secure_aggregation.enabled=true with a fleet: the clock does not know the exchanges "
            "of its protocol. Leave one of the two out."
        )
    _check_files(fleet)
    _check_policy(recipe)
    if fleet.asynchronous:
        _check_asynchronous(recipe)


def _check_files(fleet: Fleet) -> None:
    if fleet.trace and fleet.availability != "trace":
        raise FedpeftError(
            f"fleet.trace={fleet.trace!r} with fleet.availability={fleet.availability}, which "
            f"reads none: set fleet.availability=trace."
        )
    if fleet.capacities and fleet.preset != "fedscale":
        raise FedpeftError(
            f"fleet.capacities={fleet.capacities!r} with fleet.preset={fleet.preset}, which has "
            f"devices of its own: set fleet.preset=fedscale."
        )


def _check_policy(recipe: Recipe) -> None:
    fleet, kind = recipe.fleet, recipe.rounds.sampling.kind
    if fleet.policy == "deadline" and not fleet.deadline:
        raise FedpeftError(
            "fleet.policy=deadline needs fleet.deadline, in seconds of the fleet's clock, above 0."
        )
    if fleet.deadline and fleet.policy not in ("deadline", "over_select"):
        raise FedpeftError(
            f"fleet.deadline={fleet.deadline:g} with fleet.policy={fleet.policy}, which has none: "
            f"set fleet.policy=deadline or over_select."
        )
    if fleet.policy == "over_select" and kind not in ("uniform", "fixed"):
        raise FedpeftError(
            f"fleet.policy=over_select with rounds.sampling.kind={kind}: it asks more clients than "
            f"a round wants, a number that only uniform and fixed have."
        )
    if recipe.privacy.unit != "none" and fleet.policy not in ("sync", "deadline"):
        raise FedpeftError(
            f"fleet.policy={fleet.policy} with privacy.unit={recipe.privacy.unit}: who takes part "
            f"would not be who was drawn, which is what is accounted. Use sync or deadline."
        )


def _check_asynchronous(recipe: Recipe) -> None:
    fleet = recipe.fleet
    if 0 < fleet.concurrency < fleet.buffer:
        raise FedpeftError(
            f"fleet.concurrency={fleet.concurrency} clients at work never fill fleet.buffer="
            f"{fleet.buffer}: raise fleet.concurrency, or lower fleet.buffer."
        )
    if recipe.comms.down.codec != "none":
        raise FedpeftError(
            f"comms.down.codec={recipe.comms.down.codec} with fleet.policy={fleet.policy}: changes "
            f"go from a version that all clients hold, and here each holds another. Set "
            f"comms.down.codec=none."
        )
    if recipe.engine.workers > 1:
        raise FedpeftError(
            f"engine.workers={recipe.engine.workers} with fleet.policy={fleet.policy}: workers "
            f"answer for many clients with one mean, and here each reply counts at its own time. "
            f"Set engine.workers=1."
        )
