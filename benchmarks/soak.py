"""A deployment under random kills: ``python -m benchmarks.soak DIR --minutes 60 --every 30``.

DIR is a folder of ``fedpeft deploy init`` whose recipe has more rounds than the time allows. It is
run on loopback (``deploy up DIR --local --restart``); every so often one process, drawn by a seed,
is killed by SIGKILL: the server (SuperLink), its app, a site's node, a site's process, or its
worker. Said at the end: rounds, kills, exclusions, the longest time without a round, whether any
ledger ever grew shorter, and the slope of memory, by role, within the lives of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from fedpeft.deploy.processes import MARK
from fedpeft.record import environment

ROLES = {
    "flower-superlink": "server",
    "flwr-serverapp": "server app",
    "fedpeft.flower.supernode": "node",
    "fedpeft.flower.resident": "worker",
    "site .": "site",
}
"""Part of a command line -> what it is."""

WARM = 60.0
"""Seconds of a process's life that are not in its slope: it loads what it needs."""

RUN_CONFIG = "reply-timeout=40 join-timeout=40"
TICK = 1.0


@dataclass
class Watched:
    """What was seen of the deployment. memory: (role, pid) -> times and bytes."""

    folder: Path
    memory: dict[tuple[str, int], list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    killed: Counter[str] = field(default_factory=Counter)
    shorter: list[str] = field(default_factory=list)
    lengths: dict[Path, int] = field(default_factory=dict)
    rounds: list[tuple[float, int]] = field(default_factory=list)

    def look(self, now: float) -> dict[str, list[psutil.Process]]:
        """Samples memory, ledgers and rounds; the processes that live, by role."""
        found = living(self.folder)
        for role, processes in found.items():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    self.memory[role, process.pid].append((now, process.memory_info().rss))
        for path in self._ledgers():
            size = path.stat().st_size if path.exists() else 0
            if size < self.lengths.get(path, 0):
                self.shorter.append(f"{path.relative_to(self.folder)} at {now:.0f} s")
            self.lengths[path] = size
        last = max((line["round"] for line in lines(self.folder, "round")), default=0)
        if not self.rounds or self.rounds[-1][1] != last:
            self.rounds.append((now, last))
        return found

    def _ledgers(self) -> list[Path]:
        """The server's and every site's."""
        places = [self.folder / "server", *(self.folder / "sites").iterdir()]
        return [place / "privacy.jsonl" for place in places]

    def slopes(self) -> dict[str, float]:
        """MB a minute by role: least squares, each life with a level of its own."""
        found = {}
        for role in ROLES.values():
            x, y = list[float](), list[float]()
            for (own, _), samples in self.memory.items():
                late = [s for s in samples if s[0] - samples[0][0] >= WARM]
                if own == role and len(late) > 10:
                    times, sizes = np.array(late).T
                    x += list((times - times.mean()) / 60)
                    y += list((sizes - sizes.mean()) / 1e6)
            if x:
                found[role] = float(np.dot(x, y) / np.dot(x, x))
        return found


def living(folder: Path) -> dict[str, list[psutil.Process]]:
    """The processes of this folder's trial, by role."""
    found: dict[str, list[psutil.Process]] = defaultdict(list)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if MARK not in process.environ() or folder not in Path(process.cwd()).parents:
                continue
            line = " ".join(process.cmdline())
            for part, role in ROLES.items():
                if part in line:
                    found[role].append(process)
                    break
    return found


def lines(folder: Path, kind: str) -> list[dict[str, object]]:
    """The record's lines of a kind; one that is being written is left out."""
    path, found = folder / "server/run/metrics.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if line["kind"] == kind:
                found.append(line)
    return found


def soak(folder: Path, minutes: float, every: float, seed: int) -> Watched:
    """Runs the deployment for so long; from its first round on one kill in ``every`` seconds."""
    draw, seen = random.Random(seed), Watched(folder)
    command = [sys.executable, "-c", "from fedpeft.cli import main; main()", "deploy", "up"]
    options = [str(folder), "--local", "--restart", "--run-config", RUN_CONFIG]
    with (folder / "soak.log").open("wb") as out:
        up = subprocess.Popen([*command, *options], stdout=out, stderr=subprocess.STDOUT)
    began, due = time.monotonic(), 0.0
    try:
        while (now := time.monotonic() - began) < minutes * 60 and up.poll() is None:
            found = seen.look(now)
            if due == 0.0 and seen.rounds[-1][1] > 0:
                due = now + every
            if due and now >= due and found:
                role = draw.choice(sorted(found))
                with contextlib.suppress(psutil.Error):
                    draw.choice(sorted(found[role], key=lambda p: p.pid)).kill()
                    seen.killed[role] += 1
                due += every
            time.sleep(TICK)
        if up.poll() is not None:
            raise SystemExit(f"it ended by itself with {up.returncode}: see {folder / 'soak.log'}")
    finally:
        up.terminate()
        up.wait()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=30, help="seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    asked = parser.parse_args()
    seen = soak(asked.folder.resolve(), asked.minutes, asked.every, asked.seed)
    rounds = lines(seen.folder, "round")
    times = [when for when, _ in seen.rounds]
    reasons = Counter(
        f["reason"][:80]
        for line in rounds
        for f in line["failures"]  # type: ignore[attr-defined]
    )
    figures = {
        "minutes": asked.minutes,
        "every": asked.every,
        "seed": asked.seed,
        "rounds": len(rounds),
        "numbers in order": [line["round"] for line in rounds] == list(range(1, len(rounds) + 1)),
        "aborted": sum(bool(line.get("aborted")) for line in rounds),
        "killed": dict(seen.killed),
        "exclusions": dict(reasons),
        "longest without a round, s": round(max(np.diff([*times, asked.minutes * 60])), 1),
        "ledgers that grew shorter": seen.shorter,
        "left over": {role: len(own) for role, own in living(seen.folder).items()},
        "MB a minute": {role: round(slope, 3) for role, slope in seen.slopes().items()},
        "environment": environment.describe(),
    }
    print(json.dumps({k: v for k, v in figures.items() if k != "environment"}, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
