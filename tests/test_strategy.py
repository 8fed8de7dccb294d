"""Messages, and strategies found by name and built from settings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedpeft import tree
from fedpeft.errors import FedpeftError
from fedpeft.strategies.fedprox import FedProx
from fedpeft.strategy import Message, Messages, available, build, load, weighted_mean
from fedpeft.tree import Tree

NAMES = ("ada", "bob", "cyd", "dan")


def one(k: int) -> Message:
    return Message(
        {"w": {"x": torch.tensor([1.0, 2.0]) * k}, "v": {"y": torch.full((2, 2), k).double()}},
        {"weight": k + 0.5, "loss": 0.1},
        {"seed": bytes([k]) * (k + 1)},
    )


def four() -> Messages:
    return Messages.stack(NAMES, [one(k) for k in range(4)])


def check(messages: Messages, expected: list[int]) -> None:
    """That the rows are the clients ``expected``, whole."""
    assert messages.clients == tuple(NAMES[k] for k in expected)
    assert len(messages) == len(expected)
    for row, k in enumerate(expected):
        found, wanted = messages[row], one(k)
        assert found.scalars == wanted.scalars and found.blobs == wanted.blobs
        assert found.trees.keys() == wanted.trees.keys()
        for name, own in wanted.trees.items():
            tree.check_same(dict(found.trees[name]), own)
            assert all(torch.equal(found.trees[name][n], own[n]) for n in own)


def test_stacked_messages_give_back_every_message() -> None:
    messages = four()
    check(messages, [0, 1, 2, 3])
    assert messages.trees["v"]["y"].shape == (4, 2, 2)
    assert messages.scalars["weight"].dtype == torch.float64


@pytest.mark.parametrize("index", [[0], [1, 2], [3, 1], [2, 2], [0, 2], [3, 2, 1, 0], []])
def test_rows_picks_clients_in_the_order_asked(index: list[int]) -> None:
    check(four().rows(index), index)


def test_a_plain_range_of_rows_is_a_view() -> None:
    messages = four()
    part, picked = messages.rows([1, 2]).trees["w"]["x"], messages.rows([2, 1]).trees["w"]["x"]
    messages.trees["w"]["x"][2] = 9.0
    assert part[1].tolist() == [9.0, 9.0] and picked[0].tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, [[0], [1], [2], [3]]), (3, [[0, 1, 2], [3]]), (4, [[0, 1, 2, 3]]), (9, [[0, 1, 2, 3]])],
)
def test_split_gives_consecutive_stacks(size: int, expected: list[list[int]]) -> None:
    parts = list(four().split(size))
    assert len(parts) == len(expected)
    for part, wanted in zip(parts, expected, strict=True):
        check(part, wanted)


def test_splitting_no_messages_gives_no_stack() -> None:
    assert list(four().rows([]).split(2)) == []


def test_broadcast_is_one_copy_for_everyone() -> None:
    names = tuple(f"c{k}" for k in range(10_000))
    own: Tree = {"x": torch.arange(3.0)}
    messages = Messages.broadcast(names, {"w": own}, {"mu": 2}, {"seed": b"12345678"})
    assert len(messages) == 10_000 and messages.trees["w"]["x"].shape == (10_000, 3)
    assert messages.trees["w"]["x"].untyped_storage().data_ptr() == own["x"].data_ptr()
    last = messages[9_999]
    assert last.trees["w"]["x"].tolist() == [0, 1, 2]
    assert last.scalars == {"mu": 2.0} and last.blobs == {"seed": b"12345678"}
    bare = Messages.broadcast(("a", "b"), {})
    assert bare[1] == Message() and [len(part) for part in bare.split(1)] == [1, 1]


def test_replies_carry_float64_scalars_and_no_graph() -> None:
    loss = torch.tensor([0.5, 0.25, 1.0, 2.0], requires_grad=True)
    reply = four().reply({"w": {"x": torch.zeros(4, 2)}}, loss=loss * 2)
    assert reply.clients == NAMES and reply.trees.keys() == {"w"} and not reply.blobs
    assert reply.scalars["loss"].tolist() == [1.0, 0.5, 2.0, 4.0]
    assert reply.scalars["loss"].dtype == torch.float64 and not reply.scalars["loss"].requires_grad


TREES, SCALARS, BLOBS = one(0).trees, one(0).scalars, one(0).blobs


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (Message({"w": TREES["w"]}, SCALARS, BLOBS), r"trees: \['v'\]"),
        (Message(TREES, {"weight": 1.0}, BLOBS), r"scalars: \['loss'\]"),
        (Message(TREES, SCALARS), r"blobs: \['seed'\]"),
        (
            Message({**TREES, "w": {"x": torch.zeros(3)}}, SCALARS, BLOBS),
            r"'x': shape \(2,\) and \(3,\)",
        ),
        (
            Message({**TREES, "w": {"x": torch.ones(2).int()}}, SCALARS, BLOBS),
            r"'x': dtype torch\.float32 and torch\.int32",
        ),
    ],
)
def test_messages_that_differ_do_not_stack(message: Message, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Messages.stack(NAMES[:2], [one(1), message])


def test_weighted_mean_reads_one_tree_of_all_stacks_once() -> None:
    expected = sum((k + 0.5) * torch.tensor([1.0, 2.0]) * k for k in range(4)) / 8
    assert torch.allclose(weighted_mean(four().split(3), "w")["x"], torch.as_tensor(expected))
    equal = four().reply(four().trees, share=torch.ones(4))
    assert weighted_mean([equal], "w", "share")["x"].tolist() == [1.5, 3.0]


def test_available_strategies_have_one_line_each() -> None:
    found = available()
    assert {"fedavg", "fedprox", "ffa_lora", "local", "centralised"} <= found.keys()
    assert all(line and "\n" not in line for line in found.values())


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "fedvag",
            r"strategy\.name='fedvag' does not exist\. Did you mean 'fedavg'\? Known: .*local",
        ),
        ("zzz", r"'zzz' does not exist\. Known: centralised, epm, fed"),
        ("", r"'' does not exist"),
        ("no_such_pkg.mine", r"no module 'no_such_pkg' on the Python path.*or one of: .*fedavg"),
        ("fedpeft.strategies.nope", r"no module 'fedpeft\.strategies\.nope'"),
        ("fedpeft.tree", r"module fedpeft\.tree must define exactly one Strategy, found \[\]"),
    ],
)
def test_a_name_that_is_no_strategy_is_explained(name: str, match: str) -> None:
    with pytest.raises(FedpeftError, match=match):
        load(name)


def test_names_are_module_paths() -> None:
    assert load("fedprox") is FedProx
    assert load("fedpeft.strategies.fedprox") is FedProx


MINE = """
from dataclasses import dataclass
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategy import Strategy, Messages, weighted_mean

@dataclass(frozen=True)
class {name}(Strategy):
    beta: float = 0.5
    def init(self, problem): return problem
    def send(self, state, round, clients): return Messages(())
    def train(self, messages, cohort): return messages
    def receive(self, state, replies): return state
    def adapter(self, state): return {{}}
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's own modules, on the Python path."""
    folder = tmp_path / "lab_of_ada"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [n for n in sys.modules if n.split(".")[0] == folder.name]:
        del sys.modules[name]


def test_a_users_own_module_is_a_strategy(mine: Path) -> None:
    """An imported strategy does not count as the module's own."""
    (mine / "one.py").write_text(MINE.format(name="One"))
    made = build("lab_of_ada.one", {"beta": 2})
    assert type(made).__name__ == "One" and made == type(made)(beta=2.0)
    with pytest.raises(FedpeftError, match=r"strategy\.bta=1: .*Did you mean 'beta'"):
        build("lab_of_ada.one", {"bta": 1})


def test_a_module_with_two_strategies_is_refused(mine: Path) -> None:
    (mine / "two.py").write_text(MINE.format(name="One") + MINE.format(name="Two"))
    with pytest.raises(FedpeftError, match=r"exactly one Strategy, found \['One', 'Two'\]"):
        load("lab_of_ada.two")


@pytest.mark.parametrize("missing", ["missing_dependency", "lab"])
def test_a_fault_inside_a_users_module_is_not_hidden(mine: Path, missing: str) -> None:
    """``lab`` is a prefix of the module's own path, yet another module."""
    (mine / "broken.py").write_text(f"import {missing}\n")
    with pytest.raises(ModuleNotFoundError, match=f"'{missing}'"):
        load("lab_of_ada.broken")


def test_a_strategy_that_is_no_dataclass_is_explained(mine: Path) -> None:
    (mine / "bare.py").write_text(MINE.format(name="Bare").replace("@dataclass(frozen=True)", ""))
    with pytest.raises(FedpeftError, match=r"strategy\.name='lab_of_ada\.bare'.*dataclass"):
        build("lab_of_ada.bare", {})


def test_settings_are_checked_against_the_strategys_own_fields() -> None:
    assert build("fedprox", {}) == FedProx()
    assert build("fedprox", {"mu": "0.5", "space": "product"}) == FedProx(0.5, "product")
    assert build("fedprox", {"mu": 1}) == FedProx(1.0)


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        (
            "fedprox",
            {"spce": "factor"},
            r"strategy\.spce='factor': fedprox has no such setting\. "
            r"Did you mean 'space'\? Known: mu, space\.",
        ),
        ("fedavg", {"mu": 1}, r"strategy\.mu=1: fedavg has no such setting\. Known: \(none\)\."),
        ("fedprox", {"mu": "much"}, r"strategy\.mu='much' is refused by fedprox: .*Float"),
        ("fedprox", {"mu": None}, r"strategy\.mu=None is refused by fedprox"),
        ("fedprox", {"space": "prod"}, r"strategy\.space='prod' .*one of \['factor', 'product'\]"),
        ("fedprox", {"mu": -1}, r"strategy\.mu=-1\.0: .*>= 0"),
        ("fedvag", {"mu": 1}, r"strategy\.name='fedvag' does not exist"),
    ],
)
def test_settings_that_do_not_fit_are_explained(
    name: str, settings: dict[str, object], match: str
) -> None:
    with pytest.raises(FedpeftError, match=match):
        build(name, settings)
