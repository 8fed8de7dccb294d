"""A recipe held against a site's policy, and the policy that allows just one recipe.

In the order in which they are asked: ``check_text`` before the recipe is parsed, which imports the
strategy that it names; ``check_recipe`` before anything is loaded; ``check_model`` and
``check_promise`` before anything is trained. Each raises a FedpeftError that names the policy's
key, the value asked for and what is allowed; it goes to the server as the reason of the refusal.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]

from fedpeft import sampling
from fedpeft.config import Recipe
from fedpeft.errors import FedpeftError
from fedpeft.site.policy import Policy

_RANKS = {"r", "rank", "ranks", "init_r", "target_r", "rank_pattern", "lora_rank"}
_NEVER = ("remote_code", "pickle", "auto_mapping")
"""Parts of keys by which code, not settings, would come in."""


def check_text(policy: Policy, text: str) -> None:
    """Whether the recipe may name its strategy, and nothing in it asks for remote code."""
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise FedpeftError("the recipe in the request is no YAML.") from error
    if not isinstance(found, dict):
        raise FedpeftError("the recipe in the request is no mapping of keys to values.")
    for key, _ in _walk(found):
        if any(part in key.lower() for part in _NEVER):
            raise FedpeftError(f"{key}: no recipe may bring code to a site. Leave it out.")
    strategy = found.get("strategy")
    name = strategy.get("name", "fedavg") if isinstance(strategy, dict) else "fedavg"
    _check_listed("strategies", "strategy.name", name, policy.strategies)


def check_recipe(policy: Policy, recipe: Recipe) -> None:
    """Everything that the recipe alone says."""
    adapter = recipe.adapter
    _check_listed("sources", "data.source", recipe.data.source, policy.sources)
    _check_listed("models", "model.name", recipe.model.name, policy.models)
    _check_listed("strategies", "strategy.name", recipe.strategy.get("name"), policy.strategies)
    _check_listed("adapters", "adapter.kind", adapter.get("kind", "lora"), policy.adapters)
    if (start := adapter.get("start")) is not None:
        _check_listed("starts", "adapter.start", start, policy.starts)
    for key in ("train", "test"):
        value = getattr(recipe.data, key)
        if value is not None and ("/" in value or "\\" in value or ".." in value):
            raise _refused("sources", f"data.{key}", value, "names without a folder")
    for key, value in _walk(adapter, "adapter"):
        if isinstance(value, str) and "/" in value and key != "adapter.start":
            raise _refused("starts", key, value, "no paths but adapter.start")
    if policy.max_rank is not None:
        _check_ranks(policy.max_rank, recipe)
    if policy.secure_aggregation == "required" and not recipe.secure_aggregation.enabled:
        raise _refused("secure_aggregation", "secure_aggregation.enabled", False, "true")
    _check_privacy(policy, recipe)
    if recipe.partition.clients:
        check_cohort(policy, recipe, recipe.partition.clients)


def check_model(policy: Policy, recipe: Recipe, digest: str, clients: int) -> None:
    """What is known once model and data are loaded: the base's digest, how many clients there are.

    Nothing has been trained by then.
    """
    _check_listed("base_models", "the base model's digest", digest, policy.base_models)
    check_cohort(policy, recipe, clients)


def check_cohort(policy: Policy, recipe: Recipe, clients: int) -> None:
    """Whether a round combines enough clients' updates."""
    found = least(recipe, clients)
    if found < policy.min_cohort:
        raise _refused(
            "min_cohort",
            f"a round of {clients} clients' sampling, quorum and threshold",
            found,
            f"at least {policy.min_cohort}",
        )


def check_promise(policy: Policy, epsilon: float) -> None:
    """Whether a whole run's epsilon for this site's client is within the policy."""
    if policy.max_epsilon is not None and not epsilon <= policy.max_epsilon:
        raise _refused("max_epsilon", "the run's epsilon", f"{epsilon:.4g}", policy.max_epsilon)


def least(recipe: Recipe, clients: int) -> int:
    """The fewest clients whose updates a round of the recipe combines."""
    rounds, secure = recipe.rounds, recipe.secure_aggregation
    drawn = math.floor(sampling.expected(rounds.sampling, clients))
    share = max(rounds.quorum, secure.threshold if secure.enabled else 0.0)
    return max(1, math.ceil(share * drawn))


def policy_for(recipe: Recipe) -> Policy:
    """The policy that allows what a recipe asks for, and as little more as its keys can say."""
    privacy = recipe.privacy
    start = recipe.adapter.get("start")
    return Policy(
        sources=(recipe.data.source,),
        models=(recipe.model.name,),
        starts=() if start is None else (str(start),),
        strategies=(str(recipe.strategy.get("name", "fedavg")),),
        adapters=(str(recipe.adapter.get("kind", "lora")),),
        max_rank=max(_ranks(recipe).values(), default=None),
        privacy_unit="any" if privacy.unit == "none" else privacy.unit,
        max_epsilon=privacy.epsilon or None,
        max_delta=None if privacy.unit == "none" else privacy.delta,
        min_cohort=least(recipe, recipe.partition.clients) if recipe.partition.clients else 1,
        secure_aggregation="required" if recipe.secure_aggregation.enabled else "optional",
    )


def _check_privacy(policy: Policy, recipe: Recipe) -> None:
    privacy = recipe.privacy
    if policy.privacy_unit not in ("any", privacy.unit):
        raise _refused("privacy_unit", "privacy.unit", privacy.unit, policy.privacy_unit)
    if policy.max_epsilon is not None:
        if privacy.unit == "none":
            raise _refused("max_epsilon", "privacy.unit", "none", "record or client")
        check_promise(policy, privacy.epsilon)  # 0 where the noise is given: asked again later
    if policy.max_delta is not None and privacy.unit != "none" and privacy.delta > policy.max_delta:
        raise _refused("max_delta", "privacy.delta", privacy.delta, policy.max_delta)


def _check_ranks(most: int, recipe: Recipe) -> None:
    for key, value in _ranks(recipe).items():
        if value > most:
            raise _refused("max_rank", key, value, most)


def _ranks(recipe: Recipe) -> dict[str, int]:
    """Every rank that a recipe names, by dotted key."""
    found = {}
    for section in ("adapter", "strategy"):
        for key, value in _walk(getattr(recipe, section), section):
            names = key.split(".")[1:]
            if names[0] in _RANKS and isinstance(value, int | float):
                found[key] = math.ceil(value)
    return found


def _walk(value: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys below a value, dotted, with what they hold."""
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, below in items:
        name = f"{prefix}.{key}".lstrip(".")
        yield name, below
        yield from _walk(below, name)


def _check_listed(key: str, what: str, value: object, allowed: Collection[str] | None) -> None:
    if allowed is not None and value not in allowed:
        raise _refused(key, what, value, ", ".join(allowed) or "none")


def _refused(key: str, what: str, asked: object, allowed: object) -> FedpeftError:
    return FedpeftError(
        f"this site's policy refuses the recipe: {key} allows {allowed}, and {what} is {asked!r}. "
        f"Change the recipe, or ask the site's operator."
    )
