"""What goes together: strategy x protection, as code. Every cell is played in a test or refused.

From what a strategy declares (``linear``, ``folds``, ``asks``), never from its name, so that a
user's own strategy has its row too. The table in ``docs/compatibility.md`` is ``table``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedpeft.config import Recipe
from fedpeft.errors import FedpeftError
from fedpeft.strategy import Strategy, available, build

Refusal = str
"""Why not, and what to use instead; empty where it goes."""

ALONE = "there is only one party, and nothing is aggregated: use a federated strategy"
SUMS = "it works on single updates, and only their sum is seen: leave one of the two out"
MASKED = (
    "the masks are on whole numbers that add up, and what a codec makes of an update does not: set "
    "comms.up.codec=none, and take a strategy that sends less (ffa_lora, fed_sb)"
)
NOISED = "noise hides what an attack does: study the two apart, leave one of them out"
UNBOUNDED = (
    "how far one client moves a robust rule's result has no useful bound, so no noise is made for "
    "it: leave it out, or use privacy.unit=record"
)


def record_level(strategy: Strategy[Any]) -> Refusal:
    """``privacy.unit=record``: DP-SGD in each client; whatever follows is post-processing."""
    asked = sorted(strategy.asks())
    if "steps" in asked:
        return (
            "it says how many steps clients take, and the noise covers the recipe's number: use a "
            "strategy that leaves the number to the recipe"
        )
    if "pruned" in asked:
        return (
            "it prunes clients' models, of which no gradients by example are made: use a strategy "
            "that does not prune"
        )
    if asked:
        return (
            f"it asks clients for their {' and '.join(asked)}, which no noise covers: use a "
            f"setting or a strategy that learns from training alone"
        )
    return ""


def client_level(strategy: Strategy[Any]) -> Refusal:
    """``privacy.unit=client`` with noise by the server, by shares or by each client."""
    alone = "all data lie with one party, so there is no client to protect: use unit=record"
    return _of_the_mean(strategy, alone, "and the noise is on their mean: use unit=record")


def secure_aggregation(strategy: Strategy[Any]) -> Refusal:
    """``secure_aggregation.enabled``: the server learns the sum of the updates alone."""
    return _of_the_mean(strategy, ALONE, "and only their sum is seen: use a linear strategy")


def robust_rule(strategy: Strategy[Any]) -> Refusal:
    """``robust.rule``: one update in place of the clients' mean."""
    return _of_the_mean(strategy, ALONE, "and a rule leaves one update: use a linear strategy")


def uplink_codec(strategy: Strategy[Any]) -> Refusal:
    """``comms.up.codec``: replies are read as their codec left them."""
    if strategy.pools:
        return ALONE
    return "" if strategy.codable else _EXACT.format("up")


def downlink_codec(strategy: Strategy[Any]) -> Refusal:
    """``comms.down.codec``: clients train from the model as its codec left it."""
    if strategy.pools:
        return ALONE
    if strategy.folds:
        return (
            "its clients fold what they are sent into their base, and would keep every error: use "
            "comms.down.codec=none"
        )
    return "" if strategy.codable else _EXACT.format("down")


_EXACT = "each number that it sends means something by itself: use comms.{}.codec=none"


def _of_the_mean(strategy: Strategy[Any], alone: str, otherwise: str) -> Refusal:
    """Why a strategy cannot do with one update for all: ``alone``, or what it needs instead."""
    if strategy.pools:
        return alone
    return "" if strategy.linear else f"{_why_individual(strategy)}, {otherwise}"


COLUMNS: dict[str, Callable[[Strategy[Any]], Refusal]] = {
    "record": record_level,
    "client": client_level,
    "secure aggregation": secure_aggregation,
    "robust rule": robust_rule,
    "uplink codec": uplink_codec,
    "downlink codec": downlink_codec,
}
"""Column of the table -> its judgement."""


def check_compatible(recipe: Recipe, strategy: Strategy[Any]) -> None:
    """Raises FedpeftError for a recipe whose strategy and protections do not go together."""
    privacy, name = recipe.privacy, str(recipe.strategy.get("name"))
    up, down = recipe.comms.up.codec, recipe.comms.down.codec
    asked = {
        "privacy.unit=record": privacy.unit == "record" and record_level(strategy),
        "privacy.unit=client": privacy.unit == "client" and client_level(strategy),
        "secure_aggregation.enabled": recipe.secure_aggregation.enabled
        and secure_aggregation(strategy),
        f"robust.rule={recipe.robust.rule}": recipe.robust.rule != "none" and robust_rule(strategy),
        f"comms.up.codec={up}": up != "none" and uplink_codec(strategy),
        f"comms.down.codec={down}": down != "none" and downlink_codec(strategy),
    }
    for key, refusal in asked.items():
        if refusal:
            raise FedpeftError(f"{key} with strategy.name={name!r}: {refusal}.")
    if recipe.comms.up.densities and strategy.exchanges > 1:
        raise FedpeftError(
            f"comms.up.densities with strategy.name={name!r}: its clients reply "
            f"{strategy.exchanges} times a round, and agents learn from one reply: set "
            f"comms.up.density in its place."
        )
    if up != "none" and recipe.secure_aggregation.enabled:
        raise FedpeftError(f"comms.up.codec={up} with secure_aggregation.enabled: {MASKED}.")
    for this, on, noised in (
        (f"robust.rule={recipe.robust.rule}", recipe.robust.rule != "none", UNBOUNDED),
        (f"attack.kind={recipe.attack.kind}", recipe.attack.kind != "none", NOISED),
    ):
        if on and recipe.secure_aggregation.enabled:
            raise FedpeftError(f"{this} with secure_aggregation.enabled: {SUMS}.")
        if on and privacy.unit == "client":
            raise FedpeftError(f"{this} with privacy.unit=client: {noised}.")


def _why_individual(strategy: Strategy[Any]) -> str:
    if strategy.folds:
        return "its server needs the product of every client's own factors"
    if not strategy.shares:
        return "its clients send nothing that is averaged"
    return "its server needs every client's own reply"


def table() -> str:
    """The table of ``docs/compatibility.md``, Markdown: every shipped strategy by every column."""
    lines = [
        f"| strategy | {' | '.join(COLUMNS)} |",
        f"| --- |{' --- |' * len(COLUMNS)}",
    ]
    notes: dict[str, int] = {}
    for name in sorted(available()):
        cells = []
        for judge in COLUMNS.values():
            refusal = judge(build(name, {}))
            mark = f"no [{notes.setdefault(refusal, len(notes) + 1)}]" if refusal else "yes"
            cells.append(mark)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    marks = [f"{number}. {text[0].upper()}{text[1:]}." for text, number in notes.items()]
    return "\n".join([*lines, "", *marks]) + "\n"
