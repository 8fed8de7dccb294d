"""``fedpeft deploy``: a recipe on sites of their own, through Flower."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
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
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that was stopped.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start again what dies, and go on with the run.")
    ] = False,
    run_config: Annotated[
        str, typer.Option(metavar="TEXT", help="Further run config, as 'reply-timeout=60'.")
    ] = "",
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
        from fedpeft.deploy.local import Settings, up

        settings = Settings(resume, restart, run_config)
        done = up(folder, lambda line: screen.print(Text(line), soft_wrap=True), settings)
        screen.print(
            f"completed in {done.seconds:.1f} s, {size(done.down)} to the sites, "
            f"{size(done.up)} from them. The adapter is in {done.adapter}",
            soft_wrap=True,
        )


@app.command(short_help="Show sites, rounds, bytes and budgets.")
def status(
    folder: Folder,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: VerboseFlag = False,
) -> None:
    """Show sites, rounds, bytes and budgets, while a deployment runs and after it.

    DIR is a folder of `fedpeft deploy init`, or on the server the server's own. Where the server
    does not answer, that is said, and the record of the run is shown.

    Exit codes: 0, also where the server does not answer; 2 a fault in what was given.
    """
    with reported(verbose):
        from fedpeft.deploy.status import status

        now = datetime.now(UTC)
        found = status(folder, now)
        if json:
            from fedpeft.cli.jsonl import write

            write(sys.stdout, "status", {"status": found})
        else:
            from fedpeft.cli.status import page

            Console(highlight=False).print(page(found, now))


@app.command(short_help="Sign a new certificate for the server.")
def renew(folder: Folder, verbose: VerboseFlag = False) -> None:
    """Sign a new certificate for the server, for the same names and key.

    DIR is a folder of `fedpeft deploy init`, with ca/ca.key. Sites need nothing new.
    """
    with reported(verbose):
        from fedpeft.deploy.layout import HOME, SERVER
        from fedpeft.deploy.renew import renew

        ends = renew(folder, datetime.now(UTC))
        path = folder / SERVER / "server.crt"
        Console(highlight=False).print(
            f"{path} is good until {ends:%Y-%m-%d}. Copy it to {HOME}/{SERVER} on the server, and "
            f"restart the server between two runs: systemctl restart fedpeft-server (or docker "
            f"compose restart server). The sites need nothing new.",
            soft_wrap=True,
        )
