"""The built-in offline data source: functions of the user's own standard library.

Every Python installation carries thousands of documented functions, grouped in files
(which make natural clients) and in packages (which make class labels).  This module
reads them with :mod:`ast`.  Nothing is imported from the files read, nothing is
downloaded, and the same interpreter always gives the same rows in the same order.

The exact rows differ a little between Python versions, because the standard library
does.  A package that the installation lacks (some distributions split off ``tkinter``
and ``idlelib``) is left out, so the number of classes may differ too.
"""

from __future__ import annotations

import ast
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

CANDIDATE_PACKAGES: tuple[str, ...] = (
    "asyncio",
    "collections",
    "concurrent",
    "ctypes",
    "curses",
    "email",
    "html",
    "http",
    "idlelib",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "tkinter",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "xmlrpc",
    "zoneinfo",
)
"""Packages (not single-file modules) of Python 3.11 to 3.13 that may become classes."""

MIN_CHARS = 40
MAX_CHARS = 1500
MIN_ROWS_PER_PACKAGE = 60
MAX_ROWS_PER_PACKAGE = 600
MIN_PACKAGES = 4

_SKIPPED_PARTS = frozenset(
    {"test", "tests", "idle_test", "__pycache__", "pydoc_data", "encodings", "site-packages"}
)
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def read_pydocs(root: Path | None = None) -> list[dict[str, str]]:
    """Read functions and documented classes from a standard library tree.

    One row is one function or method (its source text) or one class that has a docstring
    (its header and docstring only).  Texts are dedented and hold between ``MIN_CHARS``
    and ``MAX_CHARS`` characters; longer and shorter ones are left out, and of equal texts
    only the first is kept.  Packages with fewer than ``MIN_ROWS_PER_PACKAGE`` rows are
    left out, and packages with more than ``MAX_ROWS_PER_PACKAGE`` are thinned evenly.

    Args:
        root: the folder that holds the packages; by default the running interpreter's
            standard library.

    Returns:
        Rows ``{"text", "package", "file"}``, sorted by file, then by position.  ``file``
        is the path relative to ``root`` with forward slashes, ``package`` its first part.

    Raises:
        ValueError: fewer than ``MIN_PACKAGES`` packages have enough rows.
    """
    base = Path(sysconfig.get_path("stdlib")) if root is None else Path(root)
    seen: set[str] = set()
    rows: list[dict[str, str]] = []
    found: list[str] = []
    for package in CANDIDATE_PACKAGES:
        package_rows = _read_package(base, package, seen)
        if len(package_rows) >= MIN_ROWS_PER_PACKAGE:
            found.append(package)
            rows.extend(_thin(package_rows, MAX_ROWS_PER_PACKAGE))
    if len(found) < MIN_PACKAGES:
        raise ValueError(
            f"found {len(found)} usable standard library packages under {base} "
            f"({', '.join(found) or 'none'}), but at least {MIN_PACKAGES} are needed; "
            "is the library's source installed, and not only its compiled form?"
        )
    return rows


def _read_package(base: Path, package: str, seen: set[str]) -> list[dict[str, str]]:
    """Rows of one package, sorted by file and position; texts in ``seen`` are skipped."""
    rows: list[dict[str, str]] = []
    folder = base / package
    names = sorted(path.relative_to(base).as_posix() for path in folder.rglob("*.py"))
    for name in names:
        if _SKIPPED_PARTS.isdisjoint(Path(name).parts):
            for text in _read_file(base / name):
                if text not in seen:
                    seen.add(text)
                    rows.append({"text": text, "package": package, "file": name})
    return rows


def _read_file(path: Path) -> list[str]:
    """Texts of one source file; empty if it cannot be decoded or parsed."""
    try:
        with tokenize.open(path) as stream:
            source = stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []
    return list(snippets(source))


def snippets(source: str) -> Iterator[str]:
    """Yield the functions and documented class headers of one module's source, in order.

    Functions defined inside functions are part of the outer function's text and are not
    yielded again.  Source that does not parse yields nothing.

    Args:
        source: the module's text, with Unix line ends.

    Yields:
        Dedented texts of ``MIN_CHARS`` to ``MAX_CHARS`` characters.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as invalid escapes: not ours to report
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = source.split("\n")
    for node in _definitions(tree):
        last = _last_line(node)
        if last is None:
            continue
        text = textwrap.dedent("\n".join(lines[node.lineno - 1 : last])).strip()
        if MIN_CHARS <= len(text) <= MAX_CHARS:
            yield text


def _definitions(node: ast.AST) -> Iterator[_Function | ast.ClassDef]:
    """Functions and classes below ``node`` in source order, without nested functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function):
            yield child
        elif isinstance(child, ast.ClassDef):
            yield child
            yield from _definitions(child)
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _definitions(child)


def _last_line(node: _Function | ast.ClassDef) -> int | None:
    """The last line of a definition's text, or None where it is to be left out."""
    if isinstance(node, _Function):
        return node.end_lineno
    if ast.get_docstring(node, clean=False) is None:
        return None
    return node.body[0].end_lineno


def _thin(rows: list[dict[str, str]], limit: int) -> list[dict[str, str]]:
    """At most ``limit`` rows, evenly spaced over the list, in the same order."""
    if len(rows) <= limit:
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]
