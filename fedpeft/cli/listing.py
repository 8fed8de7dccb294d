"""What there is to name in a recipe: topics of ``fedpeft list``, name -> one line."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from enum import StrEnum
from importlib import resources

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpeft.cli.descriptions import ADAPTERS, FULL, PARTITIONS, SOURCES

WIDE = 160
"""Columns where the output is no terminal: one line per name."""


class Topic(StrEnum):
    """What can be listed."""

    recipes = "recipes"
    strategies = "strategies"
    adapters = "adapters"
    partitions = "partitions"
    sources = "sources"


_KEYS = {
    Topic.recipes: "fedpeft run NAME",
    Topic.strategies: "strategy.name",
    Topic.adapters: "adapter.kind",
    Topic.partitions: "partition.kind",
    Topic.sources: "data.source",
}


def entries(topic: Topic) -> Mapping[str, str]:
    """The names of a topic, each with its line."""
    if topic is Topic.recipes:
        return _recipes()
    if topic is Topic.strategies:
        from fedpeft.strategy import available

        return available()
    if topic is Topic.adapters:
        return _adapters()
    return PARTITIONS if topic is Topic.partitions else SOURCES


def show(topics: list[Topic]) -> None:
    """Prints the topics, with headings where there are several."""
    screen = Console(highlight=False)
    console = screen if screen.is_terminal else Console(highlight=False, width=WIDE)
    for number, topic in enumerate(topics):
        if len(topics) > 1:
            heading = f"{topic.value}  ({_KEYS[topic]})"
            console.print(Text(heading if not number else f"\n{heading}", "bold"))
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        for name, line in entries(topic).items():
            table.add_row(Text(name), Text(line))
        console.print(table)


def _recipes() -> dict[str, str]:
    """Built-in recipes and the first comment line of each."""
    from fedpeft.config_load import builtin_recipes

    folder = resources.files("fedpeft") / "recipes"
    found = {}
    for name in builtin_recipes():
        first = (folder / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        found[name] = first.removeprefix("#").strip() if first.startswith("#") else ""
    return found


def _adapters() -> dict[str, str]:
    """The installed peft's adapters, and none; one newer than ``ADAPTERS`` as peft describes it."""
    from fedpeft.model import adapter_kinds

    return {"full": FULL} | {
        kind: ADAPTERS.get(kind) or (inspect.getdoc(config) or "").partition("\n")[0]
        for kind, config in sorted(adapter_kinds().items())
    }
