"""Memory and time of a round by cohort and by population: ``python -m benchmarks.scale``.

Writes stores of synthetic clients, then plays rounds of federated averaging from them, every point
in a process of its own. The first round of a point fills the allocator and is not measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.memory import Sampler
from benchmarks.model import build_model
from benchmarks.workload import CLASSES, SEED, Workload
from fedpeft.cohort.choose import choose_lane
from fedpeft.cohort.federation import CohortFederation, Settings
from fedpeft.config import Rounds, Sampling
from fedpeft.data.clients import Clients, Pieces, Population
from fedpeft.data.examples import Examples
from fedpeft.data.store import open_store
from fedpeft.data.store_writer import write_store
from fedpeft.engine import play_round
from fedpeft.model import build_network
from fedpeft.names import Names
from fedpeft.record import environment
from fedpeft.strategy import Problem, build

COHORTS = (100, 1000, 10_000)
"""Clients of a round, in the largest population."""

POPULATIONS = (1000, 10_000, 100_000, 1_000_000)
"""Registered clients, for rounds of 1,000."""

COHORT = 1000
CHUNK = 64
WARM = 512
"""Clients of the first round, which is not measured."""

TOKENS = 8
WORKLOAD = Workload("scale", 64, 256, examples=4, tokens=TOKENS, batch=4, overhead=True)
"""A client has 2 to 6 training texts of 8 tokens and one of its own to test on; the base is B's."""


def examples(count: int, stream: np.random.Generator) -> Examples:
    """Texts of TOKENS tokens."""
    tokens = stream.integers(WORKLOAD.vocabulary, size=count * TOKENS, dtype=np.int32)
    labels = stream.integers(CLASSES, size=count)
    starts = torch.arange(count + 1) * TOKENS
    return Examples(torch.from_numpy(tokens), starts, torch.from_numpy(labels), pad=0)


def population(clients: int) -> Population:
    """So many clients; two calls give the same."""
    stream = np.random.default_rng(SEED)
    sizes = stream.integers(2, 7, size=clients)
    first = np.concatenate([[0], np.cumsum(sizes + 1)])  # a client's texts follow one another
    held = first[1:] - 1
    train = np.delete(np.arange(first[-1]), held)
    return Population(
        "classification",
        Clients(
            Names.of(f"client-{number:07d}" for number in range(clients)),
            Pieces(train, np.concatenate([[0], np.cumsum(sizes)])),
            Pieces(held, np.arange(clients + 1)),
        ),
        examples(int(first[-1]), stream),
        examples(64, stream),
        tuple(str(label) for label in range(CLASSES)),
        "",
    )


def memory() -> dict[str, int]:
    """Bytes of this process: resident now, of that its own (anonymous) and of files, and peak."""
    fields = {"VmRSS": "resident", "RssAnon": "own", "RssFile": "files", "VmHWM": "peak"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in fields:
            found[fields[name]] = int(rest.split()[0]) * 1024
    return found


def point(folder: str, cohort: int, rounds: int, chunk: int) -> dict[str, Any]:
    """Plays one round of WARM and ``rounds`` measured rounds of ``cohort`` clients."""
    network = build_network(build_model(WORKLOAD), "classification", CLASSES, torch.device("cpu"))
    began = time.perf_counter()
    everyone = open_store(folder)
    opened = time.perf_counter() - began
    seen: list[dict[str, int]] = []
    strategy, settings = build("fedavg", {}), Settings(WORKLOAD.local, Rounds(), SEED)
    lane = choose_lane(network, everyone.examples)
    federation = CohortFederation(
        network, lane, everyone, strategy, settings, chunk, lambda *_: seen.append(memory())
    )
    names = everyone.clients.names
    state = strategy.init(
        Problem(network.initial, network.scaling, names, rounds + 1, settings.seed)
    )
    seconds = []
    for number, size in enumerate([min(WARM, len(names)), *[cohort] * rounds], start=1):
        began = time.perf_counter()
        plan = Rounds(rounds + 1, Sampling("fixed", size=size))
        state, report = play_round(strategy, state, federation, plan, SEED, number)
        seconds.append(time.perf_counter() - began)
        assert report.replied == size, report.excluded
        if number == 1:
            before, seen = memory(), []
    peaks = {name: max(one[name] for one in [*seen, memory()]) for name in before}
    return {
        "population": len(names),
        "cohort": cohort,
        "chunk": chunk,
        "lane": lane.name,
        "adapter_bytes": 4 * network.layout.size,
        "open_seconds": opened,
        "seconds_per_client": [passed / cohort for passed in seconds[1:]],
        "before": before,
        "during": peaks,
        "environment": environment.describe(),
    }


def write(folder: str, clients: int) -> dict[str, Any]:
    """Writes the store of so many clients."""
    made = population(clients)
    began = time.perf_counter()
    write_store(made, folder)
    files = [path.stat().st_size for path in Path(folder).iterdir()]
    forget(Path(folder))
    return {
        "population": clients,
        "examples": len(made.examples),
        "bytes": sum(files),
        "write_seconds": time.perf_counter() - began,
    }


def forget(folder: Path) -> None:
    """Drops the files from the system's cache, so that the first point reads them as any other."""
    if sys.platform == "linux":
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def apart(*words: object) -> dict[str, Any]:
    """What ``write`` or ``point`` gives in a process of its own, and the process's peak of PSS."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.scale", *map(str, words)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)
    sampler = Sampler(child.pid)
    text, _ = child.communicate()
    sampler.stop()
    if child.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))} ended with {child.returncode}")
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return {**found, "peak_pss": sampler.peak if sampler.proportional else None}


def points(cohorts: Sequence[int], populations: Sequence[int]) -> list[tuple[int, int]]:
    """Population and cohort of every point, each once."""
    by_cohort = [(max(populations), cohort) for cohort in cohorts]
    by_population = [(count, min(COHORT, count)) for count in populations]
    return sorted({*by_cohort, *by_population})


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All stores and points."""
    stores, found = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for clients, cohort in points(options.cohorts, options.populations):
            path = Path(folder) / str(clients)
            if not path.exists():
                stores.append(apart("write", path, clients))
                print(f"{clients:,} clients: {stores[-1]['write_seconds']:.1f} s", flush=True)
            found.append(apart("point", path, cohort, options.rounds, options.chunk))
            print(line(found[-1]), flush=True)
    described = [one.pop("environment") for one in found]
    return {
        "schema": 1,
        "date": datetime.date.today().isoformat(),
        "command": command(options),
        "environment": described[0],
        "stores": stores,
        "points": found,
    }


def line(found: dict[str, Any]) -> str:
    """A point in one line."""
    during, each = found["during"], min(found["seconds_per_client"])
    return (
        f"{found['population']:>9,} clients, {found['cohort']:>6,} in a round: "
        f"own {during['own'] / 1e6:6.1f} MB, peak {during['peak'] / 1e6:6.1f} MB, "
        f"opened in {1e3 * found['open_seconds']:5.1f} ms, {1e3 * each:.3f} ms a client"
    )


def command(options: argparse.Namespace) -> str:
    """The command that measures the same again, without paths of this machine."""
    lists = {
        name: " ".join(map(str, getattr(options, name))) for name in ("cohorts", "populations")
    }
    words = [f"--{name} {value}" for name, value in lists.items()]
    return " ".join(
        ["python -m benchmarks.scale", *words, f"--rounds {options.rounds} --chunk {options.chunk}"]
    )


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks.scale", description=__doc__)
    parser.add_argument("--cohorts", type=int, nargs="+", default=COHORTS)
    parser.add_argument("--populations", type=int, nargs="+", default=POPULATIONS)
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds of each point")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="clients trained at once")
    parser.add_argument("--folder", type=Path, help="where the stores lie meanwhile (1 GB)")
    parser.add_argument("--out", type=Path, help="JSON file for every figure")
    parser.add_argument("--curve", type=Path, help="SVG file for the curves")
    return parser.parse_args(given)


def main(given: Sequence[str]) -> None:
    """Measures, prints, writes; ``write`` and ``point`` are one step in this process."""
    if given[:1] == ["write"]:
        print(json.dumps(write(given[1], int(given[2]))))
    elif given[:1] == ["point"]:
        torch.set_num_threads(1)
        print(json.dumps(point(given[1], *map(int, given[2:]))))
    else:
        options = arguments(given)
        found = measure(options)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
        if options.curve:
            from benchmarks.scale_curve import draw

            draw(found, options.curve)


if __name__ == "__main__":
    main(sys.argv[1:])
