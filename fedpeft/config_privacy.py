"""What a recipe's privacy and secure aggregation may be, and what they may be put together with."""

from __future__ import annotations

from fedpeft.config import Privacy, Recipe
from fedpeft.errors import FedpeftError


def check_privacy(recipe: Recipe) -> None:
    """Raises FedpeftError that names the settings which do not go together, and what to do."""
    privacy = recipe.privacy
    if privacy.unit == "none":
        if privacy.epsilon or privacy.noise_multiplier:
            raise FedpeftError(
                f"privacy.epsilon={privacy.epsilon:g}, privacy.noise_multiplier="
                f"{privacy.noise_multiplier:g}, but privacy.unit=none protects nobody: set "
                f"privacy.unit=record (each example) or client (all data of a client)."
            )
        return
    if (privacy.epsilon > 0) == (privacy.noise_multiplier > 0):
        raise FedpeftError(
            f"privacy.epsilon={privacy.epsilon:g} and privacy.noise_multiplier="
            f"{privacy.noise_multiplier:g}: give one of the two, the run's budget or the noise."
        )
    if privacy.randomness == "seeded" and (recipe.engine.workers > 1 or _flower(recipe)):
        raise FedpeftError(
            "privacy.randomness=seeded with several processes would give each the same noise: use "
            "engine.kind=cohort with engine.workers=1, or privacy.randomness=secure."
        )
    if privacy.unit == "record":
        _check_record(recipe)
    else:
        _check_client(recipe)


def _flower(recipe: Recipe) -> bool:
    return recipe.engine.kind == "flower"


def _check_record(recipe: Recipe) -> None:
    local, privacy = recipe.local, recipe.privacy
    if local.clip_norm > 0:
        raise FedpeftError(
            f"local.clip_norm={local.clip_norm:g} with privacy.unit=record, whose bound on each "
            f"example's gradient is privacy.clip_norm={privacy.clip_norm:g}: leave local.clip_norm "
            f"out."
        )
    if recipe.engine.compile != "none":
        raise FedpeftError(
            f"engine.compile={recipe.engine.compile} with privacy.unit=record: the passes of "
            f"per-example clipping have too many shapes to compile. Set engine.compile=none."
        )
    asked = (privacy.noise, privacy.adaptive, privacy.bands)
    if asked != (Privacy.noise, Privacy.adaptive, Privacy.bands):
        raise FedpeftError(
            "privacy.noise, privacy.adaptive and privacy.bands belong to privacy.unit=client: "
            "leave them out, or change the unit."
        )


def _check_client(recipe: Recipe) -> None:
    privacy, rounds = recipe.privacy, recipe.rounds
    if rounds.weighting != "equal":
        raise FedpeftError(
            f"privacy.unit=client with rounds.weighting={rounds.weighting!r}: a client of large "
            f"weight would move the mean by more than the noise is made for. Set "
            f"rounds.weighting=equal."
        )
    if privacy.noise != "server" and (privacy.adaptive or privacy.bands):
        raise FedpeftError(
            f"privacy.noise={privacy.noise!r} with privacy.adaptive or privacy.bands: both need "
            f"noise that the server adds. Set privacy.noise=server."
        )
    if privacy.adaptive and privacy.bands:
        raise FedpeftError(
            "privacy.adaptive with privacy.bands: correlated noise needs one bound for the whole "
            "run. Leave one of the two out."
        )
    if privacy.bands and recipe.output.checkpoint_every != 1:
        raise FedpeftError(
            f"privacy.bands with output.checkpoint_every={recipe.output.checkpoint_every}: a round "
            f"played again would be released twice. Set output.checkpoint_every=1."
        )
    if privacy.noise == "shares":
        _check_shares(recipe)


def _check_shares(recipe: Recipe) -> None:
    if not recipe.secure_aggregation.enabled:
        raise FedpeftError(
            "privacy.noise=shares: a client's own share of the noise hides nothing unless nobody "
            "sees its update alone. Set secure_aggregation.enabled=true, or privacy.noise=client."
        )
    if recipe.rounds.sampling.kind == "poisson":
        raise FedpeftError(
            "privacy.noise=shares with rounds.sampling.kind=poisson: clients must know how many "
            "share the noise. Use rounds.sampling.kind=fixed, uniform or cyclic."
        )
