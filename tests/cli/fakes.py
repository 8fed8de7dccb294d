"""A run that is acted, for the command line to show: plan, rounds, summary."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedpeft.cohort.chunk import MemoryEstimate
from fedpeft.data.clients import Task
from fedpeft.engine import RoundReport
from fedpeft.events import Outcome, Summary, Watcher
from fedpeft.forecast import Forecast
from fedpeft.metrics import Score
from fedpeft.plan import Plan

NAMES = tuple(f"client-{n}" for n in range(6))


def plan(labels: int = 4, per_client: int = 2**20, sampled: float = 5.0, workers: int = 1) -> Plan:
    return Plan(
        strategy="fedavg",
        workers=workers,
        lane="fold",
        engine="cohort",
        device="cpu",
        chunk=3,
        rounds=2,
        clients=6,
        sampled=sampled,
        examples=(12, 64, 1210),
        steps=(2, 8, 27),
        test=1312,
        labels=labels,
        trainable={"head": 3000, "adapter": 9000},
        frozen=1_000_000,
        down={"adapter": 10240, "head": 1024},
        up={"adapter": 10240, "head": 1024, "scalar": 26},
        tokens=81920,
        memory=MemoryEstimate(per_client, 2**30),
        sends=Forecast(
            down={"adapter": 102400, "head": 10240},
            up={"adapter": 102400, "head": 10240, "scalar": 260},
            rounds=(112770, 112770),
            requests=10,
            replies=10,
            dense=2 * 225540,
            exact=True,
        ),
    )


def score(accuracy: float, loss: float = 1.0, task: Task = "classification") -> Score:
    return Score(100, loss, accuracy, accuracy / 2 if task == "classification" else math.nan)


def report(number: int, excluded: Mapping[str, str] | None = None) -> RoundReport:
    out = dict(excluded or {})
    down, up = {"adapter": 6 * 2**20}, {"adapter": (6 - len(out)) * 2**20}
    return RoundReport(number, NAMES, (), out, 6 - len(out), 1.25, down, up, 2.5)


def summary(folder: str = "", task: Task = "classification", adapter: str = "") -> Summary:
    down, up = {"adapter": 3 * 2**20}, {"head": 1536}
    none = score(math.nan, math.nan, task)
    rows = (
        Outcome("untrained", score(0.1, 9.21, task), 0.2, 0.05),
        Outcome("local", score(0.4, 3.0, task), 0.5, 0.25, seconds=12.34),
        Outcome("fedavg", score(0.8765, 2.0, task), 0.75, 0.5, down, up, 5.0),
        Outcome("centralised", none, math.nan, math.nan, seconds=1234.5),
    )
    return Summary(task, rows, 2, 3, 1, folder, adapter, 61.0, dense=15 * 2**20)


def act(watcher: Watcher, folder: str = "", task: Task = "classification") -> Summary:
    """A whole run: two rounds, five of six clients excluded in the first, a note, a baseline."""
    watcher.planned(plan(4 if task == "classification" else 0), folder)
    watcher.stage("fedavg", 2)
    watcher.round_began(1, 6, 1000)
    watcher.chunk_done(3, 500)
    watcher.chunk_done(3, 500)
    watcher.round_done(report(1, {name: f"NaN in {name}" for name in NAMES[:5]}), None)
    watcher.note("a checkpoint was skipped")
    watcher.round_began(2, 6, 1000)
    watcher.chunk_done(6, 1000)
    watcher.round_done(report(2), score(0.8765, 2.0, task))
    watcher.stage("local", 1)
    watcher.round_began(1, 6, 1000)
    watcher.round_done(report(1), None)
    done = summary(folder, task)
    watcher.finished(done)
    return done
