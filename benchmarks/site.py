"""A resident site against a process per message: ``python -m benchmarks.site [KEY=VALUE]...``.

The same train messages of one client, to a process that loads everything (``client_app``), as
Flower starts one for each message, and to one that hands them to a resident site (``shim``). Both
are started in turn. What counts is the time from the message in hand until the first training step
begins; interpreter and Flower, which both have to load before, are in the second column.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.site_parts import FIRST_STEP
from fedpeft.config_load import dump_recipe, load_recipe
from fedpeft.flower import wire
from fedpeft.flower.records import Header, encode_stack
from fedpeft.prepare import prepare
from fedpeft.record import environment
from fedpeft.site.folder import write_config
from fedpeft.site.frames import listen, send
from fedpeft.site.server import Limits, Resident
from fedpeft.site.worker import Worker

RESIDENT_BAR, FRESH_BAR = 0.3, 5.0
"""Seconds: the most of a resident site from its second message on, the least of a fresh process."""

RECIPE = "experiments/recipes/banking77.yaml"


@dataclass(frozen=True)
class Timing:
    """Of one message, in seconds: until its first training step, and until its answer.

    in_hand: since its process had it; started: since that process was started. digest: of the
    answer's tensors.
    """

    in_hand: float
    started: float
    answered: float
    digest: str


class _Socket:
    """Collects what is sent on it."""

    def __init__(self) -> None:
        self.data = bytearray()

    def sendall(self, data: bytes) -> None:
        self.data += data


def write_requests(folder: Path, recipe: Any, rounds: int) -> str:
    """Files ``request-N``, the first round's message once for each; the client's name."""
    prepared = prepare(recipe)
    strategy, client = prepared.strategy, prepared.problem.clients[0]
    sent = strategy.send(strategy.init(prepared.problem), 1, (client,))
    text = dump_recipe(recipe)
    for number in range(rounds):
        header = Header(1, client, recipe=text, run="ab" * 16, nonce=f"{number:016x}")
        [content] = encode_stack(sent, [header])
        key = ["train", number]
        config = {"client": client, "socket": "resident/site.sock", "state": "state"}
        out = _Socket()
        head = {"kind": "train", "key": key, "config": config}
        send(out, wire.pack(head, content))  # type: ignore[arg-type]
        (folder / f"request-{number}").write_bytes(out.data)
    return client


def timed(folder: Path, app: str, number: int, environ: dict[str, str]) -> Timing:
    """One message to a new process of its own."""
    notes, steps = folder / "notes", Path(environ[FIRST_STEP])
    for path in (notes, steps):
        path.unlink(missing_ok=True)
    config = folder / ("own.json" if app.endswith("client_app") else "config.json")
    words = ["message", app, str(folder / f"request-{number}"), str(config), str(notes)]
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "benchmarks.site_parts", *words], env=environ, cwd=folder, check=True
    )
    noted, step = json.loads(notes.read_text()), float(steps.read_text().split()[0])
    return Timing(
        step - noted["in_hand"],
        step - began,
        noted["answered"] - noted["in_hand"],
        noted["digest"],
    )


@contextmanager
def resident(folder: Path, environ: dict[str, str]) -> Iterator[list[str]]:
    """A resident process's socket in ``folder``; its log."""
    said: list[str] = []
    command = [sys.executable, "-P", "-m", "benchmarks.site_parts", "worker", str(folder)]
    before = Path.cwd()
    os.chdir(folder)
    os.environ.update(environ)
    try:
        with listen(Path("resident/site.sock"), 8) as listener:
            own = Resident(listener, lambda: Worker(command), Limits(), said.append)
            thread = threading.Thread(target=own.serve)
            thread.start()
            try:
                yield said
            finally:
                own.stop()
                thread.join()
    finally:
        os.chdir(before)


def measure(recipe: Any, rounds: int) -> dict[str, list[Timing]]:
    """Both ways, message by message in turn."""
    found: dict[str, list[Timing]] = {"fresh": [], "resident": []}
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="fedpeft-") as name:
        folder = Path(name)
        client = write_requests(folder, recipe, rounds)
        config = {"client": client, "socket": "resident/site.sock", "state": "state"}
        write_config(folder, config)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "own.json").write_text(json.dumps({"client": client}))
        environ = {
            **os.environ,
            "PYTHONPATH": str(root),
            "TQDM_DISABLE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            FIRST_STEP: str(folder / "steps"),
        }
        with resident(folder, environ) as said:
            for number in range(rounds):
                for way, app in (("fresh", "client_app"), ("resident", "shim")):
                    one = timed(folder, f"fedpeft.flower.{app}", number, environ)
                    found[way].append(one)
                    print(
                        f"{way} {number + 1}: {one.in_hand:.3f} s, {one.started:.3f} s", flush=True
                    )
        print("\n".join(said))
    return found


def table(found: dict[str, list[Timing]]) -> Iterator[str]:
    """The medians, and the bars."""
    rows = {
        "a process per message": found["fresh"],
        "resident, first message": found["resident"][:1],
        "resident, later ones": found["resident"][1:],
    }
    yield "| | messages | first step after the message is in hand, s | after the start, s |"
    yield "|---|---|---|---|"
    for name, timings in rows.items():
        hand, started = ([t.in_hand for t in timings], [t.started for t in timings])
        yield (
            f"| {name} | {len(timings)} | {statistics.median(hand):.3f} "
            f"({min(hand):.3f} to {max(hand):.3f}) | {statistics.median(started):.3f} |"
        )
    late = max(t.in_hand for t in found["resident"][1:])
    early = min(t.in_hand for t in found["fresh"])
    for what, seconds, bar, good in (
        ("resident, the slowest", late, RESIDENT_BAR, late <= RESIDENT_BAR),
        ("fresh, the fastest", early, FRESH_BAR, early >= FRESH_BAR),
    ):
        yield f"{what}: {seconds:.3f} s, bar {bar}: {_verdict(good)}"
    digests = {timing.digest for timings in found.values() for timing in timings}
    yield f"answers: {_verdict(len(digests) == 1)}, {len(digests)} different"


def _verdict(good: bool) -> str:
    return "pass" if good else "FAIL"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--messages", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    load = os.getloadavg()
    recipe = load_recipe(asked.recipe, asked.overrides)
    found = measure(recipe, asked.messages)
    print("\n".join(table(found)))
    if asked.out:
        content = {
            "environment": environment.describe(),
            "load_before": load,
            "recipe": recipe.name,
            "timings": {way: [vars(one) for one in own] for way, own in found.items()},
        }
        asked.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
