"""The house rules that no linter checks: sizes, forbidden calls, docstrings, paths, oracles.

Every walk over the tree asserts how much it found, so that none can pass by finding nothing.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType

import pytest

import fedpeft
import fedpeft.strategies
from fedpeft.strategy import available

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"fedpeft": 40, "strategies": 6, "experiments": 1, "benchmarks": 3, "tests": 30, ".ci": 1}
SHIPPED = ("fedpeft", "strategies")
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
MAX_FILE_BYTES = 9_000_000
PICKLES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|work|farm|opt|tmp)/")


def project_files() -> Iterator[Path]:
    """Every file of the project once: links are not followed, hidden folders are left out."""
    yield from (p for p in sorted(ROOT.iterdir()) if p.is_file())
    for top in FOLDERS:
        for folder, folders, files in os.walk(ROOT / top):
            folders[:] = sorted(f for f in folders if f != "__pycache__" and f[0] != ".")
            yield from (Path(folder) / name for name in sorted(files))


def python_files(*folders: str) -> list[Path]:
    found = []
    for top in folders:
        here = [p for p in project_files() if p.suffix == ".py" and p.is_relative_to(ROOT / top)]
        assert len(here) >= FOLDERS[top], f"{top}/: found only {len(here)} Python files"
        found += here
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def long_functions(module: ast.Module) -> list[str]:
    """Functions over the limit, from ``def`` to the last line."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{node.name} ({lines} lines)")
    return found


def unsafe(node: ast.AST) -> str | None:
    """What is forbidden about a node of shipped code, or None."""
    match node:
        case ast.Import(names=names):
            bad = [a.name for a in names if a.name.split(".")[0] in PICKLES]
            return f"import {bad[0]}" if bad else None
        case ast.ImportFrom(module=str(module)) if module.split(".")[0] in PICKLES:
            return f"from {module} import"
        case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save" as verb):
            return f"torch.{verb}"
        case ast.Call(func=ast.Name(id="hasattr")):
            return "hasattr"
        case ast.keyword(arg="trust_remote_code" | "allow_pickle" as arg, value=value):
            harmless = isinstance(value, ast.Constant) and value.value is False
            return None if harmless else f"{arg} is not False"
        case _:
            return None


def kwargs_passed_on(module: ast.Module) -> list[str]:
    """Functions that hand their ``**kwargs`` on to a call."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.kwarg:
            for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
                for word in call.keywords:
                    if word.arg is None and ast.unparse(word.value) == node.args.kwarg.arg:
                        found.append(node.name)
    return found


def test_functions_fit_the_budget() -> None:
    paths = python_files("fedpeft", "strategies", "experiments", "benchmarks", ".ci")
    over = {name(p): long for p in paths if (long := long_functions(parse(p)))}
    assert not over


def test_files_fit_the_budget() -> None:
    lines = {
        name(p): len(p.read_text(encoding="utf-8").splitlines()) for p in python_files(*FOLDERS)
    }
    assert {n: count for n, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_no_pickle_no_remote_code_no_hasattr() -> None:
    found = [
        f"{name(path)}: {fault}"
        for path in python_files(*SHIPPED)
        for node in ast.walk(parse(path))
        if (fault := unsafe(node))
    ]
    assert found == []


def test_no_kwargs_passed_on() -> None:
    found = {name(p): bad for p in python_files(*SHIPPED) if (bad := kwargs_passed_on(parse(p)))}
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import dumps",
        "torch.load(path)",
        "hasattr(model, 'config')",
        "from_pretrained(name, trust_remote_code=trust)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_checks_catch_unsafe_code(code: str) -> None:
    assert [fault for node in ast.walk(ast.parse(code)) if (fault := unsafe(node))]


def test_the_checks_catch_kwargs_and_long_functions() -> None:
    assert kwargs_passed_on(ast.parse("def f(**kw):\n    return g(1, **kw)")) == ["f"]
    assert kwargs_passed_on(ast.parse("def f(**kw):\n    return g(1, kw)")) == []
    body = "    pass\n" * MAX_FUNCTION_LINES
    assert long_functions(ast.parse(f"def f():\n{body}")) == [f"f ({MAX_FUNCTION_LINES + 1} lines)"]


def test_no_path_of_one_machine() -> None:
    texts = 0
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not a text file
        texts += 1
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{name(path)}:{number}: {line.strip()[:80]}")
    assert texts > 50
    assert found == []


def test_the_only_link_is_that_to_the_strategies() -> None:
    """A link to one machine's folder would be followed, or written over what lies there."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    links = [line.split("\t")[1] for line in listed.stdout.splitlines() if line[:6] == "120000"]
    assert links == ["fedpeft/strategies"]


def test_no_file_is_large() -> None:
    sizes = {name(path): path.stat().st_size for path in project_files()}
    assert {"pyproject.toml", "fedpeft/tree.py", "strategies/fedavg.py"} <= sizes.keys()
    assert {n: size for n, size in sizes.items() if size > MAX_FILE_BYTES} == {}


def test_every_strategy_has_a_test_of_its_own() -> None:
    files = {p.stem for p in python_files("strategies") if not p.stem.startswith("_")}
    assert files == set(available())
    tests = {p.name for p in (ROOT / "tests" / "strategies").glob("test_*.py")}
    assert {f"test_{stem}.py" for stem in files} - tests == set()


def test_strategies_in_the_package_are_the_link() -> None:
    assert (ROOT / "fedpeft" / "strategies").is_symlink()
    assert os.readlink(ROOT / "fedpeft" / "strategies") == "../strategies"
    assert Path(fedpeft.strategies.__path__[0]).samefile(ROOT / "strategies")


def public(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Public functions, classes and methods that a module defines, by dotted name."""
    for label, value in vars(module).items():
        if label.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            yield f"{module.__name__}.{label}", value
        if inspect.isclass(value):
            for member, raw in vars(value).items():
                kinds = (property, cached_property, staticmethod, classmethod)
                if member[0] != "_" and (inspect.isfunction(raw) or isinstance(raw, kinds)):
                    yield f"{module.__name__}.{label}.{member}", getattr(value, member)


def documented(value: object) -> bool:
    """Whether there is a docstring, own or inherited; one that dataclass generated is none."""
    text = inspect.getdoc(value)
    return bool(text) and not (inspect.isclass(value) and text.startswith(f"{value.__name__}("))


def test_everything_public_has_a_docstring() -> None:
    names = [m.name for m in pkgutil.walk_packages(fedpeft.__path__, "fedpeft.")]
    modules = [fedpeft, *(importlib.import_module(n) for n in names)]
    items = [item for module in modules for item in public(module)]
    assert len(modules) == len(python_files(*SHIPPED))
    assert len(items) > 100
    assert [m.__name__ for m in modules if not m.__doc__] == []
    assert [label for label, value in items if not documented(value)] == []


def markdown_references(text: str) -> tuple[set[str], set[str]]:
    """Relative link targets, and code spans that name a path of the project."""
    links = set(re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text))
    spans = re.findall(r"`([^`\s]+)`", text)
    return links, {s for s in spans if "/" in s and s.split("/")[0] in FOLDERS and "<" not in s}


def test_documents_name_paths_and_targets_that_exist() -> None:
    documents = [p for p in project_files() if p.suffix == ".md"]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {name(p) for p in documents}
    checked, missing = 0, []
    for document in documents:
        text = document.read_text(encoding="utf-8")
        links, paths = markdown_references(text)
        checked += len(links) + len(paths)
        missing += [f"{name(document)}: {x}" for x in links if not (document.parent / x).exists()]
        globs = {x: x.replace("NAME", "*").rstrip("/") for x in paths}
        missing += [f"{name(document)}: {x}" for x, g in globs.items() if not any(ROOT.glob(g))]
        verbs = set(re.findall(r"`make (\w+)", text)) | set(re.findall(r"^make (\w+)", text, re.M))
        missing += [f"{name(document)}: make {x}" for x in verbs - targets]
    assert checked > 10
    assert missing == []
