"""What a client keeps on disk: the newest before a round, whole, or refused."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest
import torch

from fedpeft.errors import FedpeftError
from fedpeft.record import files
from fedpeft.site import state
from fedpeft.site.state import Moment, Store, locked, needed
from fedpeft.tree import Tree

RUN = "ab" * 16


def memory(value: float) -> dict[str, Tree]:
    return {
        "own": {"a": torch.full((2, 3), value), "n": torch.tensor(int(value))},
        "other": {"b": torch.tensor([True, False]), "c": torch.zeros(0, 3)},
        "forgotten": {},
    }


def same(found: dict[str, Tree], wanted: dict[str, Tree]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].keys() == own.keys()
        and all(
            torch.equal(found[name][n], t) and found[name][n].dtype == t.dtype
            for n, t in own.items()
        )
        for name, own in wanted.items()
    )


def store(folder: Path, run: str = RUN, client: str = "c0") -> Store:
    return Store(folder, run, client)


def saved(folder: Path, *moments: Moment, every: int = 1, keep: int = 2) -> Store:
    own = store(folder)
    for round_, exchange in moments:
        own.save((round_, exchange), memory(10 * round_ + exchange), every, keep)
    return own


def test_a_client_that_kept_nothing_starts_with_nothing(tmp_path: Path) -> None:
    assert store(tmp_path).before((7, 0)) == {} == store(tmp_path).after(7)
    assert list(tmp_path.iterdir()) == []


def test_the_newest_before_a_round_is_found(tmp_path: Path) -> None:
    saved(tmp_path, (1, 0), (1, 1), (3, 0), (3, 1))
    own = store(tmp_path)
    assert own.before((1, 0)) == {}
    for asked, wanted in [((1, 1), 10), ((2, 0), 11), ((3, 0), 11), ((3, 1), 30), ((9, 0), 31)]:
        assert same(own.before(asked), memory(wanted)), asked
    assert own.after(0) == {}
    for round_, wanted in [(1, 11), (2, 11), (3, 31), (4, 31)]:
        assert same(own.after(round_), memory(wanted)), round_


def test_a_redone_round_starts_where_it_did_and_forgets_what_came_after(tmp_path: Path) -> None:
    own = saved(tmp_path, (1, 0), (2, 0), (3, 0))
    own.discard_from((2, 0))
    assert same(own.before((2, 0)), memory(10))
    assert same(store(tmp_path).before((4, 0)), memory(10))  # round 2 failed this time
    own.save((2, 0), memory(77))
    assert same(store(tmp_path).before((3, 0)), memory(77))
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2


def test_all_of_a_run_can_be_redone_from_its_start(tmp_path: Path) -> None:
    own = saved(tmp_path, *((r, 0) for r in range(2, 40)))
    assert own.before((1, 0)) == {} == own.before((2, 0))
    own.discard_from((1, 0))
    own.save((1, 0), memory(1))
    assert same(store(tmp_path).before((2, 0)), memory(1))


def test_what_is_gone_is_refused(tmp_path: Path) -> None:
    own = saved(tmp_path, *((r, 0) for r in range(1, 30)))
    with pytest.raises(
        FedpeftError, match="client 'c0' for round 5, and what it kept before .* gone"
    ):
        own.before((5, 0))


@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize("keep", [1, 2, 4])
@pytest.mark.parametrize("step", [1, 4])
def test_every_checkpoint_of_the_server_finds_its_version(
    tmp_path: Path, every: int, keep: int, step: int
) -> None:
    """Whatever checkpoint is the newest whole one, and where a run was interrupted."""
    own, done = store(tmp_path), 0
    for newest in range(1, 33):
        if newest % step == 0:
            own.save((newest, 0), memory(newest), every, keep)
            done = newest
        checkpoints = [c for c in range(newest + 1) if c % every == 0][-keep:]
        for checkpoint in [*checkpoints, newest - 1]:
            wanted = checkpoint - checkpoint % step
            found = own.before((checkpoint + 1, 0))
            assert same(found, memory(wanted)) if wanted and done else found == {}
    assert len(list(tmp_path.glob("*/*.safetensors"))) <= keep + 7


def test_what_is_needed_is_bounded_whatever_the_recipe_says() -> None:
    rounds = [(r, 0) for r in range(1, 1000)]
    assert len(needed(rounds, 1, 10**9)) <= state.CHECKPOINTS + 8
    assert needed([(5, 0), (5, 1)], 0, 0) == {(5, 0), (5, 1)}


@pytest.mark.parametrize("run", ["", "abc", "../../etc/passwd", "G" * 16, "ab" * 100, "AB" * 8])
def test_the_servers_name_of_a_run_is_no_path(tmp_path: Path, run: str) -> None:
    with pytest.raises(FedpeftError, match="'run' is .* must be 8 to 128 hexadecimal digits"):
        store(tmp_path, run)


def test_runs_and_clients_do_not_mix(tmp_path: Path) -> None:
    saved(tmp_path, (1, 0))
    assert store(tmp_path, "cd" * 16).before((2, 0)) == {}
    assert store(tmp_path, client="c1").before((2, 0)) == {}
    assert RUN not in "".join(str(path) for path in tmp_path.rglob("*"))


def test_old_runs_are_removed_and_not_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "RUNS", 2)
    runs = [f"{k:032x}" for k in range(4)]
    for age, run in enumerate(runs):
        store(tmp_path, run).save((1, 0), memory(age))
        own = store(tmp_path, run)._own / "manifest.json"
        os.utime(own, ns=(age, age))
    assert len(list(tmp_path.glob("*/manifest.json"))) == 2
    for run in runs[:2]:
        with pytest.raises(FedpeftError, match="kept of this run was removed.*start the run again"):
            store(tmp_path, run).before((2, 0))
    assert same(store(tmp_path, runs[3]).before((2, 0)), memory(3))


def damage(folder: Path, what: str) -> None:
    [manifest] = folder.glob("*/manifest.json")
    tensors = sorted(folder.glob("*/*.safetensors"))[-1]
    if what == "no manifest":
        manifest.unlink()
    elif what == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:-40])
    elif what == "another manifest":
        document = json.loads(manifest.read_text())
        document["content"]["first"] = [9, 9]
        manifest.write_text(json.dumps(document))
    elif what == "no tensors":
        tensors.unlink()
    elif what == "half the tensors":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    else:
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)


@pytest.mark.parametrize(
    "what",
    [
        *("no manifest", "half a manifest", "another manifest"),
        *("no tensors", "half the tensors", "a flipped bit"),
    ],
)
def test_damaged_state_is_refused_and_never_begun_anew(tmp_path: Path, what: str) -> None:
    saved(tmp_path, (1, 0), (2, 0))
    damage(tmp_path, what)
    with pytest.raises(FedpeftError, match="client 'c0' kept of this run is damaged: .* Restore"):
        store(tmp_path).before((3, 0))


@pytest.mark.parametrize("at", ["tensors", "manifest"])
def test_a_save_that_is_cut_off_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    own = saved(tmp_path, (1, 0))

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state if at == "tensors" else files, "write_synced", full)
        with pytest.raises(FedpeftError, match="the disk is full"):
            own.save((2, 0), memory(2))
    assert same(store(tmp_path).before((9, 0)), memory(10))
    own.save((2, 0), memory(2))
    assert same(store(tmp_path).before((9, 0)), memory(2))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with locked(tmp_path / "state"):
            order.append("second")

    waiting = threading.Thread(target=second)
    with locked(tmp_path / "state"):
        waiting.start()
        with (tmp_path / "state" / "lock").open("wb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        order.append("first")
    waiting.join(20)
    assert order == ["first", "second"]
