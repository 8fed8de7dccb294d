"""The commands and their arguments."""

from __future__ import annotations

import dataclasses
import io
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedpeft.cli import deploy, listing, logs, tables
from fedpeft.cli.bars import Bars
from fedpeft.cli.failures import reported
from fedpeft.cli.session import Mode, play

if TYPE_CHECKING:
    from fedpeft.events import Summary, Watcher

app = typer.Typer(
    help="Federated parameter-efficient fine-tuning: clients train adapters on a frozen model, "
    "a strategy aggregates them.",
    epilog="Begin with: fedpeft run quickstart",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(deploy.app, name="deploy", short_help="Put a recipe on machines of their own.")

# Arguments are described in the commands' docstrings and hidden from click's own list: typer before
# 0.21 with click from 8.5 prints that list without its texts.
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", hidden=True)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", hidden=True)]
QuietFlag = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors and the last table only.")
]
JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON object per event; the last is the summary.")
]
VerboseFlag = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Show logs (such as the lane's choice) and tracebacks."),
]
LogFile = Annotated[
    Path | None,
    typer.Option("--log", metavar="FILE", help="Append the log to FILE, as JSON lines."),
]
MetricsPort = Annotated[
    int,
    typer.Option(
        metavar="PORT", show_default=False, help="Answer Prometheus on 127.0.0.1:PORT meanwhile."
    ),
]


def main() -> None:
    """The ``fedpeft`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a dash must not end a run in an ASCII locale
            stream.reconfigure(errors="replace")
    app(prog_name="fedpeft")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedpeft {metadata.version('fedpeft')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None: ...


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
    verbose: VerboseFlag = False,
    log: LogFile = None,
    metrics_port: MetricsPort = 0,
) -> None:
    """Run a recipe: train, evaluate, compare, export the adapter.

    RECIPE is a YAML file or a built-in name (see `fedpeft list recipes`). KEY=VALUE changes it:
    local.lr=1e-3, or 'adapter.target_modules=[query,value]' with quotes for the shell.

    Ctrl-C leaves a run that `fedpeft resume` goes on with. Exit codes: 0 done, 1 a defect of
    fedpeft, 2 a fault in what was given, 3 too few valid replies in a round, 130 interrupted, 143
    ended by SIGTERM.
    """

    def start(watcher: Watcher) -> Summary:
        from fedpeft.config_load import load_recipe
        from fedpeft.run import run

        return run(load_recipe(recipe, overrides or []), watcher)

    play(start, _mode(quiet, json, verbose, log, metrics_port))


@app.command(short_help="Go on with a run that was stopped.")
def resume(
    folder: Annotated[str, typer.Argument(metavar="RUN", hidden=True)],
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Go on though KEY of RUN/recipe.yaml was changed."),
    ] = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
    verbose: VerboseFlag = False,
    log: LogFile = None,
    metrics_port: MetricsPort = 0,
) -> None:
    """Go on with a run that was stopped, from its last checkpoint.

    RUN is the run's folder (output.folder of its recipe). The result is the same, bit by bit, as if
    the run had never stopped.
    """

    def start(watcher: Watcher) -> Summary:
        from fedpeft.record.folder import RunFolder
        from fedpeft.run import resume

        if allow_change:
            RunFolder.open(Path(folder)).allow(allow_change)
        return resume(folder, watcher)

    play(start, _mode(quiet, json, verbose, log, metrics_port))


@app.command(short_help="Show what a run would train, send and need.")
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as a JSON object.")] = False,
    verbose: VerboseFlag = False,
) -> None:
    """Show what a run would train, send and need. Loads data and model, trains nothing.

    Reads every byte of a store (data.source) to see that it is whole; a run does not.
    RECIPE and KEY=VALUE are as for `fedpeft run`.
    """
    out, screen = sys.stdout, Console(highlight=False)
    told = Console(stderr=True) if json else screen
    with reported(verbose):
        with logs.shown(told, verbose=verbose), Bars(screen, shown=not json):
            from fedpeft.config_load import load_recipe
            from fedpeft.data.store import is_store, verify_store
            from fedpeft.plan import make_plan
            from fedpeft.prepare import prepare

            loaded = load_recipe(recipe, overrides or [])
            if is_store(loaded.data.source):
                verify_store(loaded.data.source)
            found = make_plan(prepare(loaded), sends=True)
        if json:
            from fedpeft.cli.jsonl import write

            write(out, "plan", {"plan": found})
        else:
            screen.print(tables.plan(found))


@app.command(short_help="Write a recipe's clients into a store on disk.")
def store(
    recipe: RecipeName,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", hidden=True)],
    overrides: Overrides = None,
    verbose: VerboseFlag = False,
) -> None:
    """Write a recipe's clients, tokenised and divided, into a store on disk.

    FOLDER is new or empty. Runs with data.source=FOLDER open it at once, read a client when they
    train it, and give the same adapter. RECIPE and KEY=VALUE are as for `fedpeft run`.
    """
    screen = Console(highlight=False)
    with reported(verbose), logs.shown(screen, verbose=verbose), Bars(screen, shown=True):
        from fedpeft.config_load import load_recipe
        from fedpeft.prepare import prepare_store

        made = prepare_store(load_recipe(recipe, overrides or []), folder)
        screen.print(
            f"{len(made.clients):,} clients, {len(made.examples):,} training and hold-out examples "
            f"in {folder}",
            soft_wrap=True,
        )


@app.command(short_help="Serve a site of a deployment, with model and data at hand.")
def site(
    folder: Annotated[Path, typer.Argument(metavar="DIR", hidden=True)],
    overrides: Overrides = None,
    check: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Say whether the site takes a recipe; end.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(metavar="GIB", min=0.1, help="Of a worker between two messages.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 8,
    verbose: VerboseFlag = False,
) -> None:
    """Serve a site of a deployment: one process that keeps model and data between messages.

    DIR is a site's folder of `fedpeft deploy init`. Flower's node hands messages to it over the
    Unix socket that DIR/site.json names. A worker that crashes, or that grows beyond --memory
    (three quarters of the machine's unless given), is started again; SIGTERM ends it after the
    message under way, a second one at once. KEY=VALUE changes the recipe of --check.

    Exit codes: 143 (130) ended by SIGTERM (Ctrl-C), 0 --check: the recipe would be taken, 2 a fault
    in what was given, or a recipe that is refused.
    """
    from fedpeft.cli import site as sites

    with reported(verbose):
        if check is None:
            code = sites.serve(folder, memory, queue)
        else:
            sites.check(folder, check, overrides or [], verbose)
            code = 0
    raise typer.Exit(code)


@app.command("check-strategy", short_help="Check a strategy of your own for what must hold.")
def check_strategy(
    strategy: Annotated[str, typer.Argument(metavar="STRATEGY", hidden=True)],
    settings: Overrides = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also on tiny models: batched equals one by one.")
    ] = False,
    oracle: Annotated[
        str | None, typer.Option(help="MODULE.FUNCTION: the paper's rule in numpy.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per property.")
    ] = False,
    verbose: VerboseFlag = False,
) -> None:
    """Check a strategy for what must hold, whatever its rule, on a toy federation.

    STRATEGY is a Python file (my_strategy.py), a module, or a name of `fedpeft list strategies`.
    KEY=VALUE are its own settings: mu=0.1.

    Exit codes: 0 all properties hold or do not apply, 1 a property is broken, 2 a fault in what was
    given.
    """
    from fedpeft.cli import conformance

    screen = Console(highlight=False)
    with reported(verbose):
        from fedpeft.conformance import check

        subject = conformance.strategy(strategy, settings or [])
        found = list(check(subject, conformance.properties(deep, oracle)))
        if json:
            from fedpeft.cli.jsonl import write

            for line in found:
                write(sys.stdout, "verdict", dataclasses.asdict(line))
        else:
            screen.print(conformance.table(found))
            screen.print(conformance.summary(strategy, found))
    if any(line.verdict == "broken" for line in found):
        raise typer.Exit(1)


@app.command(short_help="Attack a run, and compare with the epsilon that it claims.")
def audit(
    folder: Annotated[str, typer.Argument(metavar="RUN", hidden=True)],
    canaries: Annotated[
        int, typer.Option(help="Examples that a coin puts in or leaves out.")
    ] = 200,
    seed: Annotated[int, typer.Option(help="Of the canaries and their coins.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per attack.")] = False,
    verbose: VerboseFlag = False,
) -> None:
    """Attack a run: what its adapter and updates give away, beside what it claims.

    Trains RUN's recipe again, with canaries among the clients' data; RUN itself stays as it is.
    Exit codes: 0 nothing contradicts the claim, 1 an attack got more than it allows, 2 a fault in
    what was given.
    """
    from fedpeft.cli import audit as audits

    if audits.refuted(folder, canaries, seed, json, verbose):
        raise typer.Exit(1)


@app.command(short_help="Write clients' own models of a run, as small as they were pruned.")
def export(
    folder: Annotated[str, typer.Argument(metavar="RUN", hidden=True)],
    out: Annotated[str, typer.Argument(metavar="OUT", hidden=True)],
    clients: Annotated[list[str] | None, typer.Argument(metavar="[CLIENT]...", hidden=True)] = None,
    verbose: VerboseFlag = False,
) -> None:
    """Write clients' own models: adapter merged, what they pruned cut out.

    OUT is new or empty; each CLIENT (by default all) gets a folder of its own in it, by number, and
    clients.json says whose. Where transformers cannot read one, it holds pruned.json, and
    fedpeft.pruned.load can.
    """
    screen = Console(highlight=False)
    with reported(verbose), logs.shown(screen, verbose=verbose):
        from pathlib import Path

        from fedpeft.exports import export_clients

        found = export_clients(Path(folder), Path(out), clients or [])
        screen.print(f"{len(found):,} models in {out}", soft_wrap=True)


@app.command("list", short_help="List what a recipe can name, with one line each.")
def list_(
    topic: Annotated[listing.Topic | None, typer.Argument(metavar="[TOPIC]", hidden=True)] = None,
) -> None:
    """List what a recipe can name, with one line each.

    The topics are recipes, strategies, adapters, partitions and sources; all of them without one.
    """
    with reported():
        listing.show([topic] if topic else list(listing.Topic))


def _mode(quiet: bool, json: bool, verbose: bool, log: Path | None, metrics_port: int) -> Mode:
    if quiet and (json or verbose):
        other = "--json" if json else "--verbose"
        raise typer.BadParameter(f"--quiet and {other} exclude each other: give one of them.")
    return Mode(quiet, json, verbose, log, metrics_port)
