"""``fedpeft site``: the resident process of a site, and whether it would take a recipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedpeft.cli import logs
from fedpeft.cli.bars import Bars


def serve(folder: Path, memory: float | None, queue: int) -> int:
    """Serves until a signal; the exit code. memory: of a worker, in GiB."""
    from fedpeft.site.process import memory_limit, run
    from fedpeft.site.server import Limits

    def say(line: str) -> None:
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
        sys.stdout.flush()

    most = memory_limit() if memory is None else int(memory * 2**30)
    return run(folder, Limits(queue, most), say)


def check(folder: Path, recipe: str, overrides: Sequence[str], verbose: bool) -> None:
    """Prints what the site would answer a server with this recipe. Raises FedpeftError."""
    from fedpeft.config_load import load_recipe
    from fedpeft.flower.resident import introduction
    from fedpeft.site.folder import read_config

    screen = Console(highlight=False)
    with logs.shown(screen, verbose=verbose), Bars(screen, shown=True):
        loaded = load_recipe(recipe, overrides)
        config = read_config(folder)
        os.chdir(folder)
        found = introduction(config, loaded)
    screen.print(
        f"the site takes this recipe, as {found.client} with {found.examples} training examples. "
        f"Digest of the base model (base_models in a policy): {found.base}",
        soft_wrap=True,
    )
