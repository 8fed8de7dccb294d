"""Tests of canonical rows: columns, labels, clients, limit, and columns that are not as said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedpeft.config import Data
from fedpeft.data.sources import load_rows

Write = Callable[..., str]

ROWS = [
    {"q": "w1", "a": "w2", "topic": "sports", "who": 7},
    {"q": "w3", "a": None, "topic": "arts", "who": 12},
    {"q": None, "a": "w4", "topic": "sports", "who": 7},
]


def split(write: Write, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> str:
    write("d/test.jsonl", test)
    return str(Path(write("d/train.jsonl", train)).parent)


def labelled(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"w{i}", "label": label} for i, label in enumerate(labels)]


def test_columns_get_canonical_names(write: Write) -> None:
    data = Data(source=write("x.jsonl", ROWS), text="q", pair="a", label="topic", client="who")
    rows = load_rows(data, 0)
    assert rows.train[:] == {
        "text": ["w1", "w3", ""],
        "pair": ["w2", "", "w4"],
        "label": [1, 0, 1],
        "client": ["7", "12", "7"],
    }
    assert rows.labels == ("arts", "sports")
    assert rows.test is None


def test_pydocs_needs_no_column_names(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [{"text": "a", "package": p, "file": f"{p}/{p}.py"} for p in ("y", "x")]
    monkeypatch.setattr("fedpeft.data.read.read_pydocs", lambda: made)
    expected = {"text": ["a", "a"], "label": [1, 0], "client": ["y/y.py", "x/x.py"]}
    assert load_rows(Data(), 0).train[:] == expected
    assert load_rows(Data(label="package", client="file"), 0).train[:] == expected
    assert load_rows(Data(client="package"), 0).train["client"][:] == ["y", "x"]
    assert load_rows(Data(task="causal_lm"), 0).train[:] == expected


def test_integer_labels_sort_as_numbers(write: Write) -> None:
    rows = load_rows(Data(source=write("x.csv", labelled(10, 9, 100))), 0)
    assert rows.labels == ("9", "10", "100")
    assert rows.train["label"][:] == [1, 0, 2]


def test_class_label_columns_keep_their_names_and_order(tmp_path: Path) -> None:
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["world", "none", "arts"])}
    )
    made = Dataset.from_dict({"text": ["w1", "w2"], "label": [2, 0]}, features=features)
    made.save_to_disk(tmp_path / "saved")
    rows = load_rows(Data(source=str(tmp_path / "saved")), 0)
    assert rows.labels == ("world", "arts")
    assert rows.train["label"][:] == [1, 0]


def test_test_labels_are_numbered_as_in_training(write: Write) -> None:
    source = split(write, labelled("c", "a", "b"), labelled("b", "c"))
    rows = load_rows(Data(source=source, test="test"), 0)
    assert rows.test is not None
    assert rows.test[:] == {"text": ["w0", "w1"], "label": [1, 2]}


def test_causal_lm_needs_no_label(write: Write) -> None:
    source = split(write, [{"text": "w1"}], [{"text": "w2"}])
    rows = load_rows(Data(source=source, test="test", task="causal_lm"), 0)
    assert rows.train.column_names == ["text"]
    assert rows.labels == ()
    with_label = load_rows(
        Data(source=write("x.jsonl", labelled("b", None, "a")), task="causal_lm"), 0
    )
    assert with_label.train["label"][:] == [2, 0, 1]


def test_limit_draws_by_the_seed_and_keeps_every_class(write: Write) -> None:
    source = write("x.jsonl", labelled(*range(40)))
    drawn = [load_rows(Data(source=source, limit=5), seed) for seed in (0, 0, 1)]
    texts = [rows.train["text"][:] for rows in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 5
    assert len(drawn[0].labels) == 40
    for text, label in zip(texts[0], drawn[0].train["label"][:], strict=True):
        assert text == f"w{label}"
    assert len(load_rows(Data(source=source, limit=100), 0).train) == 40


def test_missing_columns_name_the_near_one(write: Write, refuses: Any) -> None:
    source = write("x.jsonl", [{"txt": "w1", "speakers": "x", "topics": "a"}])
    with refuses("data.text='text'", "Did you mean 'txt'?", "speakers, topics, txt", "data.text"):
        load_rows(Data(source=source), 0)
    with refuses("data.label='topic'", "Did you mean 'topics'?"):
        load_rows(Data(source=source, text="txt", label="topic"), 0)
    with refuses("data.label='topic'", "Did you mean 'topics'?"):
        load_rows(Data(source=source, text="txt", label="topic", task="causal_lm"), 0)
    with refuses("data.client='speaker'", "Did you mean 'speakers'?"):
        load_rows(Data(source=source, text="txt", task="causal_lm", client="speaker"), 0)
    with refuses("data.pair='other'", "no such column"):
        load_rows(Data(source=source, text="txt", label="topics", pair="other"), 0)


def test_missing_column_of_the_test_split_says_which_split(write: Write, refuses: Any) -> None:
    source = split(write, labelled("a", "b"), [{"text": "w1", "klass": "a"}])
    with refuses("data.label='label'", "the test split 'test'", "klass"):
        load_rows(Data(source=source, test="test"), 0)


def test_label_unseen_in_training(write: Write, refuses: Any) -> None:
    source = split(write, labelled("a", "b"), labelled("a", "zebra", "zebra", "yak"))
    parts = ["'yak'", "2 such labels: yak, zebra", "data.label='label'", "Remove 3 rows"]
    with refuses(*parts, "training split 'train'", "test split 'test'"):
        load_rows(Data(source=source, test="test"), 0)


def test_columns_of_the_wrong_type(write: Write, refuses: Any) -> None:
    rows = [{"text": 1.5, "label": 0.5, "who": ["x"]}, {"text": 2.5, "label": 1.5, "who": ["y"]}]
    source = write("x.jsonl", rows)
    with refuses("data.text='text'", "must hold text", "float64", "text, label, who"):
        load_rows(Data(source=source), 0)
    source = write("y.jsonl", [{**row, "text": "w1"} for row in rows])
    with refuses("data.label='label'", "strings or integers", "float64"):
        load_rows(Data(source=source), 0)
    with refuses("data.client='who'", "strings or integers", "List"):
        load_rows(Data(source=source, task="causal_lm", client="who"), 0)


def test_mixed_labels_are_refused(write: Write, refuses: Any) -> None:
    with refuses("data.label='label'", "strings or integers in every row"):
        load_rows(Data(source=write("x.jsonl", labelled(1, "a"))), 0)


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv"])
def test_rows_without_label_or_client(write: Write, refuses: Any, name: str) -> None:
    rows = [{"text": f"w{i}", "label": v, "who": v} for i, v in enumerate(["a", "b", None, ""])]
    source = write(name, rows)
    with refuses("data.label='label'", "2 of 4 rows", "the first is row 2", "remove those rows"):
        load_rows(Data(source=source), 0)
    with refuses("data.client='who'", "2 of 4 rows", "the first is row 2"):
        load_rows(Data(source=source, client="who", task="causal_lm"), 0)


def test_unlabelled_test_splits_of_the_hub(tmp_path: Path, refuses: Any) -> None:
    from datasets import DatasetDict

    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    made = {
        name: Dataset.from_dict({"text": ["w1", "w2"], "label": labels}, features=features)
        for name, labels in (("train", [0, 1]), ("test", [-1, -1]))
    }
    DatasetDict(made).save_to_disk(tmp_path / "saved")
    with refuses("data.label='label'", "2 of 2 rows of the test split 'test'", "or split"):
        load_rows(Data(source=str(tmp_path / "saved"), test="test"), 0)


def test_one_class_is_not_enough(write: Write, refuses: Any) -> None:
    with refuses("data.label='label'", "'a'", "at least two", "data.task=causal_lm"):
        load_rows(Data(source=write("x.jsonl", labelled("a", "a"))), 0)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (Data(holdout=1.0), ["data.holdout=1.0", "less than 1"]),
        (Data(holdout=-0.1), ["data.holdout=-0.1", "at least 0"]),
        (Data(holdout=float("nan")), ["data.holdout=nan"]),
        (Data(max_length=1), ["data.max_length=1", "at least 2"]),
        (Data(limit=-1), ["data.limit=-1", "0 for all"]),
        (Data(task="causal_lm", pair="a"), ["data.pair='a'", "one text column"]),
    ],
)
def test_settings_out_of_range(refuses: Any, data: Data, parts: list[str]) -> None:
    with refuses(*parts):
        load_rows(data, 0)
