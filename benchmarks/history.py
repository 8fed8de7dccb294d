"""The history of measurements, ``history.jsonl``: a line per variant that was measured."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import Row, best

PATH = Path(__file__).parent / "history.jsonl"


def machine(environment: Mapping[str, Any]) -> str:
    """The hardware in a few words, from ``fedpeft.record.environment``."""
    cpu, cuda = environment["cpu"], environment.get("cuda")
    found = f"{cpu['cores']} cores {cpu['model']} {cpu['capability']}"
    gpus = [device["name"] for device in cuda["devices"]] if cuda else []
    return ", ".join([found, *gpus])


def revision(environment: Mapping[str, Any]) -> str:
    """The commit that ran, with ``+`` where files had been changed; ``unknown`` without git."""
    git = environment.get("git")
    return f"{git['revision'][:12]}{'+' if git['modified'] else ''}" if git else "unknown"


def lines(workload: str, rows: Sequence[Row], environment: Mapping[str, Any]) -> list[str]:
    """One JSON line per row: when, what, where, the median round and its ratio to the limit's.

    ratio: to the fastest centralised run of the same measurement, None where there was none.
    """
    limit = best(rows).get("centralised")
    common = {
        "date": datetime.date.today().isoformat(),
        "commit": revision(environment),
        "machine": machine(environment),
        "torch": environment["packages"]["torch"],
        "workload": workload,
    }
    return [
        json.dumps(
            {
                **common,
                "way": row.label,
                "seconds": round(row.seconds, 6),
                "x_centralised": round(row.seconds / limit.seconds, 4) if limit else None,
            }
        )
        for row in rows
    ]


def append(found: Sequence[str], path: Path = PATH) -> None:
    """Adds lines to the history."""
    with path.open("a") as file:
        file.writelines(f"{line}\n" for line in found)
