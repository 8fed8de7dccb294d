"""``fedpeft deploy``: a recipe on sites of their own, through Flower."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from fedpeft.cli.failures import reported
from fedpeft.cli.units import size

app = typer.Typer(
    help="Deploy a recipe: files and keys for a server and its sites, and a trial on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", hidden=True)]
VerboseFlag = Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks.")]


@app.command(short_help="Write the folder of a federation.")
def init(
    folder: Folder,
    recipe: Annotated[str, typer.Option(help="A YAML file or a built-in name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", hidden=True)
    ] = None,
    sites: Annotated[
        int | None, typer.Option(help="How many sites; the recipe names its clients.")
    ] = None,
    site: Annotated[
        list[str] | None, typer.Option(help="A site, by its client's name; once for each.")
    ] = None,
    server: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where sites reach the server.")
    ] = "localhost:8000",
    verbose: VerboseFlag = False,
) -> None:
    """Write the folder of a federation: all that its machines need, and a README.

    DIR is new or empty. It gets certificates, a key pair per site, identities for secure
    aggregation, node configuration, systemd units, a compose file, and the commands for each
    machine in order. Every site is one client of the recipe. KEY=VALUE is as for `fedpeft run`.
    """
    with reported(verbose):
        if (sites is None) == (not site):
            raise typer.BadParameter("give either --sites N, or --site NAME for each site.")
        from fedpeft.deploy.create import init

        found = init(folder, recipe, overrides or [], site or sites or 0, server)
        screen = Console(highlight=False)
        screen.print(
            f"{len(found.sites)} sites and their server, {found.server}, are in {folder}. "
            f"Begin with {folder / 'README.md'}, or try it here: "
            f"fedpeft deploy up {folder} --local",
            soft_wrap=True,
        )


@app.command(short_help="Run a federation on this machine, over loopback.")
def up(
    folder: Folder,
    local: Annotated[
        bool, typer.Option("--local", help="All machines are this one; needed so far.")
    ] = False,
    verbose: VerboseFlag = False,
) -> None:
    """Run a federation on this machine, over loopback, with TLS and node authentication.

    DIR is a folder of `fedpeft deploy init`. Starts the server and all sites, plays the recipe
    once, and ends every process, also after Ctrl-C. What each prints is in DIR/logs.

    Exit codes: 0 the run was completed, 2 it was not (why is said), 130 interrupted.
    """
    screen = Console(highlight=False)
    with reported(verbose):
        if not local:
            raise typer.BadParameter(
                f"on machines of their own, server and sites are started as "
                f"{folder / 'README.md'} says; add --local to try them here.",
                param_hint="--local",
            )
        from fedpeft.deploy.local import up

        done = up(folder, lambda line: screen.print(Text(line), soft_wrap=True))
        screen.print(
            f"completed in {done.seconds:.1f} s, {size(done.down)} to the sites, "
            f"{size(done.up)} from them. The adapter is in {done.adapter}",
            soft_wrap=True,
        )
