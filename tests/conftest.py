"""Fixtures of the whole suite. No test needs a network: the hub is off before it is imported."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)  # sums do not depend on how many cores the machine has


def pytest_configure(config: pytest.Config) -> None:
    # The csv reader of `datasets` leaves its file to the garbage collector, which says so.
    leak = r"ignore:unclosed file <_io\.\w+ name='.*\.csv':ResourceWarning"
    config.addinivalue_line("filterwarnings", leak)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and models beside the repository."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.name!r} with real data beside the repository")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that use real data, so that the summary can count them."""
    for item in items:
        if isinstance(item, pytest.Function) and "shared" in item.fixturenames:
            item.user_properties.append(("shared", True))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many tests used ``shared``: a suite that skips them all looks green too."""
    counts = {
        outcome: sum(
            ("shared", True) in report.user_properties
            for report in terminalreporter.stats.get(outcome, [])
            if isinstance(report, pytest.TestReport)  # and not a file that could not be read
        )
        for outcome in ("passed", "failed", "error", "skipped")
    }
    ran = counts["passed"] + counts["failed"]
    others = ", ".join(f"{counts[o]} {o}" for o in ("failed", "error", "skipped") if counts[o])
    terminalreporter.write_line(f"tests on ../shared: {ran} ran{', ' if others else ''}{others}")
