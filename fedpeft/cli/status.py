"""``fedpeft deploy status`` for a person."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedpeft.cli import units
from fedpeft.cli.tables import pair

if TYPE_CHECKING:
    from fedpeft.deploy.status import Status
    from fedpeft.observe.progress import Progress, Spent

NAMED = 10
"""Clients of the last round that are named with the reason why they are not in it."""

_STYLES = {"online": "green", "offline": "yellow", "not registered": "red"}


def page(found: Status, now: datetime) -> RenderableType:
    """All of it. now: aware of its zone."""
    parts: list[RenderableType] = [
        pair("server", found.server),
        pair("certificate until", found.certificate_ends[:10]),
    ]
    if found.unreachable:
        parts.append(pair("unreachable", plain(found.unreachable), "yellow"))
    parts += [
        *(pair("warning", plain(text), "yellow") for text in found.warnings),
        "",
        _sites(found),
    ]
    if found.runs:
        parts += ["", _runs(found)]
    return Group(*parts, "", *_progress(found.progress, now))


def plain(text: str) -> str:
    r"""Text of another party on one line, without what a terminal would obey.

    >>> plain("a\x1b[2Jb")
    'a?[2Jb'
    """
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(heads[0], overflow="fold")
    for head in heads[1:]:
        table.add_column(head, overflow="fold")
    return table


def _sites(found: Status) -> Table:
    table = _table("site", "state", "since", "epsilon, own ledger")
    for site in found.sites:
        state = Text(plain(site.state), _STYLES.get(site.state, ""))
        since = plain(site.since)[:19].replace("T", " ")
        table.add_row(Text(site.name), state, since, _epsilon(site.privacy))
    return table


def _runs(found: Status) -> Table:
    table = _table("run of Flower", "status", "time", "down", "up")
    for run in found.runs:
        how = run.status if run.details in ("", "N/A") else f"{run.status} ({run.details})"
        sent = (units.size(run.down), units.size(run.up))
        table.add_row(plain(run.id), Text(plain(how)), units.clock(run.seconds), *sent)
    return table


def _progress(done: Progress, now: datetime) -> Iterator[Text]:
    yield pair("rounds", f"{done.rounds:,} of {done.planned:,}{', complete' if done.ended else ''}")
    if done.rounds:
        yield pair("last round", f"{done.replies:,} of {done.clients:,} clients in the aggregate")
        if done.aborted:
            yield pair("", f"aborted: {plain(done.aborted)}", "yellow")
        missing = [*done.excluded.items(), *((name, "dropped out") for name in done.dropped)]
        for name, why in missing[:NAMED]:
            yield pair("", f"{plain(name)}: {plain(why)}", "yellow")
        if len(missing) > NAMED:
            yield pair("", f"and {len(missing) - NAMED:,} more", "yellow")
        yield pair("train loss", units.figure(done.loss, 4))
    if done.test:
        yield pair("test", _score(done.test))
    if done.down or done.up:
        sent = sum((*done.down.values(), *done.up.values()))
        whole = f" of {units.size(done.budget)}" if done.budget else ""
        ways = f"{units.total(done.down)} down, {units.total(done.up)} up"
        yield pair("bytes", f"{ways}; {units.size(sent)}{whole}")
    if done.privacy is not None:
        yield pair("epsilon", f"{_epsilon(done.privacy)}, delta {done.privacy.delta:g}")
    if done.note:
        yield pair("last note", plain(done.note))
    if not math.isnan(done.checkpoint):
        age = max(0.0, now.timestamp() - done.checkpoint)
        yield pair("checkpoint", f"{units.clock(age)} old")


def _score(test: object) -> str:
    assert isinstance(test, dict)
    figures = {name: math.nan if value is None else float(value) for name, value in test.items()}
    loss = f"loss {units.figure(figures['loss'], 4)}"
    accuracy = figures.get("accuracy", math.nan)
    return loss if math.isnan(accuracy) else f"{loss}, accuracy {units.percent(accuracy)}"


def _epsilon(spent: Spent | None) -> str:
    if spent is None:
        return units.NOTHING
    whole = f" of {spent.budget:g}" if math.isfinite(spent.budget) else ", no budget"
    return f"{spent.epsilon:.2f}{whole}"
