"""The file below the ledger: every touch is found, every failure leaves it whole."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from fedpeft.errors import FedpeftError
from fedpeft.privacy.events import Gaussian, Repeated
from fedpeft.privacy.ledger import Budget, Ledger

FREE = Budget(float("inf"), 1e-5)
ROUND = Gaussian(5.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of four charges: five lines."""
    path = tmp_path / "privacy.jsonl"
    with Ledger.open(path, FREE) as ledger:
        for round_ in range(1, 5):
            ledger.charge(round_, {"a": ROUND, "b": Gaussian(7.0)}, f"round {round_}")
    return path


def rounds(path: Path) -> int:
    with Ledger.open(path, FREE) as ledger:
        event = ledger.spent("a")
    return event.times if isinstance(event, Repeated) else int(event == ROUND)


def refused(path: Path, match: str) -> None:
    before = path.read_bytes()
    with pytest.raises(FedpeftError, match=match):
        Ledger.open(path, FREE)
    assert path.read_bytes() == before


def test_each_line_is_chained_to_the_one_before(path: Path) -> None:
    previous = "0" * 64
    for line in path.read_bytes().splitlines():
        fields = json.loads(line)
        digest = fields.pop("sha256")
        assert fields["previous"] == previous
        assert hashlib.sha256(json.dumps(fields).encode()).hexdigest() == digest
        previous = digest
    with Ledger.open(path, FREE) as ledger:
        assert ledger.head == previous


def test_every_changed_byte_is_found_in_its_line(path: Path) -> None:
    whole = path.read_bytes()
    ends = [k for k, byte in enumerate(whole) if byte == ord("\n")]
    for at in range(0, len(whole), 7):
        if at in ends:
            continue
        line = sum(end < at for end in ends) + 1
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(path, f"line {line}\\b")
    path.write_bytes(whole)
    assert rounds(path) == 4


def test_lines_moved_taken_out_or_put_in_are_found(path: Path) -> None:
    first, *rest = path.read_bytes().splitlines(keepends=True)
    for lines, number in (
        ([first, rest[0], rest[2], rest[1], rest[3]], 3),
        ([first, rest[0], rest[2], rest[3]], 3),
        ([first, *rest[1:]], 2),
        (rest, 1),
        ([first, first, *rest], 2),
        ([first, rest[0], *rest], 3),
        ([first, b"\n", *rest], 2),
        ([*rest[:0], first, *rest, b"{}\n"], 6),
    ):
        path.write_bytes(b"".join(lines))
        refused(path, f"line {number}\\b")


def test_lines_missing_at_the_end_are_found_by_the_head(path: Path) -> None:
    with Ledger.open(path, FREE) as ledger:
        head = ledger.head
    with Ledger.open(path, FREE, head) as ledger:
        ledger.charge(5, {"a": ROUND})
    Ledger.open(path, FREE, head).close()  # it may go on
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]))
    with pytest.raises(FedpeftError, match=r"missing at its end, or it is another run's"):
        Ledger.open(path, FREE, head)
    assert rounds(path) == 3  # which the chain alone does not show


def test_a_last_line_that_broke_off_is_cut_with_a_warning(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in [start + 1, start + 40, len(whole) - 1]:
        path.write_bytes(whole[:end])
        with caplog.at_level(logging.WARNING):
            assert rounds(path) == 3
        assert "line 5 broke off" in caplog.text
        caplog.clear()
        assert path.read_bytes() == whole[:start]
        with Ledger.open(path, FREE) as ledger:
            ledger.charge(4, {"a": ROUND})
        assert rounds(path) == 4
    assert caplog.text == ""


def test_a_file_that_broke_off_when_it_was_made_is_made_anew(path: Path) -> None:
    whole = path.read_bytes()
    for end in (0, 1, 100, whole.index(b"\n")):
        path.write_bytes(whole[:end])
        assert rounds(path) == 0
        assert path.read_bytes() == whole[: whole.index(b"\n") + 1]


@pytest.mark.parametrize("content", [b"years of work", b"a\nb\n", b"{}", b"\x00" * 40])
def test_another_file_is_never_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "thesis.tex"
    path.write_bytes(content)
    path.chmod(0o640)
    refused(path, "line 1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def sealed(path: Path, fields: dict[str, Any]) -> None:
    """Adds a line with a right chain and any fields, as a later fedpeft might."""
    previous = (
        json.loads(path.read_bytes().splitlines()[-1])["sha256"] if path.exists() else "0" * 64
    )
    body = json.dumps({"previous": previous, **fields})
    digest = hashlib.sha256(body.encode()).hexdigest()
    with open(path, "a") as file:
        file.write(f'{{"sha256": "{digest}", {body[1:]}\n')


GOOD: dict[str, Any] = {"kind": "gaussian", "noise_multiplier": 1.0}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"round": 1, "note": ""}, "is no charge"),
        ({"round": 1, "note": "", "charges": [], "more": 1}, "is no charge"),
        ({"round": "1", "note": "", "charges": []}, "is no charge"),
        ({"round": 1, "note": "", "charges": [[GOOD]]}, "is not .event"),
        ({"round": 1, "note": "", "charges": [[GOOD, "a"]]}, "is not .event"),
        ({"round": 1, "note": "", "charges": [[GOOD, [1]]]}, "is not .event"),
        ({"round": 1, "note": "", "charges": [[{**GOOD, "kind": "laplace"}, ["a"]]]}, "laplace"),
    ],
)
def test_lines_that_are_no_charges_are_refused(path: Path, fields: Any, match: str) -> None:
    sealed(path, fields)
    refused(path, f"line 6.*{match}")


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new.jsonl"
    sealed(path, {"kind": "fedpeft privacy ledger", "schema": 2})
    refused(path, "line 1: the file says that it is .*'schema': 2.*Read it with the fedpeft")


def test_only_the_owner_can_read_it(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    Ledger.open(path, FREE).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_one_at_a_time(path: Path) -> None:
    with Ledger.open(path, FREE), pytest.raises(FedpeftError, match="another process has it open"):
        Ledger.open(path, FREE)
    assert rounds(path) == 4


def test_a_closed_ledger_charges_nobody(path: Path) -> None:
    ledger = Ledger.open(path, FREE)
    ledger.close()
    ledger.close()
    with pytest.raises(FedpeftError, match="is closed"):
        ledger.charge(5, {"a": ROUND})
    assert rounds(path) == 4


def test_a_refused_file_is_free_again(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"round 2", b"round 3"))
    refused(path, "line 3")
    path.write_bytes(whole)
    assert rounds(path) == 4


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "no folder"])
def test_only_a_plain_file_will_do(path: Path, kind: str) -> None:
    other = path.with_name("other")
    if kind == "link":
        other.symlink_to(path)
    elif kind == "folder":
        other.mkdir()
    elif kind == "pipe":
        os.mkfifo(other)
    else:
        other = other / "ledger.jsonl"
    with pytest.raises(FedpeftError, match=r"cannot write|no plain file"):
        Ledger.open(other, FREE)
    assert rounds(path) == 4


def test_a_charge_is_on_the_device_when_it_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    fsync = os.fsync

    def spy(handle: int) -> None:
        fsync(handle)
        synced.append(path.read_bytes())

    with Ledger.open(path, FREE) as ledger:
        monkeypatch.setattr(os, "fsync", spy)
        for round_ in (5, 6):
            ledger.charge(round_, {f"c{k}": Gaussian(1 + k % 4) for k in range(100)})
            assert synced.pop() == path.read_bytes() and not synced
            assert json.loads(path.read_bytes().splitlines()[-1])["round"] == round_


def test_a_new_ledger_has_its_name_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda h: (synced.append(os.fstat(h).st_mode), fsync(h))[1])
    Ledger.open(tmp_path / "new.jsonl", FREE).close()
    assert [stat.S_ISDIR(mode) for mode in synced] == [False, True]


def failing(after: int, error: BaseException) -> Any:
    """An os.write that writes 50 bytes at a time and then fails."""
    write, calls = os.write, []

    def fake(handle: int, data: bytes = b"") -> int:
        calls.append(data)
        if len(calls) > after:
            raise error
        return write(handle, data[:50])

    return fake


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_file_as_it_was_and_releases_nothing(
    path: Path, call: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()
    expected: type[BaseException] = FedpeftError if isinstance(error, OSError) else type(error)
    with Ledger.open(path, FREE) as ledger:
        with monkeypatch.context() as patch:
            if call == "write":
                patch.setattr(os, "write", failing(2, error))
            else:
                patch.setattr(os, "fsync", failing(0, error))
            with pytest.raises(expected, match=r"disk is full|^$"):
                ledger.charge(5, {"a": ROUND})
        assert path.read_bytes() == before
        assert ledger.spent("a") == Repeated(ROUND, 5)  # too high rather than too low
        with pytest.raises(FedpeftError, match="closed"):
            ledger.charge(5, {"a": ROUND})
    assert rounds(path) == 4


def test_a_line_that_is_written_in_parts_is_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger.open(path, FREE) as ledger:
        monkeypatch.setattr(os, "write", failing(1000, AssertionError()))
        ledger.charge(5, {"a": ROUND})
    monkeypatch.undo()
    assert rounds(path) == 5
