"""Tests of the built-in data source: functions of the standard library."""

from __future__ import annotations

import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from fedpeft.data import pydocs
from fedpeft.data.pydocs import read_pydocs, snippets

PACKAGES = ("asyncio", "email", "json", "xml")
FUNCTIONS_PER_FILE = 40


def function(package: str, stem: str, number: int) -> str:
    """The source of one function, unlike any other in the tree."""
    return f'def {package}_{stem}_{number}(value):\n    """Doc {number}."""\n    return value\n'


def write_module(root: Path, package: str, name: str, functions: int = FUNCTIONS_PER_FILE) -> None:
    """Write one module with the given number of functions."""
    path = root / package / name
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.stem
    body = "\n\n".join(function(package, stem, number) for number in range(functions))
    path.write_text(body, encoding="utf-8")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small standard library: four packages of two modules each."""
    for package in PACKAGES:
        write_module(tmp_path, package, "zeta.py")
        write_module(tmp_path, package, "alpha.py")
    return tmp_path


def test_rows_are_sorted_by_file_and_position(tree: Path) -> None:
    rows = read_pydocs(tree)
    assert len(rows) == 2 * FUNCTIONS_PER_FILE * len(PACKAGES)
    files = [row["file"] for row in rows]
    assert files == sorted(files)
    assert [row["text"] for row in rows[:3]] == [
        function("asyncio", "alpha", number).strip() for number in range(3)
    ]


def test_same_tree_gives_same_rows(tree: Path) -> None:
    assert read_pydocs(tree) == read_pydocs(tree)


def test_package_and_file_of_every_row(tree: Path) -> None:
    rows = read_pydocs(tree)
    assert {row["package"] for row in rows} == set(PACKAGES)
    assert Counter(row["file"] for row in rows)["xml/zeta.py"] == FUNCTIONS_PER_FILE
    for row in rows:
        assert set(row) == {"text", "package", "file"}
        assert row["file"].split("/")[0] == row["package"]
        assert row["text"].startswith(f"def {row['package']}_")


def test_skips_tests_and_foreign_packages(tree: Path) -> None:
    expected = read_pydocs(tree)
    write_module(tree, "json", "tests/test_json.py")
    write_module(tree, "email", "test/helper.py")
    write_module(tree, "site-packages/email", "more.py")
    write_module(tree, "encodings", "cp1252.py")
    assert read_pydocs(tree) == expected


@pytest.mark.parametrize(
    "content",
    [b"def broken(:\n    pass\n", b"# coding: no-such-codec\n", b'x = "\xff\xfe"\n', b"x\x00y\n"],
)
def test_file_that_cannot_be_read_is_skipped(tree: Path, content: bytes) -> None:
    expected = read_pydocs(tree)
    (tree / "json" / "broken.py").write_bytes(content)
    assert read_pydocs(tree) == expected


def test_equal_texts_are_kept_once(tree: Path) -> None:
    expected = read_pydocs(tree)
    copied = (tree / "asyncio" / "alpha.py").read_text(encoding="utf-8")
    (tree / "xml" / "copied.py").write_text(copied, encoding="utf-8")
    assert read_pydocs(tree) == expected


def test_too_few_packages_is_an_error(tmp_path: Path) -> None:
    for package in PACKAGES[:3]:
        write_module(tmp_path, package, "module.py", pydocs.MIN_ROWS_PER_PACKAGE)
    write_module(tmp_path, "xml", "module.py", pydocs.MIN_ROWS_PER_PACKAGE - 1)
    with pytest.raises(ValueError, match=r"found 3 usable .*asyncio, email, json"):
        read_pydocs(tmp_path)


def test_empty_tree_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none"):
        read_pydocs(tmp_path)


def test_large_package_is_thinned_evenly(tree: Path) -> None:
    for name in ("beta.py", "gamma.py"):
        write_module(tree, "xml", name, pydocs.MAX_ROWS_PER_PACKAGE)
    rows = [row for row in read_pydocs(tree) if row["package"] == "xml"]
    assert len(rows) == pydocs.MAX_ROWS_PER_PACKAGE
    counts = Counter(row["file"] for row in rows)
    assert set(counts) == {f"xml/{stem}.py" for stem in ("alpha", "beta", "gamma", "zeta")}
    assert abs(counts["xml/beta.py"] - counts["xml/gamma.py"]) <= 1


def test_snippets_are_dedented_functions_and_class_docstrings() -> None:
    source = '''
class Documented(Base):
    """What it is for, at some length, over
    two lines.
    """

    limit = 3

    def method(self, value):
        """Return the value unchanged."""
        def inner():
            return "an inner function that is long enough to count"
        return value


class Undocumented:
    async def coroutine(self, value):
        """A coroutine of a class without docstring."""
        return value


if True:
    def conditional(value):
        """Defined in a branch of the module."""
        return value

def short(): pass
'''
    texts = list(snippets(source))
    assert [text.split("(")[0] for text in texts] == [
        "class Documented",
        "def method",
        "async def coroutine",
        "def conditional",
    ]
    assert texts[0].endswith('"""') and "limit" not in texts[0]
    assert "def inner" in texts[1]
    assert texts[3].split("\n")[1].startswith("    ")


def test_snippets_are_bounded_in_length() -> None:
    long = "def long():\n" + "    value = 1\n" * pydocs.MAX_CHARS
    assert list(snippets(long + "\n\n" + function("json", "kept", 1))) == [
        function("json", "kept", 1).strip()
    ]


def test_invalid_escape_in_a_source_raises_no_warning() -> None:
    source = 'def pattern(value):\n    """A pattern with an odd escape."""\n    return "\\d"\n'
    assert len(list(snippets(source))) == 1


def test_running_python_has_enough() -> None:
    rows = read_pydocs()
    counts = Counter(row["package"] for row in rows)
    assert len(counts) >= pydocs.MIN_PACKAGES
    assert len(rows) >= 1000
    assert min(counts.values()) >= pydocs.MIN_ROWS_PER_PACKAGE
    assert max(counts.values()) <= pydocs.MAX_ROWS_PER_PACKAGE
    assert len({row["text"] for row in rows}) == len(rows)
    root = Path(sysconfig.get_path("stdlib"))
    for row in rows:
        assert pydocs.MIN_CHARS <= len(row["text"]) <= pydocs.MAX_CHARS
        assert "site-packages" not in row["file"]
        assert (root / row["file"]).is_file()
