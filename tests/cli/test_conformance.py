"""``fedpeft check-strategy`` on files of a user: table, JSON, exit codes, what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedpeft.cli.app import app
from fedpeft.conformance import PROPERTIES, deep

SHIPPED = Path(__file__).parents[2] / "strategies" / "fedprox.py"
ORACLE = """
def rule(toy, rounds, present):
    return {name: value.numpy() for name, value in toy.initial.items()}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder of its own, and a path and modules that are left as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    text = SHIPPED.read_text()
    (tmp_path / "my_prox.py").write_text(text)
    wrong = text.replace('weighted_mean(replies, "adapter")', "next(iter(replies))[0].trees[AD]")
    assert wrong != text
    (tmp_path / "first_only.py").write_text(wrong + '\n\nAD = "adapter"\n')
    yield tmp_path
    for name in set(sys.modules) - before:
        if name in ("my_prox", "first_only", "broken_file", "my_rules", "no_strategy"):
            del sys.modules[name]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check-strategy", *arguments])


def test_a_module_of_the_working_folder_with_settings() -> None:
    done = call("my_prox", "mu=0.5", "space=product")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["property", "verdict", "found"]
    assert lines[-1] == f"my_prox: of {len(PROPERTIES)} properties 31 hold, 0 broken, 4 skipped."
    assert max(map(len, lines)) <= 80


def test_a_file_in_another_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    done = call(str(here / "my_prox.py"), "mu=0")
    assert (done.exit_code, done.stderr) == (0, "")


def test_a_finding_is_exit_code_1_and_says_what_was_found() -> None:
    done = call("first_only.py")
    assert done.exit_code == 1
    text = " ".join(done.stdout.split())
    assert "every reply counts broken the data of client-1 do not matter" in text
    assert "5 broken" in text


def test_json_is_one_object_for_each_property_also_the_deep_ones() -> None:
    done = call("first_only", "--json", "--deep")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 1 and len(found) == len(PROPERTIES) + len(deep.PROPERTIES)
    assert all(line.keys() == {"event", "property", "verdict", "found"} for line in found)
    broken = {line["property"] for line in found if line["verdict"] == "broken"}
    assert "unequal weights matter" in broken and "linear as declared" in broken
    assert found[-1]["property"] == "batched is sequential on conv1d"


def test_an_oracle_from_the_command_line(here: Path) -> None:
    (here / "my_rules.py").write_text(ORACLE)
    done = call("my_prox", "--oracle", "my_rules.rule", "--json")
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["property"], last["verdict"]) == ("the rule is the oracles", "broken")
    assert "all clients, after round 1" in last["found"] and done.exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "strategy.name='nosuch' does not exist. Known: centralised, "),
        (["nosuch.py"], "'nosuch.py' is no file: give a Python file, or a module's name."),
        (["fedavg.py"], "'fedavg.py' has the name of a strategy that ships with fedpeft: rename"),
        (["my_prox", "mu=-1"], "strategy.mu=-1.0: the weight of the proximal term"),
        (["my_prox", "mo=1"], "strategy.mo=1: my_prox has no such setting. Known: mu, space."),
        (["my_prox", "mu"], "override 'strategy.mu' must be KEY=VALUE"),
        (["broken_file"], "'broken_file' cannot be imported (ZeroDivisionError: division by zero)"),
        (["no_strategy"], "module no_strategy must define exactly one Strategy, found []"),
        (["fedavg", "--oracle", "my_rules"], "--oracle='my_rules' is no function of an importable"),
        (["fedavg", "--oracle", "json.nosuch"], "--oracle='json.nosuch' is no function"),
    ],
)
def test_what_is_refused(here: Path, arguments: list[str], message: str) -> None:
    (here / "broken_file.py").write_text("1 / 0\n")
    (here / "no_strategy.py").write_text("x = 1\n")
    (here / "fedavg.py").write_text(SHIPPED.read_text())
    done = call(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert message in " ".join(done.stderr.split())
