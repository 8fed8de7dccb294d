"""Checkpoints: exact, atomic, verified; a full disk or a kill loses nothing that was saved."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedpeft.errors import CheckpointError, FedpeftError
from fedpeft.record import checkpoint
from fedpeft.record.checkpoint import Checkpoint, latest, save
from fedpeft.tree import Tree


@dataclass(frozen=True)
class State:
    adapter: Tree
    step: int = 0


@dataclass(frozen=True)
class Other:
    adapter: Tree


def content(round: int, size: int = 3) -> Checkpoint[State]:
    values = torch.arange(size, dtype=torch.float32) + round
    memory = {"client": {"control": {"w": values * 2}}}
    return Checkpoint(round, State({"w": values}, round), memory, {"bytes": round * 10})


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def same_bits(left: Tensor, right: Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*raw)


def round_of(folder: Path) -> int:
    found, _ = latest(folder, State)
    assert torch.equal(found.state.adapter["w"][:1], torch.tensor([float(found.round)]))
    return found.round


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    noise = torch.randint(0, 256, (6 * 8 * 4,), generator=torch.Generator().manual_seed(0))
    matrix = noise.to(torch.uint8).view(dtype)[:24].view(4, 6)  # any bits: NaN payloads, subnormals
    tree = {
        "matrix": matrix,
        "transposed": matrix.T,
        "slice": matrix[1:3, ::2],
        "expanded": matrix[:1].expand(5, 6),
        "scalar": matrix[0, 0],
        "empty": matrix[:0],
        "shared": matrix,
        "flags": matrix.view(torch.uint8) > 100,
    }
    save(tmp_path, Checkpoint(1, State(tree), {"c": {"m": tree}}, {}), keep=1)
    found, warnings = latest(tmp_path, State)
    assert warnings == []
    for back in (found.state.adapter, found.memory["c"]["m"]):
        assert list(back) == list(tree)
        for name, tensor in tree.items():
            assert same_bits(back[name], tensor), name
            assert back[name].is_contiguous() and not back[name].requires_grad


def test_trained_tensors_are_saved_without_their_graph(tmp_path: Path) -> None:
    leaf = torch.ones(2, requires_grad=True)
    save(tmp_path, Checkpoint(1, State({"w": leaf * 3}), {}, {}), keep=1)
    assert torch.equal(latest(tmp_path, State)[0].state.adapter["w"], torch.full((2,), 3.0))


def test_client_names_may_be_any_text(tmp_path: Path) -> None:
    clients = ["", ".", "..", "../../up", "/etc/passwd", "a\x00b", "\ud800", "😀", "ß", "SS", "ss"]
    clients += ["n" * 5000, "CON", "tensors-0000.safetensors", "round-000009", "7", "a\nb"]
    memory = {c: {c: {c: torch.tensor(k)}} for k, c in enumerate(clients)}
    save(tmp_path / "deep" / "checkpoints", Checkpoint(1, State({}), memory, {}), keep=1)
    found, _ = latest(tmp_path / "deep" / "checkpoints", State)
    assert list(found.memory) == clients
    assert [int(found.memory[c][c][c]) for c in clients] == list(range(len(clients)))
    assert [p.name for p in sorted(tmp_path.rglob("*")) if p.is_file()] == [
        "manifest.json",
        "tensors-0000.safetensors",
    ]


def test_extra_and_an_empty_state_come_back(tmp_path: Path) -> None:
    extra = {"epsilon": float("inf"), "sizes": [1, (2, 3)], "by_kind": {"adapter": 2**40}}
    save(tmp_path, Checkpoint(0, State({}), {}, extra), keep=1)
    found, _ = latest(tmp_path, State)
    assert found == Checkpoint(0, State({}), {}, extra)


def test_large_states_are_split_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD", 100)
    tree = {str(n): torch.full((n,), float(n)) for n in range(60)}
    path = save(tmp_path, Checkpoint(1, State(tree), {}, {}), keep=1)
    assert len(names(path)) > 40
    found = latest(tmp_path, State)[0].state.adapter
    assert all(same_bits(found[name], tree[name]) for name in tree)


def damaged_copies(path: Path) -> Iterator[str]:
    """Damages a checkpoint in every way, one at a time; says which and repairs it afterwards."""
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for at in range(len(whole)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            yield f"{file.name}: bit {at % 8} of byte {at} flipped"
        for size in range(0, len(whole), 37):
            file.write_bytes(whole[:size])
            yield f"{file.name}: cut to {size} bytes"
        for longer in (b"\0", b"\n", b" ", whole):
            file.write_bytes(whole + longer)
            yield f"{file.name}: {len(longer)} bytes appended"
        file.unlink()
        yield f"{file.name}: deleted"
        file.mkdir()
        yield f"{file.name}: replaced by a folder"
        file.rmdir()
        file.write_bytes(whole)


def test_any_damage_is_detected_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    save(tmp_path, content(1), keep=2)
    newest = save(tmp_path, content(2), keep=2)
    count = 0
    for damage in damaged_copies(newest):
        found, warnings = latest(tmp_path, State)
        assert found.round == 1, damage
        assert len(warnings) == 1 and "skipped checkpoint round-000002: " in warnings[0], damage
        assert damage.split(":")[0] in warnings[0], damage
        count += 1
    assert count > 600
    assert latest(tmp_path, State)[1] == []


def test_without_a_readable_checkpoint_the_error_names_what_was_found(tmp_path: Path) -> None:
    for round in (1, 2):
        save(tmp_path, content(round), keep=2)
    (tmp_path / "round-000001" / "manifest.json").unlink()
    shard = tmp_path / "round-000002" / "tensors-0000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        latest(tmp_path, State)
    text = str(caught.value)
    assert "round-000002: tensors-0000.safetensors has " in text
    assert "round-000001: manifest.json is missing" in text
    assert "output.overwrite=true" in text


@pytest.mark.parametrize("there", [True, False])
def test_a_run_without_checkpoints_says_so(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "checkpoints"
    if there:
        folder.mkdir()
    with pytest.raises(CheckpointError, match="there is none"):
        latest(folder, State)


def test_a_checkpoint_of_another_strategy_is_refused(tmp_path: Path) -> None:
    save(tmp_path, content(1), keep=1)
    with pytest.raises(CheckpointError, match=r"holds the state .*State, this run's is .*Other"):
        latest(tmp_path, Other)


def test_a_checkpoint_of_a_newer_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "VERSION", 3)
    save(tmp_path, content(1), keep=1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 3, this fedpeft reads format 2"):
        latest(tmp_path, State)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_keep_checkpoints_stay(tmp_path: Path, keep: int) -> None:
    for round in range(6):
        save(tmp_path, content(round), keep)
        expected = [f"round-{r:06d}" for r in range(max(0, round - keep + 1), round + 1)]
        assert names(tmp_path) == expected
    with pytest.raises(FedpeftError, match=r"output\.keep=0 must be at least 1"):
        save(tmp_path, content(7), keep=0)


def test_rounds_are_ordered_as_numbers(tmp_path: Path) -> None:
    for round in (999_999, 1_000_000):
        save(tmp_path, content(round), keep=2)
    assert round_of(tmp_path) == 1_000_000


def test_going_on_from_an_earlier_round_replaces_the_later_ones(tmp_path: Path) -> None:
    for round in (1, 2, 3):
        save(tmp_path, content(round), keep=3)
    for broken in ("round-000002", "round-000003"):
        (tmp_path / broken / "manifest.json").write_text("{}")
    assert round_of(tmp_path) == 1
    save(tmp_path, content(2), keep=2)
    assert names(tmp_path) == ["round-000001", "round-000002.1"]
    assert round_of(tmp_path) == 2
    save(tmp_path, content(2), keep=2)
    assert names(tmp_path) == ["round-000001", "round-000002.2"]


def test_a_round_saved_again_leaves_the_first_until_the_second_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, content(1), keep=1)

    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(FedpeftError):
        save(tmp_path, content(1), keep=1)
    assert round_of(tmp_path) == 1


@contextmanager
def failing_at(step: int, error: Callable[[], BaseException]) -> Iterator[list[str]]:
    """Makes the step-th file operation under a save fail; gives the operations done so far."""
    done: list[str] = []

    def counted(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            if name == "mkdir" and ".writing-" not in str(arguments[0]):
                return real(*arguments, **options)
            done.append(name)
            if len(done) == step:
                raise error()
            return real(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedpeft.record.files.open", counted("open", open), raising=False)
        for name in ("mkdir", "fsync", "rename"):
            patch.setattr(os, name, counted(name, getattr(os, name)))
        yield done


# mkdir; open and fsync of the tensors, the manifest; fsync of the folder; rename; fsync.
STEPS = ["mkdir", "open", "fsync", "open", "fsync", "fsync", "rename", "fsync"]


@pytest.mark.parametrize("step", range(1, len(STEPS) + 1))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_loses_nothing(tmp_path: Path, step: int, code: int) -> None:
    folder = tmp_path / "run" / "checkpoints"
    save(folder, content(1), keep=1)
    with (
        failing_at(step, lambda: OSError(code, os.strerror(code))) as done,
        pytest.raises(FedpeftError) as caught,
    ):
        save(folder, content(2), keep=1)
    assert done == STEPS[:step]
    text = str(caught.value)
    for part in ("the disk is full", "Nothing is lost", "Free some space", "fedpeft resume "):
        assert part in text
    assert str(tmp_path / "run`") in text
    assert not list(folder.glob(".*"))
    assert "round-000001" in names(folder)
    assert round_of(folder) == (2 if step == len(STEPS) else 1)
    save(folder, content(2), keep=1)
    assert round_of(folder) == 2
    assert len(names(folder)) == 1


def test_the_operations_of_a_save_are_the_ones_tested(tmp_path: Path) -> None:
    with failing_at(0, RuntimeError) as done:
        save(tmp_path, content(1), keep=1)
    assert done == STEPS


@pytest.mark.parametrize("limit", [0, 40, 1000, 5000])
def test_a_write_that_the_system_cuts_short_loses_nothing(tmp_path: Path, limit: int) -> None:
    save(tmp_path, content(1), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(FedpeftError, match=r"the disk is full.*Nothing is lost"):
            save(tmp_path, content(2, size=3000), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["round-000001"]
    assert round_of(tmp_path) == 1


def test_a_full_disk_at_the_first_checkpoint_does_not_promise_a_resume(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with failing_at(2, lambda: full), pytest.raises(FedpeftError) as caught:
        save(tmp_path, content(0), keep=1)
    assert "the disk is full" in str(caught.value)
    assert "start the run again" in str(caught.value) and "resume" not in str(caught.value)


def test_other_write_errors_give_their_reason(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(FedpeftError, match=r"cannot write .*round-000001: File exists"):
        save(tmp_path / "checkpoints", content(1), keep=1)


@pytest.mark.parametrize("step", range(1, len(STEPS)))
def test_an_interrupt_leaves_nothing_half_written(tmp_path: Path, step: int) -> None:
    save(tmp_path, content(1), keep=2)
    with failing_at(step, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        save(tmp_path, content(2), keep=2)
    assert names(tmp_path) == ["round-000001"]


@pytest.mark.parametrize("step", range(2, len(STEPS)))
def test_a_kill_before_the_rename_leaves_the_checkpoint_before(tmp_path: Path, step: int) -> None:
    save(tmp_path, content(1), keep=1)
    with (
        pytest.MonkeyPatch.context() as patch,
        failing_at(step, KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill cleans nothing up
        save(tmp_path, content(2), keep=1)
    assert names(tmp_path) == [".writing-round-000002", "round-000001"]
    assert latest(tmp_path, State)[1] == []
    assert round_of(tmp_path) == 1
    save(tmp_path, content(2), keep=1)
    assert names(tmp_path) == ["round-000002"]


def test_what_cannot_be_removed_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, content(1), keep=1)
    real = shutil.rmtree

    def stubborn(path: Path, ignore_errors: bool = False) -> None:
        if path.name.endswith("round-000001") and not ignore_errors:
            raise PermissionError(errno.EACCES, "denied")
        real(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", stubborn)
    save(tmp_path, content(2), keep=1)
    assert names(tmp_path) == [".writing-round-000001", "round-000002"]
    monkeypatch.undo()
    save(tmp_path, content(3), keep=1)
    assert names(tmp_path) == ["round-000003"]


def test_foreign_names_in_the_folder_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path, content(1), keep=1)
    foreign = ("round-9", "round-best", "round-000009-copy", "notes")
    for name in foreign:
        (tmp_path / name).mkdir()
    save(tmp_path, content(2), keep=1)
    assert names(tmp_path) == sorted(["round-000002", *foreign])
    assert round_of(tmp_path) == 2


def test_a_state_that_cannot_be_held_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(FedpeftError, match=r"extra\['when'\] is a builtins.set"):
        save(tmp_path / "x", Checkpoint(1, State({}), {}, {"when": {1}}), keep=1)
    assert not (tmp_path / "x").exists()


def test_the_manifest_is_plain_json_and_nothing_is_pickled(tmp_path: Path) -> None:
    path = save(tmp_path, content(1), keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["content"]["round"] == 1
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors"}
    assert not any(p.read_bytes().startswith(b"\x80") for p in path.iterdir())
