"""What the user reads and the exit code when a command fails; nothing heavy is run."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

import fedpeft.run  # before any test replaces what it imports
from fedpeft.cli.app import app
from fedpeft.config import Recipe
from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.events import Summary, Watcher
from tests.cli import fakes

Play = Callable[[Watcher], Summary]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Calls the command line with ``play`` in place of what a run does."""

    def call(play: Play, *arguments: str) -> Result:
        monkeypatch.setattr("fedpeft.config_load.load_recipe", lambda *_: Recipe())
        monkeypatch.setattr(fedpeft.run, "run", lambda _, watcher: play(watcher))
        monkeypatch.setattr(fedpeft.run, "resume", lambda _, watcher: play(watcher))
        return CliRunner().invoke(app, list(arguments))

    return call


def raising(error: BaseException, planned: bool = True) -> Play:
    def play(watcher: Watcher) -> Summary:
        if planned:
            watcher.planned(fakes.plan(), "runs/my run")
        raise error

    return play


def test_success(command: Callable[..., Result]) -> None:
    done = command(fakes.act, "run", "any")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "fedavg" in done.stdout


@pytest.mark.parametrize("name", ["run", "resume"])
def test_a_fault_of_the_user(command: Callable[..., Result], name: str) -> None:
    text = "local.lr=-1 must be above 0 and finite. " + "x" * 100
    done = command(raising(FedpeftError(text)), name, "any")
    assert done.exit_code == 2
    assert done.stderr == f"error: {text}\n"  # one line, whatever its length, and no traceback


def test_a_message_is_no_markup(command: Callable[..., Result]) -> None:
    done = command(raising(FedpeftError("labels [bold]a[/bold] and [red]")), "run", "any")
    assert done.stderr == "error: labels [bold]a[/bold] and [red]\n"


def test_verbose_adds_the_traceback(command: Callable[..., Result]) -> None:
    done = command(raising(FedpeftError("wrong")), "run", "any", "--verbose")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr and "in raising" not in done.stderr.splitlines()[-1]
    assert done.stderr.endswith("error: wrong\n")


def test_too_few_replies(command: Callable[..., Result]) -> None:
    error = QuorumError("round 3: 1 valid replies of 8 clients.")
    done = command(raising(error), "run", "any")
    assert done.exit_code == 3
    assert done.stderr == (
        "error: round 3: 1 valid replies of 8 clients. "
        "The run can go on: fedpeft resume 'runs/my run'\n"
    )


def test_ctrl_c_says_how_to_go_on(command: Callable[..., Result]) -> None:
    done = command(raising(KeyboardInterrupt()), "run", "any")
    assert done.exit_code == 130
    assert done.stderr == (
        "interrupted. The run can go on: fedpeft resume 'runs/my run'\n"  # quoted for the shell
    )


def test_ctrl_c_before_there_is_a_run(command: Callable[..., Result]) -> None:
    done = command(raising(KeyboardInterrupt(), planned=False), "run", "any")
    assert done.exit_code == 130
    assert done.stderr == "interrupted. Nothing was trained yet.\n"


def test_ctrl_c_of_a_command_that_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedpeft.config_load.load_recipe", stop)
    done = CliRunner().invoke(app, ["check", "any"])
    assert (done.exit_code, done.stderr) == (130, "interrupted.\n")


def test_a_defect_shows_its_traceback(command: Callable[..., Result]) -> None:
    done = command(raising(KeyError("lora_A")), "run", "any")
    assert done.exit_code == 1
    assert "Traceback" in done.stderr and "KeyError: 'lora_A'" in done.stderr
    assert "This is a defect of fedpeft" in done.stderr.splitlines()[-1]


def test_errors_are_shown_in_quiet_mode_and_nothing_else(command: Callable[..., Result]) -> None:
    done = command(raising(FedpeftError("wrong")), "run", "any", "-q")
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", "error: wrong\n")


def test_errors_in_json_mode_leave_stdout_to_events(command: Callable[..., Result]) -> None:
    done = command(raising(QuorumError("wrong.")), "run", "any", "--json")
    assert done.exit_code == 3
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["planned"]
    assert done.stderr.startswith("error: wrong.")


def test_what_others_print_is_not_among_the_events(command: Callable[..., Result]) -> None:
    def play(watcher: Watcher) -> Summary:
        print("a library greets")
        logging.getLogger("fedpeft.cohort").warning("lane loop")
        return fakes.act(watcher)

    done = command(play, "run", "any", "--json")
    found = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert (found[0], found[-1]) == ("planned", "summary")
    assert "a library greets" in done.stderr and "lane loop" in done.stderr
    assert sys.stdout is not sys.stderr


def test_quiet_mode_prints_the_table_only(command: Callable[..., Result]) -> None:
    def play(watcher: Watcher) -> Summary:
        logging.getLogger("fedpeft.cohort").warning("lane loop")
        return fakes.act(watcher)

    done = command(play, "run", "any", "--quiet")
    lines = done.stdout.splitlines()
    assert lines[1].split()[:2] == ["accuracy", "macro-F1"]
    assert len(lines) == 3 + 4
    assert done.stderr == ""


@pytest.mark.parametrize("other", ["--json", "--verbose"])
def test_quiet_excludes(command: Callable[..., Result], other: str) -> None:
    done = command(fakes.act, "run", "any", "--quiet", other)
    assert done.exit_code == 2
    assert f"--quiet and {other} exclude each other" in done.stderr
    assert done.stdout == ""


def test_overrides_reach_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def load(*arguments: object) -> Recipe:
        seen.extend(arguments)
        raise FedpeftError("enough")

    monkeypatch.setattr("fedpeft.config_load.load_recipe", load)
    given = ["local.lr=1e-3", "adapter.target_modules=[query,value]", "name=a b", "seed=-1"]
    for name in ("run", "check"):
        seen.clear()
        done = CliRunner().invoke(app, [name, "some.yaml", given[0], "-v", *given[1:]])
        assert done.exit_code == 2
        assert seen == ["some.yaml", given]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument 'RECIPE'"),
        (["resume"], "Missing argument 'RUN'"),
        (["run", "x", "--fast"], "No such option"),
        (["fly"], "No such command 'fly'"),
        (["list", "strategy"], "'strategy' is not one of"),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_defect(command: Callable[..., Result]) -> None:
    done = command(raising(BrokenPipeError(32, "Broken pipe")), "run", "any", "--json")
    assert done.exit_code == 1
    assert "defect" not in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["resume", str(tmp_path)])
    assert done.exit_code == 2
    assert "is not a run folder" in done.stderr


def test_streams_are_as_before(command: Callable[..., Result]) -> None:
    before = (sys.stdout, sys.stderr, list(logging.getLogger().handlers))
    command(raising(KeyError("x")), "run", "any", "--json")
    assert (sys.stdout, sys.stderr, list(logging.getLogger().handlers)) == before
    assert not isinstance(sys.stdout, io.StringIO)
