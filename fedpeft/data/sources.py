"""Sources: a recipe's ``data`` section -> rows with canonical columns.

Whatever the columns were called, afterwards they are ``text``, ``pair``, ``label`` and ``client``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value

from fedpeft.config import Data
from fedpeft.data.read import PYDOCS, read_splits
from fedpeft.errors import FedpeftError, suggest
from fedpeft.streams import numpy_stream

_TEXT = ("string", "large_string")
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_KEYS = (*_TEXT, *_INTEGERS, "bool", "null")
_CANONICAL = {
    "text": Value("string"),
    "pair": Value("string"),
    "label": Value("int64"),
    "client": Value("string"),
}


@dataclass(frozen=True)
class Rows:
    """The rows of a source, nothing dropped but what ``data.limit`` leaves out.

    train: columns ``text`` (string, may be blank), ``pair`` (string, if ``data.pair``), ``label``
    (int64 class numbers; always for classification, for causal language modelling where the source
    has the column, for partitions by label) and ``client`` (string, if the source has one).
    test: the source's own test split with ``text``, ``pair`` and, for classification, ``label``.
    labels: the class names by class number, sorted, those that occur in the training split.
    """

    train: Dataset
    test: Dataset | None
    labels: tuple[str, ...]


def load_rows(data: Data, seed: int) -> Rows:
    """Reads ``data.source`` and gives its columns their canonical names.

    Raises FedpeftError for a source, split or column that does not exist, a column of the wrong
    type, a row without label or client, a label in the test split that training never sees.
    """
    _check(data)
    if data.source == PYDOCS:
        label = "package" if data.label == Data.label else data.label
        data = replace(data, label=label, client=data.client or "file")
    train, test = read_splits(data)
    here = f"the training split of {data.source!r}"
    columns = _texts(train, data, here)
    labels: tuple[str, ...] = ()
    if data.task == "classification":
        values = _keys(train, data.label, "data.label", here)
        classes = _classes(train, data, values)
        labels = tuple(map(str, classes))
        columns["label"] = _numbers(values, classes)
    elif data.label in train.column_names or data.label != Data.label:
        _require(train, data.label, "data.label", here)
        groups = [str(value) for value in train[data.label][:]]
        labels = tuple(sorted(set(groups)))
        columns["label"] = _numbers(groups, labels)
    if data.client is not None:
        columns["client"] = [str(v) for v in _keys(train, data.client, "data.client", here)]
    rows = _canonical(columns)
    if 0 < data.limit < len(rows):
        chosen = numpy_stream(seed, "limit").choice(len(rows), data.limit, replace=False)
        rows = rows.select(np.sort(chosen))
    return Rows(rows, None if test is None else _test(test, data, labels), labels)


def _check(data: Data) -> None:
    """Refuses settings that no source can meet."""
    if not 0 <= data.holdout < 1:
        raise FedpeftError(
            f"data.holdout={data.holdout} must be a share of a client's examples: at least 0, "
            "less than 1, such as 0.2."
        )
    if data.max_length < 2:
        raise FedpeftError(
            f"data.max_length={data.max_length} must be at least 2 tokens; 64 to 512 is common."
        )
    if data.limit < 0:
        raise FedpeftError(f"data.limit={data.limit} must be a number of rows, or 0 for all.")
    if data.task == "causal_lm" and data.pair is not None:
        raise FedpeftError(
            f"data.pair={data.pair!r}: text pairs are for classification. For data.task=causal_lm "
            "put both parts into one text column."
        )


def _require(split: Dataset, column: str, argument: str, where: str) -> None:
    if column not in split.column_names:
        raise FedpeftError(
            f"{argument}={column!r}: {where} has no such column. "
            f"{suggest(column, split.column_names)} Name an existing column with {argument}."
        )


def _texts(split: Dataset, data: Data, where: str) -> dict[str, Sequence[Any]]:
    """The text columns, None read as blank."""
    if not len(split):
        raise FedpeftError(f"data.source={data.source!r}: {where} has no rows. Give one that does.")
    columns: dict[str, Sequence[Any]] = {}
    for name, column in (("text", data.text), ("pair", data.pair)):
        if column is None:
            continue
        _require(split, column, f"data.{name}", where)
        feature = split.features[column]
        if not (isinstance(feature, Value) and feature.dtype in (*_TEXT, "null")):
            raise FedpeftError(
                f"data.{name}={column!r}: the column must hold text, in {where} it holds "
                f"{_kind(feature)}. Name another column (there are: "
                f"{', '.join(split.column_names)})."
            )
        columns[name] = [text or "" for text in split[column][:]]
    return columns


def _keys(split: Dataset, column: str, argument: str, where: str) -> list[str | int]:
    """A column of labels or client names: strings or integers, none missing."""
    _require(split, column, argument, where)
    feature = split.features[column]
    values: list[Any] = split[column][:]
    if isinstance(feature, ClassLabel):
        values = [None if v is None or v < 0 else feature.names[v] for v in values]
    elif not (isinstance(feature, Value) and feature.dtype in _KEYS):
        raise FedpeftError(
            f"{argument}={column!r}: the column must hold strings or integers in every row, in "
            f"{where} it holds {_kind(feature)}. Convert it, or name another column (there are: "
            f"{', '.join(split.column_names)})."
        )
    missing = [i for i, value in enumerate(values) if value is None or value == ""]
    if missing:
        raise FedpeftError(
            f"{argument}={column!r}: {len(missing)} of {len(values)} rows of {where} have no value "
            f"there, the first is row {missing[0]}. Fill them in, remove those rows, or name "
            "another column or split."
        )
    return values


def _kind(feature: object) -> str:
    return str(feature.dtype) if isinstance(feature, Value) else type(feature).__name__


def _classes(train: Dataset, data: Data, values: Sequence[str | int]) -> Sequence[str | int]:
    """The classes that occur in training, sorted; a ClassLabel column keeps its own order."""
    feature, seen = train.features[data.label], set(values)
    declared = isinstance(feature, ClassLabel)
    classes = [n for n in feature.names if n in seen] if declared else sorted(seen)
    if len(classes) < 2:
        raise FedpeftError(
            f"data.label={data.label!r}: every row of the training split has the label "
            f"{classes[0]!r}, classification needs at least two. Name another column, or set "
            "data.task=causal_lm."
        )
    return classes


def _numbers(values: Sequence[str | int], classes: Sequence[str | int]) -> list[int]:
    number = {value: i for i, value in enumerate(classes)}
    return [number[value] for value in values]


def _test(test: Dataset, data: Data, labels: tuple[str, ...]) -> Dataset:
    """The source's own test split; its labels are those of the training split."""
    where = f"the test split {data.test!r} of {data.source!r}"
    columns = _texts(test, data, where)
    if data.task == "classification":
        values = [str(v) for v in _keys(test, data.label, "data.label", where)]
        unseen = sorted(set(values) - set(labels))
        if unseen:
            raise FedpeftError(
                f"data.label={data.label!r}: {where} has the label {unseen[0]!r}, which the "
                f"training split {data.train!r} never shows ({len(unseen)} such labels: "
                f"{', '.join(unseen[:5])}). Remove {sum(v in unseen for v in values)} rows from "
                "the test split, or add training rows with these labels."
            )
        columns["label"] = _numbers(values, labels)
    return _canonical(columns)


def _canonical(columns: dict[str, Sequence[Any]]) -> Dataset:
    features = Features({name: _CANONICAL[name] for name in columns})
    return Dataset.from_dict(columns, features=features)
