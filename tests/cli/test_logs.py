from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator

import pytest
from rich.console import Console

from fedpeft.cli import logs

LIBRARY, OWN = "some_library.part", "fedpeft.cohort.choose"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in logs._QUIET:
        monkeypatch.delenv(name, raising=False)
    yield
    assert not logs._QUIET.keys() & os.environ.keys() - {"TRANSFORMERS_VERBOSITY"}


def said(quiet: bool = False, verbose: bool = False) -> list[str]:
    out = io.StringIO()
    with logs.shown(Console(file=out, width=40), quiet, verbose):
        for name in (LIBRARY, OWN):
            for level in (logging.INFO, logging.WARNING, logging.ERROR):
                logging.getLogger(name).log(level, logging.getLevelName(level))
        try:
            raise ValueError("of one client")
        except ValueError:
            logging.getLogger(OWN).warning("client failed", exc_info=True)
        with warnings.catch_warnings(action="always"):
            warnings.warn("an old name", FutureWarning, stacklevel=1)
    return out.getvalue().splitlines()


def test_by_default_warnings_of_fedpeft_and_errors_of_others() -> None:
    assert said() == [f"{LIBRARY}: ERROR", f"{OWN}: WARNING", f"{OWN}: ERROR"]


def test_quiet_leaves_errors() -> None:
    assert said(quiet=True) == [f"{LIBRARY}: ERROR", f"{OWN}: ERROR"]


def test_verbose_shows_the_log_of_fedpeft_and_warnings_of_others() -> None:
    lines = said(verbose=True)
    assert lines[:5] == [
        f"{LIBRARY}: WARNING",
        f"{LIBRARY}: ERROR",
        f"{OWN}: INFO",
        f"{OWN}: WARNING",
        f"{OWN}: ERROR",
    ]
    assert "ValueError: of one client" in lines
    assert any("FutureWarning: an old name" in line for line in lines)


@pytest.mark.parametrize("verbose", [False, True])
def test_libraries_are_told_to_show_no_progress(verbose: bool) -> None:
    with logs.shown(Console(file=io.StringIO()), verbose=verbose):
        assert os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"


def test_what_the_user_has_set_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    with logs.shown(Console(file=io.StringIO())):
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"


def test_levels_and_handlers_are_as_before() -> None:
    root, own = logging.getLogger(), logging.getLogger("fedpeft")
    before = (root.level, own.level, list(root.handlers), warnings.showwarning)
    said(verbose=True)
    assert (root.level, own.level, list(root.handlers), warnings.showwarning) == before
