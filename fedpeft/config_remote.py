"""A recipe that another party sent: the same recipes as elsewhere, of a text that may be hostile.

The text is bounded before it is parsed, and its structure is looked at before any of it is built:
aliases (a few lines that unfold to gigabytes), tags and deep nesting are refused. Interpolations
are refused in every recipe, so none is resolved: ``${oc.env:HF_TOKEN}`` reads nothing. A strategy
is a module, and importing one runs it, so the sender may name only those that ship with fedpeft and
those that the receiver's operator listed. No key of a recipe can ask for remote code.

Which models, data and paths a recipe may name is a matter of the site's policy, not of parsing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]

from fedpeft.config import Recipe
from fedpeft.config_load import parse_recipe, plain_yaml
from fedpeft.errors import FedpeftError
from fedpeft.strategy import shipped

MAX_BYTES = 64 * 1024
"""A complete recipe has about 2500."""

MAX_DEPTH = 12
MAX_ITEMS = 20_000
MAX_NUMBER = 40
"""Characters of a plain (unquoted) number."""


def parse_remote(text: str, origin: str, strategies: Collection[str] | None = ()) -> Recipe:
    """The recipe of a text from another party; ``origin`` names it in errors.

    strategies: names that are allowed beside those that ship with fedpeft; None for any, where
    sender and receiver are one machine. Raises FedpeftError for all that is wrong.
    """
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise FedpeftError(
            f"{origin} has {len(text)} characters, and at most {MAX_BYTES} bytes are read: shorten "
            f"its lists."
        )
    _check_structure(text, origin)
    if strategies is not None:
        name = _strategy(plain_yaml(text, origin))
        if name is not None and name not in {*shipped(), *strategies}:
            raise FedpeftError(
                f"{origin}: strategy.name={name[:60]!r} does not ship with fedpeft, and a server "
                f"cannot make this site import a module: its operator must list it (node config "
                f"strategies=NAME,...)."
            )
    return parse_recipe(text, origin)


def _check_structure(text: str, origin: str) -> None:
    """Raises FedpeftError, by the parser's events: nothing is built for them, nothing recurses."""
    depth = 0
    try:
        for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise FedpeftError(f"{origin}: anchors and aliases (&, *) are not allowed in it.")
            if getattr(event, "tag", None):
                raise FedpeftError(f"{origin}: tags (!) are not allowed in it.")
            if isinstance(event, yaml.ScalarEvent) and _is_long_number(event):
                raise FedpeftError(f"{origin}: it has a number of {len(event.value)} characters.")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or number > MAX_ITEMS:
                raise FedpeftError(
                    f"{origin}: more than {MAX_DEPTH} levels or {MAX_ITEMS} items: it is no recipe."
                )
    except yaml.YAMLError as error:
        raise FedpeftError(f"{origin}: not valid YAML: {str(error)[:100]}") from None


def _is_long_number(event: yaml.ScalarEvent) -> bool:
    return (
        event.style is None and len(event.value) > MAX_NUMBER and event.value[0] in "+-.0123456789"
    )


def _strategy(layer: Mapping[str, Any]) -> str | None:
    """What a recipe's text names as its strategy; None for the default, and what is no name."""
    section = layer.get("strategy")
    name = section.get("name") if isinstance(section, dict) else None
    return None if name is None else str(name)
