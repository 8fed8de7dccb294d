"""This tree against a base revision: ``python -m benchmarks.compare --base REV``.

Both run their own code and their own ``benchmarks.one``, in turns, each run in a process of its
own; the base from a temporary git worktree. Exit status 1 if this tree is slower than the tolerance
allows. Revisions before 2026-11-21 have no ``benchmarks.one``.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import history
from benchmarks.runner import HERE, Launch, Outcome, run_once
from benchmarks.table import rows
from benchmarks.ways import FAMILIES, Way
from benchmarks.workload import WORKLOADS


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks.compare", description=__doc__)
    parser.add_argument("--base", required=True, metavar="REV", help="the revision to beat")
    parser.add_argument("--workload", choices=WORKLOADS, default="B")
    parser.add_argument("--way", choices=FAMILIES, default="cohort")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds per run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each tree")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=0.10, help="share that may be lost")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/history.jsonl")
    return parser.parse_args(given)


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A temporary worktree of ``revision``. Raises SystemExit where git does not know it."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "base"
        add = ["git", "worktree", "add", "--detach", str(tree), revision]
        done = subprocess.run(add, cwd=HERE, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"--base {revision}: {done.stderr.strip()}")
        try:
            yield tree
        finally:
            remove = ["git", "worktree", "remove", "--force", str(tree)]
            subprocess.run(remove, cwd=HERE, capture_output=True, check=True)


@dataclass(frozen=True)
class Verdict:
    """How long the current tree takes in units of the base, in all and pair by pair.

    ratio: of the median rounds of all runs. pairs: of the medians of runs that took turns.
    """

    ratio: float
    pairs: list[float]

    @property
    def text(self) -> str:
        """The figures in a line."""
        spread = f"pairs {min(self.pairs):.3f} to {max(self.pairs):.3f}"
        return f"current / base = {self.ratio:.3f} ({spread})"


def verdict(current: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Verdict:
    """From the seconds of each run's rounds; run i of one took turns with run i of the other."""
    pooled = [median(s for run in runs for s in run) for runs in (current, base)]
    pairs = [median(own) / median(other) for own, other in zip(current, base, strict=True)]
    return Verdict(pooled[0] / pooled[1], pairs)


def measure(options: argparse.Namespace, base: Path) -> tuple[list[Outcome], list[Outcome]]:
    """The runs of this tree and of the base, in turns; who begins changes from pair to pair."""
    way = Way(options.way, 1, options.threads)
    found: dict[Path, list[Outcome]] = {HERE: [], base: []}
    for repeat in range(options.repeats):
        for tree in (HERE, base) if repeat % 2 == 0 else (base, HERE):
            launch = Launch(tree=tree)
            one = run_once(way, options.workload, options.rounds + 1, repeat, launch)
            found[tree].append(one)
            name = "current" if tree == HERE else "base"
            print(f"{name:8}{median(one.run.seconds):.4f} s/round", flush=True)
    return found[HERE], found[base]


def main(given: Sequence[str]) -> int:
    """Measures and prints; the exit status."""
    options = arguments(given)
    with checkout(options.base) as base:
        ours, theirs = measure(options, base)
    found = verdict([o.run.seconds for o in ours], [o.run.seconds for o in theirs])
    slower = found.ratio > 1 + options.tolerance
    word = "SLOWER" if slower else "ok"
    print(f"{word}: {options.way} on {options.workload}: {found.text}")
    if options.record:
        for runs in (ours, theirs):
            table = rows([one.run for one in runs])
            history.append(history.lines(options.workload, table, runs[0].environment))
    return int(slower)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
