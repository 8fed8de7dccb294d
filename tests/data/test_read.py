"""Tests of reading raw splits: every kind of source, and every way a source can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedpeft.config import Data
from fedpeft.data.read import read_splits

ROWS: list[dict[str, Any]] = [
    {"text": "one two", "label": "a"},
    {"text": 'three, "four"\nfive', "label": "b"},
]


@pytest.fixture(autouse=True)
def quick_saving() -> None:
    datasets.disable_progress_bars()


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.json", "x.parquet"])
def test_every_file_format_gives_the_same_rows(write: Callable[..., str], name: str) -> None:
    train, test = read_splits(Data(source=write(name, ROWS)))
    assert train[:] == {"text": [r["text"] for r in ROWS], "label": ["a", "b"]}
    assert test is None


@pytest.mark.parametrize("train", ["train", "train.jsonl"])
def test_folder_files_are_named_with_or_without_suffix(
    write: Callable[..., str], train: str
) -> None:
    folder = Path(write("d/train.jsonl", ROWS)).parent
    write("d/test.csv", ROWS[:1])
    write("d/labels.json", [{"x": 1}])
    read = read_splits(Data(source=str(folder), train=train, test="test"))
    assert [len(split) for split in read if split is not None] == [2, 1]
    assert read_splits(Data(source=str(folder), train=train))[1] is None


def test_a_lone_file_may_have_a_test_file_beside_it(write: Callable[..., str]) -> None:
    write("held.jsonl", ROWS[:1])
    train, test = read_splits(Data(source=write("mine.csv", ROWS), test="held"))
    assert test is not None
    assert (len(train), len(test)) == (2, 1)


def test_csv_text_and_clients_stay_text(write: Callable[..., str]) -> None:
    source = write("x.csv", [{"text": "NA", "who": "007", "label": 3}, {"text": "12", "who": "NA"}])
    train, _ = read_splits(Data(source=source, client="who"))
    assert train["text"][:] == ["NA", "12"]
    assert train["who"][:] == ["007", "NA"]


def test_data_set_folders(tmp_path: Path) -> None:
    made = datasets.Dataset.from_list(ROWS)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    made.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "dev": made.select([0])}).save_to_disk(tmp_path / "two")
    assert len(read_splits(Data(source=str(tmp_path / "hub")))[0]) == 2
    assert len(read_splits(Data(source=str(tmp_path / "one")))[0]) == 2
    _, test = read_splits(Data(source=str(tmp_path / "two"), test="dev"))
    assert test is not None
    assert test["text"][:] == ["one two"]


def test_progress_bars_are_left_as_they_were(write: Callable[..., str]) -> None:
    datasets.enable_progress_bars()
    read_splits(Data(source=write("x.csv", ROWS)))
    assert not datasets.are_progress_bars_disabled()


def test_pydocs_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"text": "def f(): ...", "package": "p", "file": "p/f.py"}
    monkeypatch.setattr("fedpeft.data.read.read_pydocs", lambda: [row])
    train, test = read_splits(Data())
    assert train[:] == {key: [value] for key, value in row.items()}
    assert test is None


def test_pydocs_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, refuses: Any) -> None:
    def fail() -> None:
        raise ValueError("found 0 usable packages")

    monkeypatch.setattr("fedpeft.data.read.read_pydocs", fail)
    with refuses("data.source=pydocs", "found 0 usable packages"):
        read_splits(Data())


@pytest.mark.parametrize("split", ["train", "test"])
def test_pydocs_has_one_split(refuses: Any, split: str) -> None:
    data = Data(**{split: "validation"})
    with refuses(f"data.{split}='validation'", "pydocs", f"Leave data.{split} out"):
        read_splits(data)


def test_unknown_file_of_a_folder_names_the_near_one(
    write: Callable[..., str], refuses: Any
) -> None:
    folder = str(Path(write("d/train.jsonl", ROWS)).parent)
    with refuses("data.train='trian'", "Did you mean 'train'?", folder):
        read_splits(Data(source=folder, train="trian"))
    with refuses("data.train='train.json'", "Did you mean 'train.jsonl'?"):
        read_splits(Data(source=folder, train="train.json"))
    with refuses("data.test='test'", "Known: train."):
        read_splits(Data(source=folder, test="test"))


def test_ambiguous_file_of_a_folder(write: Callable[..., str], refuses: Any) -> None:
    write("d/train.csv", ROWS)
    folder = str(Path(write("d/train.jsonl", ROWS)).parent)
    with refuses("data.train='train'", "ambiguous", "train.csv, train.jsonl", "with its suffix"):
        read_splits(Data(source=folder))


def test_missing_path_names_the_near_one(write: Callable[..., str], refuses: Any) -> None:
    source = write("reviews.jsonl", ROWS)
    with refuses("reviws.jsonl", "no such file or folder", "Did you mean 'reviews.jsonl'?"):
        read_splits(Data(source=source.replace("reviews", "reviws")))
    with refuses("/nowhere/at/all", "no such file or folder", "no folder '/nowhere/at'"):
        read_splits(Data(source="/nowhere/at/all"))


def test_unknown_suffix(tmp_path: Path, refuses: Any) -> None:
    (tmp_path / "x.xlsx").write_text("?")
    with refuses("x.xlsx", "'.xlsx' is not one of .csv, .json, .jsonl, .parquet", "Convert"):
        read_splits(Data(source=str(tmp_path / "x.xlsx")))


def test_train_means_nothing_for_a_lone_file(write: Callable[..., str], refuses: Any) -> None:
    source = write("x.csv", ROWS)
    assert len(read_splits(Data(source=source, train="x"))[0]) == 2
    with refuses("data.train='dev'", "is one file", "Leave data.train out"):
        read_splits(Data(source=source, train="dev"))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jsonl", "", "StopIteration"),
        ("empty.csv", "", "No columns to parse"),
        ("header.csv", "text,label\n", "no data"),
        ("cut.jsonl", '{"text": "a"\n{"te', "JSON parse error"),
        ("not.parquet", "xx", "Parquet file size is 2 bytes"),
    ],
)
def test_unreadable_files(
    tmp_path: Path, refuses: Any, name: str, content: str, reason: str
) -> None:
    (tmp_path / name).write_text(content)
    with refuses("data.source", name, reason, "at least one row"):
        read_splits(Data(source=str(tmp_path / name)))


def test_unknown_split_of_a_data_set_folder(tmp_path: Path, refuses: Any) -> None:
    made = datasets.Dataset.from_list(ROWS)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    made.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "saved")
    with refuses("data.test='dev'", "Unknown split", "['train']", "names a split"):
        read_splits(Data(source=str(tmp_path / "hub"), test="dev"))
    with refuses("data.train='trian'", "no such split", "Did you mean 'train'?"):
        read_splits(Data(source=str(tmp_path / "saved"), train="trian"))


def test_code_of_a_data_set_is_never_run(tmp_path: Path, refuses: Any) -> None:
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with refuses("scripted", "without code of its own"):
        read_splits(Data(source=str(folder)))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("source", ["pydoc", "someone/something"])
def test_hub_without_a_network_says_what_was_tried(refuses: Any, source: str) -> None:
    parts = [f"data.source={source!r}", "Tried:", "Hugging Face hub", "Without a network"]
    with refuses(*parts, *(["Did you mean 'pydocs'?"] if source == "pydoc" else [])):
        read_splits(Data(source=source))
    with refuses("data.subset='en'"):
        read_splits(Data(source=source, subset="en"))
