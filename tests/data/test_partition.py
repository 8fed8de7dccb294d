"""Tests of the division among clients: coverage, names, determinism, impossible requests."""

from __future__ import annotations

import ast
import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from datasets import Dataset
from flwr_datasets.partitioner import IidPartitioner, NaturalIdPartitioner, Partitioner

import fedpeft.data
from fedpeft.config import Partition
from fedpeft.data.partition import _by_label, divide
from fedpeft.streams import derive, numpy_stream

LABELS = 6


def rows_of(n: int, clients: Sequence[str] | None = None) -> Dataset:
    """Rows sorted by label, as data sets often are."""
    columns: dict[str, list[Any]] = {
        "text": ["w"] * n,
        "label": [i * LABELS // n for i in range(n)],
    }
    return Dataset.from_dict(columns | ({"client": list(clients)} if clients else {}))


def ones(rows: Dataset) -> np.ndarray:
    return np.ones(len(rows), np.int64)


KINDS = [
    Partition(kind="iid", clients=7),
    Partition(kind="dirichlet", clients=7, alpha=0.5),
    Partition(kind="shard", clients=7, shards=3),
    Partition(kind="pathological", clients=7, classes=2),
    Partition(kind="pathological", clients=5, classes=3),
    Partition(kind="natural", clients=0),
]


@pytest.mark.parametrize("partition", KINDS, ids=lambda p: f"{p.kind}-{p.clients}")
@pytest.mark.parametrize("seed", [0, 1])
def test_every_usable_row_goes_to_exactly_one_client(partition: Partition, seed: int) -> None:
    rows = rows_of(203, clients=[f"c{i % 9}" for i in range(203)])
    sizes = ones(rows)
    sizes[[0, 50, 202]] = 0
    divided = divide(rows, partition, sizes, seed)
    assert len(divided) == (partition.clients or 9)
    everything = np.concatenate([part for _, part in divided])
    assert sorted(everything) == list(np.flatnonzero(sizes))
    assert [name for name, _ in divided] == sorted({name for name, _ in divided})
    for _, part in divided:
        assert part.dtype == np.int64
        assert list(part) == sorted(part)


@pytest.mark.parametrize("partition", KINDS, ids=lambda p: f"{p.kind}-{p.clients}")
def test_the_clients_are_those_of_flwr_datasets(partition: Partition) -> None:
    """``load_partition`` is what the partitioners promise; it takes a millisecond a client."""
    rows = rows_of(203, clients=[f"c{i % 9}" for i in range(203)])
    found = divide(rows, partition, ones(rows), 4)
    shuffled = numpy_stream(4, "partition", "order").permutation(203)
    partitioner: Partitioner
    if partition.kind == "natural":
        shuffled, keys = np.arange(203), np.arange(203) % 9
        partitioner = NaturalIdPartitioner("key")
    else:
        keys = np.array(rows["label"][:])[shuffled]
        seed = derive(4, "partition", partition.kind)
        iid = partition.kind == "iid"
        partitioner = IidPartitioner(7) if iid else _by_label(partition, keys, seed)
    partitioner.dataset = Dataset.from_dict({"row": shuffled, "key": keys})
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # pyarrow's deprecations, and a bar
        parts = [partitioner.load_partition(i)["row"][:] for i in range(len(found))]
    assert [part.tolist() for _, part in found] == [sorted(part) for part in parts]


@pytest.mark.parametrize("partition", KINDS[:-1], ids=lambda p: f"{p.kind}-{p.clients}")
def test_the_seed_decides(partition: Partition) -> None:
    rows = rows_of(203)
    first, again, other = (divide(rows, partition, ones(rows), seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a[1], b[1]) for a, b in zip(first, other, strict=True))


def test_iid_mixes_rows_that_come_sorted_by_label() -> None:
    rows = rows_of(600)
    for _, part in divide(rows, Partition(kind="iid", clients=4), ones(rows), 0):
        assert len(part) == 150
        share = np.bincount(np.array(rows["label"][:])[part], minlength=LABELS) / len(part)
        assert share.min() > 0.08  # expected 1/6


def test_dirichlet_alpha_sets_the_skew() -> None:
    rows = rows_of(1200)
    labels = np.array(rows["label"][:])

    def largest_share(alpha: float) -> float:
        partition = Partition(kind="dirichlet", clients=6, alpha=alpha, min_examples=1)
        parts = [part for _, part in divide(rows, partition, ones(rows), 0)]
        return float(np.mean([np.bincount(labels[p]).max() / len(p) for p in parts]))

    assert largest_share(100.0) < 0.3 < 0.5 < largest_share(0.1)


def test_dirichlet_shares_are_drawn_by_the_seed() -> None:
    rows = rows_of(600)
    partition = Partition(kind="dirichlet", clients=5, min_examples=1)
    sizes = [[len(part) for _, part in divide(rows, partition, ones(rows), s)] for s in (0, 1)]
    assert sizes[0] != sizes[1]


def test_dirichlet_keeps_the_minimum() -> None:
    rows = rows_of(600)
    partition = Partition(kind="dirichlet", clients=8, alpha=0.5, min_examples=30)
    assert min(len(part) for _, part in divide(rows, partition, ones(rows), 3)) >= 30


@pytest.mark.parametrize(("clients", "classes"), [(9, 2), (4, 3)])
def test_pathological_clients_have_so_many_labels(clients: int, classes: int) -> None:
    rows = rows_of(300)
    labels = np.array(rows["label"][:])
    partition = Partition(kind="pathological", clients=clients, classes=classes)
    for _, part in divide(rows, partition, ones(rows), 0):
        assert len(set(labels[part])) == classes


def test_shard_clients_have_few_labels_and_equal_sizes() -> None:
    rows = rows_of(600)
    labels = np.array(rows["label"][:])
    for _, part in divide(rows, Partition(kind="shard", clients=30, shards=2), ones(rows), 0):
        assert len(part) == 20
        assert len(set(labels[part])) <= 2


def test_names_are_padded_to_sort_by_number() -> None:
    rows = rows_of(2200)
    few = divide(rows, Partition(kind="iid", clients=2), ones(rows), 0)
    assert [name for name, _ in few] == ["client-000", "client-001"]
    many = divide(rows, Partition(kind="iid", clients=1001), ones(rows), 0)
    assert (many[0][0], many[-1][0]) == ("client-0000", "client-1000")


def test_natural_clients_are_called_as_in_the_data() -> None:
    names = ["b/../x", "a\n", "ä", "b/../x", "a\n", "ä"]
    divided = divide(rows_of(6, names), Partition(kind="natural", clients=0), np.ones(6, int), 0)
    assert [(name, list(part)) for name, part in divided] == [
        ("a\n", [1, 4]),
        ("b/../x", [0, 3]),
        ("ä", [2, 5]),
    ]


def test_natural_keeps_the_clients_with_most_examples() -> None:
    names = ["few", "few", "few", "many", "some", "none"]
    sizes = np.array([1, 1, 1, 9, 4, 0])
    divided = divide(rows_of(6, names), Partition(kind="natural", clients=2), sizes, 0)
    assert [(name, list(part)) for name, part in divided] == [("many", [3]), ("some", [4])]


def test_empty_natural_client_is_named(refuses: Any) -> None:
    rows = rows_of(4, ["ann", "bob", "ann", "ann"])
    with refuses("client 'bob' is empty", "no", "partition.clients=N"):
        divide(rows, Partition(kind="natural", clients=0), np.array([1, 0, 1, 1]), 0)


def test_client_with_too_few_examples_is_named(refuses: Any) -> None:
    rows = rows_of(6, ["ann", "bob", "ann", "ann", "cy", "bob"])
    parts = ["client 'cy' has 1 examples", "partition.min_examples=3", "2 of 3 clients"]
    with refuses(*parts, "Lower partition.min_examples"):
        divide(rows, Partition(kind="natural", clients=0, min_examples=3), ones(rows), 0)
    with refuses("client-000", "has 2 examples", "partition.min_examples=3"):
        divide(rows_of(6), Partition(kind="iid", clients=3, min_examples=3), np.ones(6, int), 0)


def test_natural_needs_a_client_column(refuses: Any) -> None:
    with refuses("partition.kind=natural", "data.client", "iid"):
        divide(rows_of(6), Partition(kind="natural"), np.ones(6, int), 0)


def test_more_natural_clients_than_there_are(refuses: Any) -> None:
    with refuses("partition.clients=10", "only 2 values", "0 to keep them all"):
        divide(rows_of(4, ["a", "b"] * 2), Partition(kind="natural"), np.ones(4, int), 0)


def test_more_clients_than_rows(refuses: Any) -> None:
    with refuses("partition.clients=10", "5 training rows", "Lower partition.clients"):
        divide(rows_of(6), Partition(kind="iid"), np.array([1, 1, 0, 1, 1, 1]), 0)
    with refuses("partition.clients=4", "partition.shards=2", "6 training rows"):
        divide(rows_of(6), Partition(kind="shard", clients=4), np.ones(6, int), 0)


@pytest.mark.parametrize("kind", ["dirichlet", "shard", "pathological"])
def test_division_by_label_needs_labels(
    refuses: Any, kind: Literal["dirichlet", "shard", "pathological"]
) -> None:
    rows = Dataset.from_dict({"text": ["w"] * 30})
    with refuses(f"partition.kind={kind}", "data.label", "iid or natural"):
        divide(rows, Partition(kind=kind), ones(rows), 0)


def test_impossible_dirichlet_minimum(refuses: Any) -> None:
    rows = rows_of(60)
    partition = Partition(kind="dirichlet", clients=20, alpha=0.05, min_examples=3)
    parts = ["partition.alpha=0.05", "partition.clients=20", "partition.min_examples=3"]
    with refuses(*parts, "60 training rows", "Raise partition.alpha"):
        divide(rows, partition, ones(rows), 0)


def test_impossible_pathological_requests(refuses: Any) -> None:
    rows = rows_of(60)
    with refuses("partition.classes=7", "6 labels", "Lower partition.classes"):
        divide(rows, Partition(kind="pathological", classes=7), ones(rows), 0)
    with refuses("partition.clients=3", "partition.classes=3", "6 labels to nobody", "shard"):
        divide(rows, Partition(kind="pathological", clients=3, classes=3), ones(rows), 0)
    with refuses("partition.clients=40", "partition.classes=3", "more clients than it has rows"):
        divide(rows, Partition(kind="pathological", clients=40, classes=3), ones(rows), 0)


@pytest.mark.parametrize(
    ("partition", "part"),
    [
        (Partition(clients=0), "partition.clients=0 must be at least 1"),
        (Partition(kind="natural", clients=-1), "partition.clients=-1 must be at least 0"),
        (Partition(min_examples=0), "partition.min_examples=0 must be at least 1"),
        (Partition(kind="pathological", classes=0), "partition.classes=0 must be at least 1"),
        (Partition(kind="shard", shards=0), "partition.shards=0 must be at least 1"),
        (Partition(kind="dirichlet", alpha=0.0), "partition.alpha=0.0 must be greater than 0"),
        (Partition(kind="dirichlet", alpha=float("nan")), "partition.alpha=nan"),
    ],
)
def test_settings_out_of_range(refuses: Any, partition: Partition, part: str) -> None:
    with refuses(part):
        divide(rows_of(60), partition, np.ones(60, int), 0)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    for partition in KINDS:
        divide(rows_of(203, [f"c{i % 9}" for i in range(203)]), partition, np.ones(203, int), 0)
    assert capfd.readouterr() == ("", "")


def test_the_partitioners_and_their_plots_are_loaded_only_to_divide() -> None:
    found = [
        node.module
        for file in Path(fedpeft.data.__file__).parents[1].rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module
    ]
    assert "fedpeft.streams" in found
    assert not [name for name in found if name.startswith("flwr_datasets")]
