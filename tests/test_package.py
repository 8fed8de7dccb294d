"""What the package says of itself: names, version, entry point, dependencies."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fedpeft

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """constraints.txt: distribution -> version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(n): v for n, v in (line.split("==") for line in pinned)}


def test_star_import() -> None:
    names: dict[str, Any] = {}
    exec("from fedpeft import *", names)
    public = set(names) - {"__builtins__"}
    assert public == set(fedpeft.__all__)
    assert 1 <= len(public) <= 15
    assert not [n for n in public if isinstance(names[n], ModuleType)]


def test_strategies_cannot_be_imported_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ImportError, match=r"import fedpeft\.strategies, not strategies"):
        importlib.import_module("strategies")
    assert "strategies" not in sys.modules


def test_version_is_the_same_everywhere(project: dict[str, Any]) -> None:
    version = project["version"]
    assert metadata.version("fedpeft") == fedpeft.__version__ == version
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = re.search(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)
    assert latest and latest[1] == version


def test_command_is_callable() -> None:
    (command,) = metadata.entry_points(group="console_scripts", name="fedpeft")
    assert command.value == "fedpeft.cli:main"
    assert callable(command.load())


def imported(folder: str) -> set[str]:
    """Top-level names of the third-party modules that a folder's files import anywhere."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"fedpeft"}


def test_dependencies_are_what_the_code_imports(project: dict[str, Any]) -> None:
    names = imported("fedpeft") | imported("strategies")
    used = {"pyyaml" if n == "yaml" else canonicalize_name(n) for n in names}
    declared = {canonicalize_name(Requirement(r).name) for r in project["dependencies"]}
    assert used == declared


def test_constraints_pin_every_dependency_within_its_range(
    project: dict[str, Any], pins: dict[str, str]
) -> None:
    extras = project["optional-dependencies"]
    wanted = [Requirement(r) for r in [*project["dependencies"], *extras["test"], *extras["dev"]]]
    assert len(wanted) > 10
    unpinned = [r.name for r in wanted if canonicalize_name(r.name) not in pins]
    assert unpinned == []
    outside = [str(r) for r in wanted if pins[canonicalize_name(r.name)] not in r.specifier]
    assert outside == []


def test_constraints_name_no_build_of_one_kind(pins: dict[str, str]) -> None:
    assert len(pins) > 50
    assert not [n for n, v in pins.items() if "+" in v or n.startswith("nvidia")]
