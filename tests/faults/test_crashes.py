"""Faults 43 to 52: what is killed, and what the disk does."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import Context, RecordDict
from flwr.app import Message as FlowerMessage
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedpeft.cli import failures, watchers
from fedpeft.cli.app import app
from fedpeft.config import Engine, Output, Privacy, Recipe, Rounds, Sampling
from fedpeft.config_load import dump_recipe
from fedpeft.errors import FedpeftError
from fedpeft.events import Watcher
from fedpeft.federation import Failure
from fedpeft.flower import client_app
from fedpeft.flower.records import decode
from fedpeft.flower.server_app import main
from fedpeft.prepare import prepare
from fedpeft.privacy.events import compose
from fedpeft.privacy.ledger import Budget, Ledger
from fedpeft.record import checkpoint as checkpoints
from fedpeft.record import files
from fedpeft.record.folder import RunFolder
from fedpeft.run import resume, run
from tests.faults.federated import NAMES, federate
from tests.faults.register import fault
from tests.flower.nodes import InProcess
from tests.test_run import Stopper, digest, interrupt, lines
from tests.tiny import tiny_recipe

ROUNDS = Rounds(count=4, sampling=Sampling("uniform", fraction=0.75))


def recipe_of(tiny: Path, out: Path) -> Recipe:
    return dataclasses.replace(
        tiny_recipe(tiny),
        rounds=ROUNDS,
        engine=Engine(chunk=2, threads=1, device="cpu", workers=1),
        output=Output(folder=str(out)),
        baselines=(),
    )


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the adapter of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(recipe_of(tiny, out), Watcher())
    return digest(out)


def cut(tiny: Path, out: Path, at: int = 3) -> None:
    """A run that ended in round ``at``."""
    with pytest.raises(KeyboardInterrupt):
        run(recipe_of(tiny, out), Stopper(at, interrupt))


KILLED = """
    import os, signal, sys
    from fedpeft.config_load import load_recipe
    from fedpeft.events import Watcher
    from fedpeft.record import checkpoint
    from fedpeft.run import run

    def end(*ignored):
        os.kill(os.getpid(), signal.SIGKILL)

    class In(Watcher):
        def round_began(self, number, clients, tokens):
            self.now = number

        def chunk_done(self, clients, tokens):
            if where == "in a round" and self.now == 3:
                end()

        def round_done(self, report, score):
            if where == "between rounds" and report.round == 3:
                end()
            if where == "in a checkpoint" and report.round == 3:
                checkpoint.sync_folder = end  # all its files are there, under a hidden name

    where = sys.argv[2]
    run(load_recipe(sys.argv[1], []), In())
"""


def killed(tiny: Path, tmp_path: Path, where: str) -> Path:
    """The folder of a run that was killed there."""
    recipe = recipe_of(tiny, tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "recipe.yaml"), where],
        env={**os.environ, "PYTHONPATH": root},
        cwd=root,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    return tmp_path / "run"


@fault(43, "K")
@pytest.mark.parametrize("where", ["in a round", "between rounds"])
def test_kill_9_of_the_process_that_plays_the_rounds(
    tiny: Path, tmp_path: Path, whole: str, where: str
) -> None:
    folder = killed(tiny, tmp_path, where)
    assert not (folder / "adapter").exists()
    resume(str(folder), Watcher())
    assert digest(folder) == whole
    assert [line["round"] for line in lines(folder, "round")] == [1, 2, 3, 4]


@fault(44, "K")
def test_a_server_that_was_killed_goes_on(tiny: Path, tmp_path: Path) -> None:
    """The SuperLink takes its ServerApp with it: what is left of either is the run folder."""
    recipe = recipe_of(tiny, tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    config: Any = {"recipe": str(tmp_path / "recipe.yaml"), "join-timeout": 0.05, "enough": 1.0}
    context = Context(1, 0, {}, RecordDict(), config | {"reply-timeout": 5.0, "identities": ""})
    nodes = {10 + k: {"client": name} for k, name in enumerate(NAMES)}

    def killed(request: FlowerMessage, answer: FlowerMessage) -> FlowerMessage:
        if decode(request.content)[1].round == 3:
            raise KeyboardInterrupt
        return answer

    with pytest.raises(KeyboardInterrupt):
        main(InProcess(nodes, killed), context)
    grid = InProcess(nodes)
    context.run_config["resume"] = True
    main(grid, context)
    context.run_config["resume"] = False
    asked = {decode(m.content)[1].round for m in grid.seen if m.metadata.message_type == "train"}
    assert asked == {3, 4}
    other = dataclasses.replace(recipe, output=Output(folder=str(tmp_path / "whole")))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(other))
    main(InProcess(nodes), context)
    found, wanted = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("run", "whole")
    )
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@fault(45, "K")
def test_kill_9_while_a_checkpoint_is_written(tiny: Path, tmp_path: Path, whole: str) -> None:
    folder = killed(tiny, tmp_path, "in a checkpoint")
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert "round-000002" in names and "round-000003" not in names
    watcher = Stopper(-1, interrupt)
    resume(str(folder), watcher)
    assert "resumed after round 2" in watcher.notes
    assert digest(folder) == whole


@fault(46, "K")
@pytest.mark.parametrize("damage", ["cut short", "a bit turned"])
def test_a_damaged_checkpoint_is_found_and_the_one_before_used(
    tiny: Path, tmp_path: Path, whole: str, damage: str
) -> None:
    cut(tiny, tmp_path / "run", at=4)
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    tensors = next(newest.glob("*.safetensors"))
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(bytes(data if damage == "a bit turned" else data[:-9]))
    watcher = Stopper(-1, interrupt)
    resume(str(tmp_path / "run"), watcher)
    assert "round-000003" in watcher.notes[0] and watcher.notes[1] == "resumed after round 2"
    assert digest(tmp_path / "run") == whole


@fault(47, "Q")
def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(
    tiny: Path, tmp_path: Path, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = checkpoints.write_synced, []

    def full(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, data)

    monkeypatch.setattr(checkpoints, "write_synced", full)
    with pytest.raises(FedpeftError, match=r"(?s)the disk is full.*fedpeft resume"):
        run(recipe_of(tiny, tmp_path / "run"), Watcher())
    monkeypatch.undo()
    resume(str(tmp_path / "run"), Watcher())
    assert digest(tmp_path / "run") == whole


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@fault(48, "E")
def test_an_output_folder_that_cannot_be_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_of(tiny, tmp_path / "run")))

    def fixed(path: Path, data: bytes) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    trained = []
    monkeypatch.setattr(watchers.Quiet, "round_began", lambda *a: trained.append(a), raising=False)
    monkeypatch.setattr(files, "write_synced", fixed)
    done = call("run", str(tmp_path / "recipe.yaml"), "--quiet")
    assert done.exit_code == 2 and not trained
    assert "Read-only file system" in done.stderr and str(tmp_path / "run") in done.stderr


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "recipe.yaml"
    written = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            written[section][name] = value
        else:
            written[section] = value
    path.write_text(yaml.safe_dump(written))


@fault(49, "E")
@pytest.mark.parametrize(
    ("change", "diff"),
    [
        ({"seed": 7}, "seed: 0 -> 7"),
        ({"strategy__name": "fedprox"}, "strategy.name: 'fedavg' -> 'fedprox'"),
        ({"partition__clients": 3}, "partition.clients: 0 -> 3"),
        ({"local__lr": 0.5, "seed": 7}, "local.lr: 0.1 -> 0.5; seed: 0 -> 7"),
    ],
)
def test_a_resume_with_a_changed_recipe_says_what_has_changed(
    tiny: Path, tmp_path: Path, change: dict[str, Any], diff: str
) -> None:
    cut(tiny, tmp_path / "run")
    edited(tmp_path / "run", **change)
    done = call("resume", str(tmp_path / "run"), "--quiet")
    assert done.exit_code == 2 and diff in done.stderr
    assert "--allow-change" in done.stderr
    assert [line["round"] for line in lines(tmp_path / "run", "round")] == [1, 2]


@fault(49, "E")
def test_a_change_that_is_meant_goes_on_and_speed_may_change(
    tiny: Path, tmp_path: Path, whole: str
) -> None:
    cut(tiny, tmp_path / "run")
    edited(tmp_path / "run", engine__chunk=1)
    edited(tmp_path / "run", local__lr=0.5)
    wrong = call("resume", str(tmp_path / "run"), "--allow-change", "seed", "--quiet")
    assert wrong.exit_code == 2 and "has not changed since" in wrong.stderr
    done = call("resume", str(tmp_path / "run"), "--allow-change", "local.lr", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert digest(tmp_path / "run") != whole


@fault(50, "E")
def test_a_folder_that_a_run_is_at_work_in_is_locked(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    with (
        folder.lock(),
        pytest.raises(FedpeftError, match="another run is at work in it"),
        folder.lock(),
    ):
        pass
    with folder.lock():
        pass


@fault(50, "E")
def test_a_run_does_not_overwrite_one_that_is_at_work(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    cut(tiny, out)
    recipe = recipe_of(tiny, out)
    recipe = dataclasses.replace(recipe, output=Output(folder=str(out), overwrite=True))
    with RunFolder.open(out).lock():
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        with pytest.raises(FedpeftError, match="another run is at work in it"):
            run(recipe, Watcher())
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@fault(50, "E")
@pytest.mark.parametrize("command", ["run", "resume"])
def test_a_run_holds_its_folder(tiny: Path, tmp_path: Path, command: str) -> None:
    out, tried = tmp_path / "run", list[int]()

    class Other(Watcher):
        def round_began(self, number: int, clients: int, tokens: int) -> None:
            with (
                pytest.raises(FedpeftError, match="another run is at work in it"),
                RunFolder.open(out).lock(),
            ):
                pass
            tried.append(number)

    if command == "resume":
        cut(tiny, out)
        resume(str(out), Other())
    else:
        run(recipe_of(tiny, out), Other())
    with RunFolder.open(out).lock():
        assert tried


@fault(51, "Q")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_a_checkpoint(
    tiny: Path,
    tmp_path: Path,
    whole: str,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_of(tiny, tmp_path / "run")))

    def stop(_: object, round: int, clients: int, tokens: int) -> None:
        if round == 3:
            os.kill(os.getpid(), number)

    before = [signal.getsignal(own) for own in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(watchers.Quiet, "round_began", stop, raising=False)
        done = call("run", str(tmp_path / "recipe.yaml"), "--quiet")
    assert done.exit_code == code
    assert f"fedpeft resume {tmp_path / 'run'}" in done.stderr
    assert [signal.getsignal(own) for own in (signal.SIGINT, signal.SIGTERM)] == before
    assert call("resume", str(tmp_path / "run"), "--quiet").exit_code == 0
    assert digest(tmp_path / "run") == whole


@fault(51, "Q")
def test_a_second_signal_ends_the_process_now(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(failures.os, "_exit", codes.append)
    with pytest.raises(failures.Terminated), failures.signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
    assert codes == [130]


def restarted(old: Context, number: int) -> Context:
    """The node's process anew, under another id: nothing is left but files."""
    client_app._prepared.cache_clear()
    return Context(1, number, dict(old.node_config), RecordDict(), {})


@fault(52, "K")
@fault(42, "K")
def test_a_node_that_starts_again_reads_its_ledger_from_disk(tiny: Path, tmp_path: Path) -> None:
    """And the ledger is the client's, whatever the node's id."""
    privacy = Privacy(unit="record", noise_multiplier=1.0, delta=1e-3, max_rounds=2)
    recipe = dataclasses.replace(tiny_recipe(tiny), privacy=privacy, rounds=Rounds(count=2))
    prepared = prepare(recipe)
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in NAMES}
    nodes = {10 + k: {"client": n, "privacy-ledger": paths[n]} for k, n in enumerate(NAMES)}
    grid = InProcess(nodes)
    federation = federate(grid, recipe)
    state = prepared.strategy.init(prepared.problem)
    told: list[str] = []
    for number in (1, 2, 3):
        sent = prepared.post.announce(prepared.strategy.send(state, number, NAMES))
        [found, *_] = list(federation.run(number, sent))
        told.append(found.reason if isinstance(found, Failure) else "")
        grid.contexts = {k + 100: restarted(old, k + 100) for k, old in grid.contexts.items()}
    assert told[:2] == ["", ""]
    assert "has taken part in 2 rounds" in told[2]
    terms = prepared.terms
    assert terms is not None
    with Ledger.open(tmp_path / "c1.jsonl", Budget(1e6, 1e-3)) as ledger:
        assert ledger.spent("c1") == compose([terms.event(9)] * 2)
