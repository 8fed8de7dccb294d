from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import compare, history
from benchmarks.compare import checkout, verdict
from benchmarks.runner import HERE, Launch, Outcome
from benchmarks.table import Run
from benchmarks.ways import Way
from tests.benchmarks.test_history import WHERE

no_checkout = not (HERE / ".git").exists() or shutil.which("git") is None
in_git = pytest.mark.skipif(no_checkout, reason="this is no git checkout")


def test_the_ratio_is_of_pooled_medians_and_its_spread_of_pairs() -> None:
    found = verdict([[1.0, 1.2, 1.1], [2.0, 2.2, 2.1]], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    assert found.ratio == pytest.approx(1.6)
    assert found.pairs == pytest.approx([1.1, 2.1])
    assert "1.600 (pairs 1.100 to 2.100)" in found.text


@in_git
def test_a_base_is_checked_out_and_removed_again() -> None:
    with checkout("HEAD") as tree:
        assert (tree / "benchmarks" / "one.py").is_file()
    assert not tree.exists()
    listed = subprocess.run(["git", "worktree", "list"], cwd=HERE, capture_output=True, text=True)
    assert str(tree) not in listed.stdout


@in_git
def test_an_unknown_revision_is_named() -> None:
    with pytest.raises(SystemExit, match="--base no-such-revision: .*no-such-revision"):
        compare.main(["--base", "no-such-revision"])


@in_git
@pytest.mark.parametrize(("slowdown", "status"), [(1.09, 0), (1.12, 1), (0.5, 0)])
def test_it_fails_when_slower_than_the_tolerance(
    slowdown: float,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trees: list[Path] = []

    def pretend(way: Way, workload: str, rounds: int, repeat: int, launch: Launch) -> Outcome:
        trees.append(launch.tree)
        seconds = [slowdown if launch.tree == HERE else 1.0] * (rounds - 1)
        ones: Sequence[float] = [1.0] * len(seconds)
        run = Run(workload, way, repeat, seconds, [*ones], [*ones], 5.0, 10**8, True, None, {})
        return Outcome(run, {}, WHERE)

    monkeypatch.setattr(compare, "run_once", pretend)
    monkeypatch.setattr(history, "append", lambda lines: (tmp_path / "h").write_text(lines[0]))
    given = ["--base", "HEAD", "--repeats", "2", "--rounds", "3"]
    assert compare.main([*given, "--record"] if slowdown < 1 else given) == status
    base = next(tree for tree in trees if tree != HERE)
    assert trees == [HERE, base, base, HERE]
    assert f"current / base = {slowdown:.3f}" in capsys.readouterr().out
    assert (tmp_path / "h").exists() == (slowdown < 1)


@in_git
@pytest.mark.slow
def test_this_tree_against_its_own_head(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--base", "HEAD", "--workload", "tiny", "--rounds", "2", "--repeats", "1"]
    assert compare.main([*given, "--tolerance", "100"]) == 0
    assert "cohort on tiny: current / base = " in capsys.readouterr().out
