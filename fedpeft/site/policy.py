"""A site's policy: what its operator allows, whatever recipe the server sends.

A YAML file on the site's machine, read anew with every request, so that a change counts from the
next one on. What a key does not say is not bounded by it. ``rules`` holds recipes against it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedpeft.errors import FedpeftError, suggest


@dataclass(frozen=True)
class Policy:
    """What a recipe may ask of a site.

    sources, models: values of ``data.source`` and ``model.name`` that it may name, so that no
    recipe reads what else is on the machine. starts: of ``adapter.start``; none, unless listed.
    base_models: digests of the frozen base, which ``fedpeft site DIR --check RECIPE`` prints.
    strategies, adapters: names that it may give. max_rank: of an adapter or a strategy's own.
    privacy_unit: what must be protected. max_epsilon: what a run may promise at most, and with a
    privacy ledger, what all runs together may spend on this site. max_delta: of that. min_cohort:
    the fewest clients whose updates the recipe combines in a round. secure_aggregation: whether
    updates may leave in clear.
    """

    sources: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    starts: tuple[str, ...] = ()
    base_models: tuple[str, ...] | None = None
    strategies: tuple[str, ...] | None = None
    adapters: tuple[str, ...] | None = None
    max_rank: int | None = None
    privacy_unit: Literal["any", "record", "client"] = "any"
    max_epsilon: float | None = None
    max_delta: float | None = None
    min_cohort: int = 1
    secure_aggregation: Literal["optional", "required"] = "optional"


def read_policy(path: Path) -> Policy:
    """The policy in a file. Raises FedpeftError for a file that is none, naming what is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FedpeftError(
            f"node config policy={str(path)!r} cannot be read ({error}): name the site's policy."
        ) from error
    try:
        given = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise FedpeftError(f"policy {str(path)!r} is no YAML: {error!s:.200}") from error
    if not isinstance(given, dict):
        raise FedpeftError(f"policy {str(path)!r} must be a mapping of keys to values.")
    return parse_policy(given, f"policy {str(path)!r}")


def parse_policy(given: dict[Any, Any], origin: str) -> Policy:
    """The policy that a mapping says. Raises FedpeftError that begins with ``origin``."""
    known = [field.name for field in fields(Policy)]
    for key in given:
        if key not in known:
            raise FedpeftError(f"{origin}: unknown key {key!r}. {suggest(str(key), known)}")
    try:
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Policy()), given))
    except OmegaConfBaseException as error:
        reason = str(error).split("\n")[0]
        raise FedpeftError(f"{origin}: {error.full_key}: {reason}") from None
    assert isinstance(found, Policy)
    for key in ("max_rank", "max_epsilon", "max_delta"):
        value = getattr(found, key)
        if value is not None and not value > 0:
            raise FedpeftError(f"{origin}: {key}={value!r} must be above 0, or left out.")
    if found.min_cohort < 1:
        raise FedpeftError(f"{origin}: min_cohort={found.min_cohort} must be at least 1.")
    return found


def dump_policy(policy: Policy) -> str:
    """The policy as YAML, keys that say nothing left out; ``read_policy`` gives it back."""
    plain = OmegaConf.to_container(OmegaConf.structured(policy))
    assert isinstance(plain, dict)
    said = {key: value for key, value in plain.items() if value is not None}
    text: str = yaml.safe_dump(said, sort_keys=False)
    return text
