"""Coverage-guided fuzzing of one target: ``python -m tests.fuzz.run NAME [CORPUS] [-runs=...]``.

Needs atheris (``pip install atheris``), which the tests do not. Ends by itself with
``-max_total_time=60``; a crash is any exception that a target lets through.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fedpeft"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    name, *rest = sys.argv[1:]
    target, seeds = TARGETS[name]
    for place in [Path(word) for word in rest if not word.startswith("-")][:1]:
        place.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds()):
            (place / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *rest], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
