"""Rows -> clients: by label with flwr-datasets' partitioners, else as these divide.

The partitioners see row numbers and keys, shuffled by the seed, never the text. Equal rows, recipe
and seed give equal clients in every process.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from fedpeft.config import Partition
from fedpeft.errors import FedpeftError
from fedpeft.streams import derive, numpy_stream

if TYPE_CHECKING:  # flwr_datasets loads its plots, a second of imports: only where it divides
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner

Divided = list[tuple[str, np.ndarray]]
"""Client name and its row numbers, int64 ascending; sorted by name."""


def divide(rows: Dataset, partition: Partition, sizes: np.ndarray, seed: int) -> Divided:
    """Divides ``rows`` (canonical columns) among clients.

    sizes: int64 ``[N]``, the examples that each row gives; rows with none go to nobody, every other
    row goes to exactly one client (``natural`` with ``partition.clients`` = N > 0: the N clients
    with the most examples keep theirs). Clients are called ``client-000``, ``client-001``, ...;
    natural clients by their value in the client column.

    Raises FedpeftError for a partition that these rows cannot have, and for a client without
    examples or with fewer than ``partition.min_examples``.
    """
    _check(partition)
    if partition.kind == "natural":
        divided = _natural(rows, partition, sizes)
    else:
        divided = _synthetic(rows, partition, np.flatnonzero(sizes), seed)
    _check_sizes(divided, partition, sizes)
    return divided


def _check(partition: Partition) -> None:
    lowest = {"clients": int(partition.kind != "natural"), "min_examples": 1}
    lowest |= {"classes": 1, "shards": 1}
    for name, low in lowest.items():
        value = getattr(partition, name)
        if value < low:
            raise FedpeftError(f"partition.{name}={value} must be at least {low}.")
    if not 0 < partition.alpha < float("inf"):
        raise FedpeftError(
            f"partition.alpha={partition.alpha} must be greater than 0 and finite; 0.1 is very "
            "uneven, 100 is nearly even."
        )


def _natural(rows: Dataset, partition: Partition, sizes: np.ndarray) -> Divided:
    """One client per value of the client column."""
    if "client" not in rows.column_names:
        raise FedpeftError(
            "partition.kind=natural needs a column that says whose row it is. Name it with "
            "data.client, or use another partition.kind, such as iid."
        )
    values = rows["client"][:]
    names = sorted(set(values))
    number = {name: i for i, name in enumerate(names)}
    owner = np.array([number[value] for value in values], np.int64)
    if partition.clients > len(names):
        raise FedpeftError(
            f"partition.clients={partition.clients}, but the column data.client has only "
            f"{len(names)} values. Lower partition.clients, or set it to 0 to keep them all."
        )
    total = np.bincount(owner, weights=sizes, minlength=len(names))
    chosen = np.sort(np.argsort(-total, kind="stable")[: partition.clients or len(names)])
    for i in chosen[total[chosen] == 0]:
        raise FedpeftError(
            f"client {names[i]!r} is empty: none of its rows has usable text. Remove it from the "
            "data, or keep only the largest clients with partition.clients=N."
        )
    member = np.flatnonzero((sizes > 0) & np.isin(owner, chosen))
    by_owner = member[np.argsort(owner[member], kind="stable")]
    ends = np.cumsum(np.bincount(owner[member], minlength=len(names))[chosen])
    parts = np.split(by_owner, ends[:-1])
    return [(names[i], part) for i, part in zip(chosen, parts, strict=True)]


def _synthetic(rows: Dataset, partition: Partition, usable: np.ndarray, seed: int) -> Divided:
    """Clients by chance or by label."""
    clients = partition.clients
    if clients > len(usable):
        raise FedpeftError(
            f"partition.clients={clients} is more than the {len(usable)} training rows with usable "
            "text. Lower partition.clients, or use more rows (data.limit)."
        )
    shuffled = numpy_stream(seed, "partition", "order").permutation(usable)
    if partition.kind == "iid":
        parts = [np.sort(part) for part in np.array_split(shuffled, clients)]
    else:
        keys = _labels(rows, partition)[shuffled]
        partitioner = _by_label(partition, keys, derive(seed, "partition", partition.kind))
        try:
            parts = _load(partitioner, shuffled, keys)
        except ValueError as error:
            raise _impossible(partition, len(usable)) from error
    return list(zip(client_names(clients), parts, strict=True))


def client_names(clients: int) -> list[str]:
    """What clients are called that have no names of their own, ascending."""
    width = max(3, len(str(clients - 1)))
    return [f"client-{i:0{width}}" for i in range(clients)]


def _labels(rows: Dataset, partition: Partition) -> np.ndarray:
    if "label" not in rows.column_names:
        raise FedpeftError(
            f"partition.kind={partition.kind} divides by label, and these rows have no label "
            "column. Name one with data.label, or use partition.kind=iid or natural."
        )
    return np.array(rows["label"][:], np.int64)


def _by_label(partition: Partition, keys: np.ndarray, seed: int) -> Partitioner:
    """The partitioner of a kind that reads labels, with settings that leave no row out."""
    from flwr_datasets.partitioner import (
        DirichletPartitioner,
        PathologicalPartitioner,
        ShardPartitioner,
    )

    clients, classes = partition.clients, partition.classes
    if partition.kind == "dirichlet":
        least = partition.min_examples
        return DirichletPartitioner(
            clients, "key", partition.alpha, min_partition_size=least, shuffle=False, seed=seed
        )
    if partition.kind == "shard":
        size = len(keys) // (clients * partition.shards)
        if size == 0:
            raise FedpeftError(
                f"partition.clients={clients} times partition.shards={partition.shards} is more "
                f"than the {len(keys)} training rows. Lower one of them."
            )
        return ShardPartitioner(
            clients, "key", shard_size=size, keep_incomplete_shard=True, shuffle=False, seed=seed
        )
    labels = len(np.unique(keys))
    if classes > labels:
        raise FedpeftError(
            f"partition.classes={classes}, but the training rows have {labels} labels. Lower "
            "partition.classes."
        )
    if clients + classes <= labels:
        raise FedpeftError(
            f"partition.clients={clients} with partition.classes={classes} would leave some of the "
            f"{labels} labels to nobody: pathological needs clients + classes > labels. Raise "
            f"one of them, or use partition.kind=shard, where partition.shards={classes} gives "
            "each client few labels and keeps every row."
        )
    mode = "first-deterministic" if clients >= labels else "deterministic"
    return PathologicalPartitioner(clients, "key", classes, mode, shuffle=False, seed=seed)


def _impossible(partition: Partition, rows: int) -> FedpeftError:
    """What the partitioners refuse: a Dirichlet minimum, or a label with too few rows."""
    clients = partition.clients
    if partition.kind == "dirichlet":
        return FedpeftError(
            f"partition.kind=dirichlet: no draw with partition.alpha={partition.alpha} gave each "
            f"of partition.clients={clients} clients partition.min_examples="
            f"{partition.min_examples} of the {rows} training rows. Raise partition.alpha, or "
            "lower partition.clients or partition.min_examples."
        )
    return FedpeftError(
        f"partition.kind={partition.kind}: with partition.clients={clients} and "
        f"partition.classes={partition.classes} some label would be shared by more clients than it "
        f"has rows (of {rows} in all). Lower partition.clients or partition.classes, or use "
        "partition.kind=shard."
    )


def _load(partitioner: Partitioner, rows: np.ndarray, keys: np.ndarray) -> list[np.ndarray]:
    """Runs a partitioner over rows and their keys: the rows of each partition, ascending.

    Reads the division itself: ``load_partition`` makes a Dataset of every client, a millisecond
    each.
    """
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({"row": rows, "key": keys})
    with warnings.catch_warnings():  # a Dirichlet minimum that a first draw misses; pyarrow's own
        warnings.simplefilter("ignore")
        clients = partitioner.num_partitions  # divides
    own = np.array(partitioner.dataset["row"][:], np.int64)  # a ShardPartitioner sorts its rows
    found = partitioner._partition_id_to_indices
    return [np.sort(own[np.array(found[i], np.int64)]) for i in range(clients)]


def _check_sizes(divided: Divided, partition: Partition, sizes: np.ndarray) -> None:
    least = partition.min_examples
    small = [(int(sizes[part].sum()), name) for name, part in divided]
    small = [pair for pair in small if pair[0] < least]
    if small:
        examples, name = min(small)
        raise FedpeftError(
            f"client {name!r} has {examples} examples, fewer than partition.min_examples={least} "
            f"({len(small)} of {len(divided)} clients have too few). Lower partition.min_examples, "
            "use fewer clients (natural: partition.clients=N keeps the N largest), or more rows."
        )
