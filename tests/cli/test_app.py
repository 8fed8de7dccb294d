"""Help, version, what there is to list, and that asking is cheap."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from typing import get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from fedpeft.cli.app import app
from fedpeft.cli.descriptions import ADAPTERS, PARTITIONS, SOURCES
from fedpeft.config import Partition
from fedpeft.config_load import builtin_recipes
from fedpeft.model import adapter_kinds
from fedpeft.strategy import available

HEAVY = {"torch", "transformers", "peft", "datasets", "flwr", "numpy", "omegaconf"}


def listed(*topics: str) -> dict[str, str]:
    done = CliRunner().invoke(app, ["list", *topics])
    assert done.exit_code == 0
    pairs = (line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip())
    return {name: "".join(rest).strip() for name, *rest in pairs}


def test_importing_the_command_line_is_cheap() -> None:
    code = "import sys, fedpeft.cli; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "typer" in loaded
    assert loaded & HEAVY == set()


def test_a_terminal_that_knows_only_ascii() -> None:
    code = "from fedpeft.cli import descriptions, main; descriptions.PARTITIONS['iid'] = chr(8211)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; main()", "list", "partitions"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[:2] == ["iid", "?"]


def test_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"fedpeft {metadata.version('fedpeft')}\n")


@pytest.mark.parametrize(
    "command", ["run", "resume", "check", "check-strategy", "audit", "store", "list", "deploy"]
)
def test_help_describes_every_command(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    first = done.stdout.split("\n\n")[1].strip()
    assert first in " ".join(CliRunner().invoke(app, ["--help"]).stdout.split()) or len(first) > 40
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_help_documents_arguments_and_exit_codes() -> None:
    text = " ".join(CliRunner().invoke(app, ["run", "--help"]).stdout.split())
    for part in ("RECIPE is a YAML file", "KEY=VALUE", "[query,value]", "130 interrupted"):
        assert part in text


def test_no_arguments_show_the_help() -> None:
    done = CliRunner().invoke(app, [])
    assert "Begin with: fedpeft run quickstart" in done.output


def test_list_partitions_are_the_options_of_the_recipe() -> None:
    options = get_args(get_type_hints(Partition)["kind"])
    assert list(PARTITIONS) == list(options)
    assert listed("partitions") == PARTITIONS


def test_list_sources() -> None:
    assert listed("sources") == SOURCES


def test_list_strategies() -> None:
    assert listed("strategies") == available()


def test_list_adapters_are_the_installed_ones() -> None:
    found = listed("adapters")
    assert found.keys() == {"full", *adapter_kinds()}
    assert found["lora"].startswith("low-rank update B A")
    assert all(found.values())


def test_an_adapter_that_is_newer_than_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ADAPTERS, "osf")
    assert listed("adapters")["osf"] == "Configuration for Orthogonal Subspace Fine-tuning (OSF)."


def test_list_recipes_with_their_first_line() -> None:
    found = listed("recipes")
    assert list(found) == builtin_recipes()
    assert all(len(line) > 20 for line in found.values())


def test_list_all_has_headings() -> None:
    found = listed()
    for topic, key in (("strategies", "strategy.name"), ("adapters", "adapter.kind")):
        assert found[topic] == f"({key})"
    assert {"fedavg", "lora", "dirichlet", "pydocs"} <= found.keys()


def test_lines_fit_a_terminal_or_stay_whole() -> None:
    texts = [*PARTITIONS.values(), *SOURCES.values(), *ADAPTERS.values()]
    assert max(map(len, texts)) <= 90
    done = CliRunner().invoke(app, ["list", "strategies"])
    assert len(done.stdout.splitlines()) == len(available())  # no terminal: nothing is wrapped
