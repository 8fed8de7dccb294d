"""The tables that commands print: a run's result, and the plan before it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedpeft.cli import units

if TYPE_CHECKING:
    from fedpeft.events import Outcome, Summary
    from fedpeft.plan import Plan
    from fedpeft.timed import FleetSummary

_LABELS = {"local": "local-only"}


def result(summary: Summary) -> Table:
    """The last table: a row per training, measured on the test set and by the clients."""
    classes = summary.task == "classification"
    first, second = ("accuracy", "macro-F1") if classes else ("loss/token", "perplexity")
    gap = (0, 0, 0, 1) if classes else 0  # beside the box's own space; 80 columns hold no more
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=gap)
    table.add_column("", overflow="fold", min_width=11)
    heads = [f"test\n{first}", f"test\n{second}", "clients\nmean", "worst\ndecile"]
    for head in [*heads, "bytes\ndown", "bytes\nup", "time\n(s)"]:
        wide = 9 if head.startswith("bytes") else 7
        table.add_column(head, justify="right", no_wrap=True, min_width=wide)
    for row in summary.rows:
        own = row.name not in ("untrained", "local", "centralised")
        name = _LABELS.get(row.name, row.name)
        sent = (units.total(row.down), units.total(row.up), units.seconds(row.seconds))
        table.add_row(name, *_figures(row, classes), *sent, style="bold" if own else "")
    return table


def _figures(row: Outcome, classes: bool) -> tuple[str, str, str, str]:
    score = row.score
    if classes:
        return (
            units.percent(score.accuracy),
            units.percent(score.macro_f1),
            units.percent(row.mean),
            units.percent(row.worst),
        )
    perplexity = math.nan if math.isnan(score.loss) else score.perplexity
    return (
        units.figure(score.loss),
        units.figure(perplexity, 2),
        units.figure(row.mean),
        units.figure(row.worst),
    )


def fleet(found: FleetSummary) -> list[str]:
    """What a run took by its fleet's clock, line by line."""
    lost = ", ".join(f"{count:,} {kind}" for kind, count in found.lost.items())
    flying = f"; {found.in_flight:,} still at work, discarded" if found.in_flight else ""
    lines = [
        f"fleet: {units.clock(found.seconds)} of virtual time, idle {units.percent(found.idle)}, "
        f"wasted {units.percent(found.wasted)} of the computation",
        f"participation: Jain {units.figure(found.jain)}, Gini {units.figure(found.gini)}"
        + (f"; lost: {lost}" if lost else "")
        + flying,
    ]
    if found.target:
        reached = not math.isnan(found.time_to_target)
        when = f"after {units.clock(found.time_to_target)}" if reached else "never"
        lines.append(f"accuracy {units.percent(found.target)}: {when}")
    if found.adapted:
        lines.append(f"{found.adapted:,} clients trained in another way to fit into memory")
    return lines


def plan(found: Plan) -> RenderableType:
    """What a run would train, send and need."""
    return Group(_work(found), "", _parameters(found), "", _traffic(found), "", _machine(found))


def _grid(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(heads[0], width=24)
    for head in heads[1:]:
        table.add_column(head, justify="right", min_width=11, no_wrap=True)
    return table


def _work(found: Plan) -> Group:
    each = _grid("per client", "min", "median", "max")
    each.add_row("training examples", *(f"{n:,}" for n in found.examples))
    each.add_row("steps in a round", *(f"{n:,}" for n in found.steps))
    labels = f", {found.labels} labels" if found.labels else ""
    return Group(
        pair("strategy", found.strategy),
        pair("rounds", f"{found.rounds:,}"),
        pair("clients", f"{found.clients:,}, {_sampled(found)} in a round"),
        pair("test examples", f"{found.test:,}{labels}"),
        pair("tokens in a round", f"about {found.tokens:,}"),
        *(pair(name, value) for name, value in found.privacy.items()),
        "",
        each,
    )


def _sampled(found: Plan) -> str:
    if found.sampled == found.clients:
        return "all"
    return f"{found.sampled:,.0f}" if found.sampled.is_integer() else f"about {found.sampled:,.1f}"


def _parameters(found: Plan) -> Table:
    table = _grid("parameters", "", "of the base")
    kinds = sorted(found.trainable.items())
    count = sum(found.trainable.values())
    table.add_row("trainable", f"{count:,}", units.percent(count / found.frozen, 2))
    for name, part in kinds if len(kinds) > 1 else []:
        share = units.percent(part / found.frozen, 2)
        table.add_row(f"  {name}", f"{part:,}", share, style="dim")
    table.add_row("frozen base", f"{found.frozen:,}", "")
    return table


def _traffic(found: Plan) -> Group:
    table = _grid("bytes", "down", "up")
    sends = found.sends
    if sends is None:
        return Group(table)
    many = (max(1, sends.requests), max(1, sends.replies))
    ways = (sends.down, sends.up)
    each = [sum(way.values()) / count for way, count in zip(ways, many, strict=True)]
    table.add_row("a message, on average", *map(units.size, each))
    kinds = sorted({*sends.down, *sends.up})
    for kind in kinds if len(kinds) > 1 else []:
        parts = [way.get(kind, math.nan) / count for way, count in zip(ways, many, strict=True)]
        table.add_row(f"  {kind}", *map(units.size, parts), style="dim")
    table.add_row("whole run", *(units.size(sum(way.values())) for way in ways))
    total = sum(sends.down.values()) + sum(sends.up.values())
    sure = "exactly" if sends.exact else "about"
    lines = [pair("both ways", f"{sure} {total:,} bytes")]
    if total:
        lines.append(pair("that is", units.shares(sends.dense, total)))
    if sends.times:
        mean = sum(sends.times) / len(sends.times)
        both = f"{units.clock(mean)}, the whole run {units.clock(sum(sends.times))}"
        lines.append(pair("a round by the fleet", both))
    return Group(table, "", *lines)


def at_once(found: Plan) -> int:
    """Clients that share a worker's batch: the chunk, unless it has fewer in a round."""
    if found.engine != "cohort":
        return 1
    return min(found.chunk, max(1, math.ceil(found.sampled / found.workers)))


def _machine(found: Plan) -> Group:
    many = at_once(found)
    need, free = many * found.memory.per_client, found.memory.free
    several = found.workers > 1
    each = " by each worker" if several or found.engine == "flower" else ""
    memory = f"at most {units.size(need)} needed{each}, {units.size(free)} free"
    return Group(
        pair("engine", f"{found.engine} on {found.device}, lane {found.lane}"),
        *([pair("workers", f"{found.workers:,}, a base model each")] if several else []),
        *([pair("clients at once", f"{many:,}{each}")] if found.engine == "cohort" else []),
        pair("memory", memory, "yellow" if need > free else ""),
    )


def pair(name: str, value: str, style: str = "") -> Text:
    """A name and what it is, on one line."""
    return Text.assemble((f"{name:<26}", "bold"), (value, style))
