"""A recipe's ``data`` and ``partition`` -> the Population of a run."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedpeft.config import Data, Partition
from fedpeft.data.clients import ClientData, Clients, Population
from fedpeft.data.examples import Examples
from fedpeft.data.fingerprint import sealed
from fedpeft.data.partition import Divided, divide
from fedpeft.data.store import is_store
from fedpeft.data.stored import stored_population
from fedpeft.data.tokens import Encoded, encode, take
from fedpeft.errors import FedpeftError
from fedpeft.streams import numpy_stream

if TYPE_CHECKING:  # a store needs no library of data sets, half a second of imports
    from datasets import Dataset

    from fedpeft.data.sources import Rows

_log = logging.getLogger(__name__)


def build_population(
    data: Data, partition: Partition, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Population:
    """Reads, tokenises and divides the data of a run.

    The same arguments give the same Population, and the same fingerprint, in every process. Rows
    without usable text are left out, and counted in the log. Raises FedpeftError for whatever is
    wrong with the data or cannot be divided as asked.
    """
    if is_store(data.source):
        return stored_population(data, partition, tokenizer)
    from fedpeft.data.sources import load_rows

    rows = load_rows(data, seed)
    encoded = _encode(rows.train, data, tokenizer, "training")
    sizes = np.bincount(encoded.row, minlength=len(rows.train))
    divided = divide(rows.train, partition, sizes, seed)
    examples, owned = _own(encoded, divided, len(rows.train))
    clients = Clients.of(
        _split(name, numbers, data.holdout, seed)
        for (name, _), numbers in zip(divided, owned, strict=True)
    )
    test = _test(rows, data, tokenizer, examples, clients)
    labels = rows.labels if data.task == "classification" else ()
    public = _public(data, tokenizer, seed)
    return sealed(Population(data.task, clients, examples, test, labels, "", public=public))


def pool(population: Population) -> Population:
    """The same data in the hands of one client, ``everyone``: the centralised reference."""
    everyone = ClientData(
        "everyone",
        np.sort(population.clients.train.values),
        np.sort(population.clients.holdout.values),
    )
    return sealed(replace(population, clients=Clients.of([everyone])))


def _public(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> Examples | None:
    """The split that the server owns, with the labels of the training split."""
    if data.public is None:
        return None
    from fedpeft.data.sources import load_rows

    try:
        rows = load_rows(replace(data, test=data.public), seed).test
    except FedpeftError as error:
        raise FedpeftError(
            f"data.public={data.public!r} is read as a second test split would be: {error}"
        ) from None
    assert rows is not None, "a split that was named is read or refused"
    return _encode(rows, data, tokenizer, "public").examples


def _encode(rows: Dataset, data: Data, tokenizer: PreTrainedTokenizerBase, split: str) -> Encoded:
    """Tokenises one split; says how many rows had no usable text."""
    encoded = encode(rows, data, tokenizer)
    dropped = len(rows) - len(np.unique(encoded.row))
    if dropped == len(rows):
        raise FedpeftError(
            f"data.text={data.text!r}: none of the {len(rows)} {split} rows of {data.source!r} has "
            "usable text. Name the column that holds the text."
        )
    if dropped:
        _log.warning("dropped %d of %d %s rows without usable text", dropped, len(rows), split)
    return encoded


def _own(encoded: Encoded, divided: Divided, rows: int) -> tuple[Examples, list[np.ndarray]]:
    """The examples of the rows that belong to a client, and each client's numbers among them."""
    owner = np.full(rows, -1)
    for client, (_, part) in enumerate(divided):
        owner[part] = client
    owners = owner[encoded.row]
    kept = np.flatnonzero(owners >= 0)
    by_client = np.argsort(owners[kept], kind="stable")
    ends = np.cumsum(np.bincount(owners[kept], minlength=len(divided)))
    return take(encoded.examples, kept), np.split(by_client, ends[:-1])


def _split(name: str, numbers: np.ndarray, share: float, seed: int) -> ClientData:
    """One client's examples, divided into training and hold-out; one always stays for training."""
    held = min(int(len(numbers) * share + 1e-9), len(numbers) - 1)
    shuffled = numpy_stream(seed, "holdout", name).permutation(numbers)
    return ClientData(name, np.sort(shuffled[held:]), np.sort(shuffled[:held]))


def _test(
    rows: Rows,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    clients: Clients,
) -> Examples:
    """The global test set: the source's own, else the union of the hold-outs."""
    if rows.test is not None:
        return _encode(rows.test, data, tokenizer, "test").examples
    union = np.sort(clients.holdout.values)
    if not len(union):
        raise FedpeftError(
            f"data.holdout={data.holdout} leaves no client an example to be measured on, and there "
            "is no test split. Raise data.holdout, or name a split with data.test."
        )
    return take(examples, union)
