"""Poisoned clients have other examples; nobody else has."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpeft.attacks.settings import Attack
from fedpeft.data.clients import ClientData, Clients, Population
from fedpeft.data.examples import Examples, flatten
from fedpeft.data.fingerprint import sealed
from fedpeft.data.poison import flip_labels, plant_trigger, poison, triggered
from fedpeft.data.store import open_store
from fedpeft.data.store_writer import write_store
from fedpeft.errors import FedpeftError

Rows = list[tuple[list[int], int]]
BACKDOOR = Attack("backdoor", target=2, trigger=(91, 92), poisoned=0.5)


def population() -> Population:
    """Three clients of 3 classes; ``a`` and ``b`` share example 2."""
    rows = [[1, 10 + k, 20 + k, 30 + k, 2][: 5 - k % 4] for k in range(12)]
    examples = flatten(rows, [k % 3 for k in range(12)], 0)
    clients = Clients.of(
        ClientData(name, np.array(train, np.int64), np.array(held, np.int64))
        for name, train, held in [
            ("a", [0, 2, 1], [9]),
            ("b", [2, 3, 4, 5], [10]),
            ("c", [6, 7, 8], [11]),
        ]
    )
    test = flatten([[1, 40 + k, 50, 2] for k in range(5)], [0, 1, 2, 2, 0], 0)
    return sealed(Population("classification", clients, examples, test, ("x", "y", "z"), ""))


def read(examples: Examples, index: np.ndarray | None = None) -> Rows:
    assert examples.labels is not None
    tokens = [examples.tokens[a:b].tolist() for a, b in pairwise(examples.starts.tolist())]
    rows = list(zip(tokens, examples.labels.tolist(), strict=True))
    return rows if index is None else [rows[i] for i in index.tolist()]


def seen(data: Population) -> dict[str, tuple[Rows, Rows]]:
    """What every client trains and is measured on."""
    return {
        c.name: (read(data.examples, c.train), read(data.examples, c.holdout)) for c in data.clients
    }


def test_flipped_labels_are_the_clients_own_only() -> None:
    before = population()
    after = flip_labels(before, ["b"])
    was, now = seen(before), seen(after)
    assert now["a"] == was["a"] and now["c"] == was["c"] and now["b"][1] == was["b"][1]
    assert now["b"][0] == [(tokens, 2 - y) for tokens, y in was["b"][0]]
    assert read(after.test) == read(before.test)
    assert seen(before) == seen(population())
    assert after.fingerprint == sealed(after).fingerprint != before.fingerprint
    assert dict(after.clients.roster) == dict(before.clients.roster)


def test_labels_may_become_any_others() -> None:
    before = population()
    after = flip_labels(before, ["c", "a"], [1, 2, 0])
    for name in ("a", "c"):
        wanted = [(tokens, (y + 1) % 3) for tokens, y in seen(before)[name][0]]
        assert seen(after)[name][0] == wanted
    assert seen(after)["b"] == seen(before)["b"]


def test_a_trigger_overwrites_a_share_of_the_clients_examples() -> None:
    before = population()
    after = plant_trigger(before, BACKDOOR, ["b"], seed=0)
    was, now = seen(before), seen(after)
    assert now["a"] == was["a"] and now["c"] == was["c"] and now["b"][1] == was["b"][1]
    changed = [(old, new) for old, new in zip(was["b"][0], now["b"][0], strict=True) if old != new]
    assert len(changed) == 2
    for (tokens, _), new in changed:
        assert new == ([tokens[0], 91, 92, *tokens[3:]], 2)
    assert read(after.test) == read(before.test) and seen(before) == seen(population())


def test_short_examples_end_with_the_trigger() -> None:
    whole = replace(BACKDOOR, poisoned=1.0)
    rows = [[1], [1, 5], [1, 5, 6], [1, 5, 6, 7, 2]]
    test = flatten(rows, [0, 1, 0, 1], 0)
    wanted = [[1, 91, 92], [1, 91, 92], [1, 91, 92], [1, 91, 92, 7, 2]]
    assert read(triggered(test, whole, 3)) == [(row, 2) for row in wanted]
    late = replace(whole, position=3)
    wanted = [[1, 91, 92], [1, 5, 91, 92], [1, 5, 6, 91, 92], [1, 5, 6, 91, 92]]
    assert read(triggered(test, late, 3)) == [(row, 2) for row in wanted]
    first = replace(whole, position=0)
    wanted = [[91, 92], [91, 92], [91, 92, 6], [91, 92, 6, 7, 2]]
    assert read(triggered(test, first, 3)) == [(row, 2) for row in wanted]


def test_the_triggered_test_set_leaves_the_target_class_out() -> None:
    test = population().test
    found = triggered(test, BACKDOOR, 3)
    assert read(found) == [([1, 91, 92, 2], 2)] * 3
    assert found.tokens.dtype == test.tokens.dtype and found.starts.dtype == test.starts.dtype
    assert found.batch(torch.arange(3)[None]).tokens.tolist() == [[1, 91, 92, 2]] * 3
    with pytest.raises(FedpeftError, match=r"attack\.target=1: all test examples"):
        triggered(flatten([[1, 2]], [1], 0), replace(BACKDOOR, target=1), 3)


def test_which_examples_are_poisoned_is_fixed_by_seed_and_client() -> None:
    before = population()
    one = plant_trigger(before, BACKDOOR, ["b", "c"], seed=1)
    assert one.fingerprint == plant_trigger(before, BACKDOOR, ["c", "b"], seed=1).fingerprint
    alone = plant_trigger(before, BACKDOOR, ["c"], seed=1)
    assert seen(alone)["c"] == seen(one)["c"]
    others = {plant_trigger(before, BACKDOOR, ["b"], seed=s).fingerprint for s in range(8)}
    assert len(others) > 1
    everything = plant_trigger(before, replace(BACKDOOR, poisoned=1.0), ["b"], 0)
    assert [y for _, y in seen(everything)["b"][0]] == [2] * 4
    nothing = plant_trigger(before, replace(BACKDOOR, poisoned=0.0), ["b"], 0)
    assert seen(nothing) == seen(before)


def test_clients_of_one_size_are_poisoned_at_places_of_their_own() -> None:
    before, once = population(), replace(BACKDOOR, poisoned=0.3)
    was, places = seen(before), []
    for seed in range(8):
        now = seen(plant_trigger(before, once, ["a", "c"], seed))
        places.append(
            [[old != new for old, new in zip(was[n][0], now[n][0], strict=True)] for n in "ac"]
        )
    assert all(sum(flags) == 1 for pair in places for flags in pair)
    assert any(a != c for a, c in places)


def test_poison_does_what_the_kind_says() -> None:
    before = population()
    assert poison(before, Attack("sign_flip"), ["b"], 0) is before
    flipped = poison(before, Attack("label_flip"), ["b"], 0)
    assert flipped.fingerprint == flip_labels(before, ["b"]).fingerprint
    planted = poison(before, BACKDOOR, ["b"], 0)
    assert planted.fingerprint == plant_trigger(before, BACKDOOR, ["b"], 0).fingerprint
    assert seen(poison(before, Attack("label_flip"), [], 0)) == seen(before)


def test_a_store_is_poisoned_in_memory_only(tmp_path: Path) -> None:
    before = population()
    write_store(before, tmp_path / "store")
    stored = open_store(tmp_path / "store")
    late = replace(BACKDOOR, position=4, poisoned=1.0, trigger=(3, 4))
    wanted, found = plant_trigger(before, late, ["c"], 0), plant_trigger(stored, late, ["c"], 0)
    assert found.fingerprint == wanted.fingerprint and seen(found) == seen(wanted)
    longest = max(len(tokens) for tokens, _ in read(found.examples))
    assert found.examples.longest == longest > stored.examples.longest
    assert open_store(tmp_path / "store").fingerprint == before.fingerprint
    with pytest.raises(FedpeftError, match=r"attack\.trigger=\(91, 92\): the store's tokens"):
        plant_trigger(stored, BACKDOOR, ["c"], 0)


def test_what_cannot_be_poisoned_is_refused() -> None:
    before = population()
    with pytest.raises(FedpeftError, match="client 'd' is not registered"):
        flip_labels(before, ["d"])
    for classes in ([0, 1], [0, 1, 3], [-1, 0, 1]):
        with pytest.raises(FedpeftError, match=r"classes=\[.*each of the 3 classes"):
            flip_labels(before, ["a"], classes)
    with pytest.raises(FedpeftError, match=r"attack\.target=3: there are 3 classes"):
        plant_trigger(before, replace(BACKDOOR, target=3), ["a"], 0)
    text = replace(before, task="causal_lm", labels=())
    for attack in (Attack("label_flip"), BACKDOOR):
        with pytest.raises(FedpeftError, match=r"data\.task=causal_lm: attacks on labels"):
            poison(text, attack, ["a"], 0)
