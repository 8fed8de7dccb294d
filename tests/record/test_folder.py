"""The run folder: made, found again, and never made over the user's own files."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from fedpeft.errors import FedpeftError
from fedpeft.record import RunFolder


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def used(path: Path) -> RunFolder:
    """A run folder with something of everything in it."""
    folder = RunFolder.create(path)
    folder.describe("name: first\n", "f1")
    folder.metrics.append("note", 1, {"text": "x"})
    (folder.checkpoints / "round-000001").mkdir(parents=True)
    folder.adapter.mkdir()
    return folder


def test_a_new_folder_is_made_with_its_parents_and_found_again(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs" / "a")
    folder.describe("name: ä\n", "f1")
    assert listing(folder.path) == [
        "begun.yaml",
        "data.json",
        "environment.json",
        "recipe.yaml",
        "run.json",
    ]
    again = RunFolder.open(tmp_path / "runs" / "a")
    assert again == folder
    assert again.recipe() == "name: ä\n"
    assert "torch" in json.loads((folder.path / "environment.json").read_text())["packages"]


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    RunFolder.check(tmp_path)
    assert RunFolder.open(RunFolder.create(tmp_path).path).path == tmp_path


def test_a_folder_with_a_run_is_kept_and_the_ways_out_are_named(tmp_path: Path) -> None:
    path = used(tmp_path / "run").path
    before = listing(path)
    for attempt in (RunFolder.check, RunFolder.create):
        with pytest.raises(FedpeftError) as caught:
            attempt(path)
        for way in ("another output.folder", "output.overwrite=true", f"fedpeft resume {path}"):
            assert way in str(caught.value)
    assert listing(path) == before


def test_overwrite_empties_a_run_folder(tmp_path: Path) -> None:
    path = used(tmp_path / "run").path
    RunFolder.check(path, overwrite=True)
    assert "checkpoints" in listing(path)
    RunFolder.create(path, overwrite=True)
    assert listing(path) == ["run.json"]


MARKS = {
    "no mark": None,
    "another program's": '{"kind": "other", "schema": 1}',
    "no schema": '{"kind": "fedpeft run"}',
    "no object": "[]",
    "no JSON": "run",
}


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_folder_is_never_touched(
    tmp_path: Path, mark: str, overwrite: bool
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    text = MARKS[mark]
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    before = listing(tmp_path)
    for attempt in (RunFolder.check, RunFolder.create):
        with pytest.raises(FedpeftError, match=r"is not a run folder.*another output\.folder"):
            attempt(tmp_path, overwrite)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    path = tmp_path / "run"
    path.write_text("mine")
    with pytest.raises(FedpeftError, match=r"run is a file\. Choose another output\.folder"):
        RunFolder.create(path, overwrite)
    assert path.read_text() == "mine"


def test_overwrite_does_not_follow_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    path = used(tmp_path / "run").path
    (path / "link").symlink_to(outside)
    RunFolder.create(path, overwrite=True)
    assert listing(path) == ["run.json"]
    assert (outside / "mine.txt").read_text() == "mine"


def test_a_deletion_that_breaks_off_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = used(tmp_path / "run").path

    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", denied)
    with pytest.raises(FedpeftError, match="Permission denied"):
        RunFolder.create(path, overwrite=True)
    assert "run.json" in listing(path)
    monkeypatch.undo()
    assert listing(RunFolder.create(path, overwrite=True).path) == ["run.json"]


def test_open_refuses_what_is_no_run_folder(tmp_path: Path) -> None:
    used(tmp_path / "first")
    with pytest.raises(FedpeftError, match=r"frist is not a folder\. Did you mean 'first'\?"):
        RunFolder.open(tmp_path / "frist")
    with pytest.raises(FedpeftError, match=r"is not a run folder: it has no run\.json"):
        RunFolder.open(tmp_path)
    with pytest.raises(FedpeftError, match="is not a folder, and there is no run beside it"):
        RunFolder.open(tmp_path / "none" / "none")
    (tmp_path / "first" / "run.json").write_text('{"kind": "fedpeft run", "schema": 2}')
    with pytest.raises(FedpeftError, match="of schema 2, this fedpeft reads schema 1"):
        RunFolder.open(tmp_path / "first")


def test_a_run_that_stopped_before_its_first_round_says_so(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    for attempt in (folder.recipe, lambda: folder.check_data("f1")):
        with pytest.raises(FedpeftError, match=r"stopped before its first round.*overwrite=true"):
            attempt()


def test_a_resume_on_other_data_is_refused(tmp_path: Path) -> None:
    folder = used(tmp_path / "run")
    folder.check_data("f1")
    with pytest.raises(FedpeftError, match=r"fingerprint f2, was f1.*Restore them, or start a new"):
        folder.check_data("f2")


def test_a_full_disk_leaves_the_recorded_files_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = used(tmp_path / "run")
    before = listing(folder.path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FedpeftError, match=r"recipe\.yaml: the disk is full.*unchanged"):
        folder.describe("name: second\n", "f2")
    assert listing(folder.path) == before
    assert folder.recipe() == "name: first\n"


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FedpeftError, match=r"cannot write .*file.run: .*another output\.folder"):
        RunFolder.create(tmp_path / "file" / "run")
