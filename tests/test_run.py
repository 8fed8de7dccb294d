"""A run from recipe to table; stopped in every way and resumed, it ends with the same bits."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.base import folded
from fedpeft.config import Engine, Evaluation, Output, Recipe, Rounds, Sampling
from fedpeft.config_load import load_recipe
from fedpeft.engine import RoundReport
from fedpeft.errors import FedpeftError
from fedpeft.events import Summary, Watcher
from fedpeft.metrics import Score
from fedpeft.prepare import prepare_store
from fedpeft.record import checkpoint as checkpoints
from fedpeft.run import resume, run
from tests.tiny import tiny_recipe, write_tiny

ROUNDS = Rounds(count=4, sampling=Sampling("uniform", fraction=0.75))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, sizes=(7, 13, 5, 16))
    return folder


def recipe(files: Path, out: Path, **strategy: Any) -> Recipe:
    return dataclasses.replace(
        tiny_recipe(files, **strategy),
        rounds=ROUNDS,
        engine=Engine(chunk=2, threads=1, device="cpu"),
        output=Output(folder=str(out)),
        baselines=(),
    )


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if line["kind"] == kind]


def digest(folder: Path) -> str:
    (summary,) = lines(folder, "summary")
    assert summary["adapter_digest"]
    return str(summary["adapter_digest"])


class Stopper(Watcher):
    """Does ``act`` when the first chunk of round ``at`` is trained."""

    def __init__(self, at: int, act: Any) -> None:
        self.at, self.act, self.now = at, act, 0
        self.notes: list[str] = []
        self.summary: Summary | None = None

    def round_began(self, number: int, clients: int, tokens: int) -> None:
        self.now = number

    def chunk_done(self, clients: int, tokens: int) -> None:
        if self.now == self.at:
            self.act()

    def note(self, text: str) -> None:
        self.notes.append(text)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_run_leaves_its_folder_and_its_table(files: Path, tmp_path: Path) -> None:
    measured: dict[int, Score | None] = {}

    class See(Watcher):
        def round_done(self, report: RoundReport, score: Score | None) -> None:
            measured[report.round] = score

    out = tmp_path / "run"
    whole = dataclasses.replace(
        recipe(files, out),
        baselines=("untrained", "local", "centralised"),
        evaluation=Evaluation(every=3),
    )
    summary = run(whole, See())
    assert [row.name for row in summary.rows] == ["untrained", "local", "fedavg", "centralised"]
    own = summary.rows[2]
    logged = lines(out, "round")
    assert measured[3] is not None and measured[2] is None
    assert own.down["adapter"] == sum(r["bytes_down"]["adapter"] for r in logged) > 0
    assert own.up["adapter"] == sum(r["bytes_up"]["adapter"] for r in logged) > 0
    assert not summary.rows[0].up and not summary.rows[1].up
    assert [e["round"] for e in lines(out, "evaluation") if e["scope"] == "test"] == [3, 4]
    assert [b["name"] for b in lines(out, "baseline")] == ["untrained", "local", "centralised"]
    assert load_recipe(str(out / "recipe.yaml"), []).rounds == ROUNDS
    assert {p.name for p in (out / "adapter").iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "fedpeft.json",
    }
    assert not [p for p in out.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("strategy", ["fedavg", "ffa_lora", "local", "fedex_lora", "flora"])
@pytest.mark.parametrize("every", [1, 3])
def test_ctrl_c_then_resume_is_bit_identical(
    files: Path, tmp_path: Path, strategy: str, every: int
) -> None:
    def of(name: str) -> Recipe:
        made = recipe(files, tmp_path / name, name=strategy)
        output = dataclasses.replace(made.output, checkpoint_every=every)
        return dataclasses.replace(made, output=output)

    whole = run(of("whole"), Watcher())
    with pytest.raises(KeyboardInterrupt):
        run(of("cut"), Stopper(3, interrupt))
    cut = resume(str(tmp_path / "cut"), Watcher())
    assert dataclasses.replace(cut.rows[0], seconds=0.0) == dataclasses.replace(
        whole.rows[0], seconds=0.0
    )
    if strategy != "local":
        assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    assert [r["round"] for r in lines(tmp_path / "cut", "round")] == [1, 2, 3, 4]


SCRIPT = """
    import os, signal, sys
    from fedpeft.config_load import load_recipe
    from fedpeft.run import run
    from tests.test_run import Stopper
    run(load_recipe(sys.argv[1], []), Stopper(3, lambda: os.kill(os.getpid(), signal.SIGKILL)))
"""


def test_kill_9_in_mid_round_then_resume_is_bit_identical(files: Path, tmp_path: Path) -> None:
    run(recipe(files, tmp_path / "whole"), Watcher())
    text = (tmp_path / "whole" / "recipe.yaml").read_text()
    (tmp_path / "cut.yaml").write_text(text.replace(str(tmp_path / "whole"), str(tmp_path / "cut")))
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "cut.yaml")],
        env={**os.environ, "PYTHONPATH": root},
        cwd=root,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [r["round"] for r in lines(tmp_path / "cut", "round")] == [1, 2]
    assert not (tmp_path / "cut" / "adapter").exists()
    resume(str(tmp_path / "cut"), Watcher())
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_a_corrupt_checkpoint_falls_back_says_so_and_ends_the_same(
    files: Path, tmp_path: Path
) -> None:
    run(recipe(files, tmp_path / "whole"), Watcher())
    with pytest.raises(KeyboardInterrupt):
        run(recipe(files, tmp_path / "cut"), Stopper(4, interrupt))
    newest = max((tmp_path / "cut" / "checkpoints").iterdir())
    tensors = next(newest.glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-9])
    watcher = Stopper(-1, interrupt)
    resume(str(tmp_path / "cut"), watcher)
    assert "round-000003" in watcher.notes[0] and watcher.notes[1] == "resumed after round 2"
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_a_full_disk_stops_the_run_and_loses_nothing(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe(files, tmp_path / "whole"), Watcher())
    real, calls = checkpoints.write_synced, []

    def full(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) > 5:
            raise OSError(28, os.strerror(28))
        real(path, data)

    monkeypatch.setattr(checkpoints, "write_synced", full)
    with pytest.raises(FedpeftError, match="(?s)full.*fedpeft resume"):
        run(recipe(files, tmp_path / "cut"), Watcher())
    monkeypatch.undo()
    resume(str(tmp_path / "cut"), Watcher())
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_a_run_folder_that_exists_is_not_touched(files: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for overwrite in (False, True):
        made = recipe(files, tmp_path)
        output = dataclasses.replace(made.output, overwrite=overwrite)
        with pytest.raises(FedpeftError, match="exists and is not a run folder"):
            run(dataclasses.replace(made, output=output), Watcher())
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_resume_refuses_other_data_and_another_base(files: Path, tmp_path: Path) -> None:
    home = tmp_path / "files"
    home.mkdir()
    write_tiny(home, sizes=(7, 13, 5, 16))
    with pytest.raises(KeyboardInterrupt):
        run(recipe(home, tmp_path / "cut"), Stopper(2, interrupt))
    data = (home / "data.jsonl").read_text()
    (home / "data.jsonl").write_text(data.replace("w7", "w8"))
    with pytest.raises(FedpeftError, match="data have changed since the run began"):
        resume(str(tmp_path / "cut"), Watcher())
    write_tiny(home, sizes=(7, 13, 5, 16), seed=1)  # another base, then the old data again
    (home / "data.jsonl").write_text(data)
    with pytest.raises(FedpeftError, match="made with another base model"):
        resume(str(tmp_path / "cut"), Watcher())


def test_an_adapter_of_another_base_cannot_be_the_start(files: Path, tmp_path: Path) -> None:
    run(recipe(files, tmp_path / "first"), Watcher())
    begun = recipe(files, tmp_path / "second")
    warm = {**begun.adapter, "start": str(tmp_path / "first" / "adapter")}
    summary = run(dataclasses.replace(begun, adapter=warm), Watcher())
    assert summary.rounds == 4 and digest(tmp_path / "second") != digest(tmp_path / "first")
    other = tmp_path / "other"
    other.mkdir()
    write_tiny(other, sizes=(7, 13, 5, 16), seed=5)
    again = dataclasses.replace(recipe(other, tmp_path / "third"), adapter=warm)
    with pytest.raises(FedpeftError, match=r"adapter\.start=.*another base model"):
        run(again, Watcher())


LOADER = """
    import json, sys, torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification
    base = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=3)
    model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
    tokens = torch.tensor(json.loads(sys.argv[3]))
    with torch.no_grad():
        print(json.dumps(model(input_ids=tokens).logits.tolist()))
    assert not any(name.startswith("fedpeft") for name in sys.modules)
"""


@pytest.mark.parametrize("strategy", ["fedavg", "fedex_lora", "flora"])
def test_peft_alone_loads_the_exported_adapter_with_the_same_logits(
    files: Path, tmp_path: Path, strategy: str
) -> None:
    from fedpeft.prepare import prepare

    made = recipe(files, tmp_path / "run", name=strategy)
    run(made, Watcher())
    prepared = prepare(made)
    kind = type(prepared.strategy.init(prepared.problem))
    state = checkpoints.latest(tmp_path / "run" / "checkpoints", kind)[0].state
    tokens = [[3, 4, 5, 6], [9, 8, 7, 6]]
    adapter = {n: v[None] for n, v in prepared.strategy.adapter(state).items()}
    batch = dataclasses.replace(
        prepared.population.test.batch(torch.tensor([[0, 0]])),
        tokens=torch.tensor(tokens),
        mask=None,
    )
    base = prepared.strategy.base(state)
    with torch.no_grad(), folded(prepared.network, base):
        wanted = prepared.lane.logits(adapter, batch)
    assert bool(base) == (strategy != "fedavg")
    rank = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"]
    assert rank > 2 if strategy == "flora" else rank == 2  # FedEx: E is below float32 here
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(LOADER),
            str(files / "model"),
            str(tmp_path / "run" / "adapter"),
            json.dumps(tokens),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), wanted, atol=1e-5)


def test_no_cuda_when_asked(files: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    made = dataclasses.replace(recipe(files, tmp_path / "r"), engine=Engine(device="cuda"))
    with pytest.raises(FedpeftError, match=r"engine\.device='cuda' but this machine has no usable"):
        run(made, Watcher())
    assert not (tmp_path / "r").exists()


def test_fewer_clients_than_the_cohort(files: Path, tmp_path: Path) -> None:
    rounds = Rounds(sampling=Sampling("fixed", size=9))
    made = dataclasses.replace(recipe(files, tmp_path / "r"), rounds=rounds)
    with pytest.raises(FedpeftError, match=r"sampling\.size=9 but there are only 4 clients"):
        run(made, Watcher())


def test_a_model_without_the_target_modules(files: Path, tmp_path: Path) -> None:
    adapter = {"kind": "lora", "target_modules": ["q_proj"]}
    made = dataclasses.replace(recipe(files, tmp_path / "r"), adapter=adapter)
    with pytest.raises(FedpeftError, match=r"target_modules must name modules.*query, value"):
        run(made, Watcher())


def test_a_run_from_a_store_is_the_run_from_memory(files: Path, tmp_path: Path) -> None:
    """Bit by bit; and a resume knows the data again, wherever they lie."""
    made = dataclasses.replace(
        recipe(files, tmp_path / "memory"), baselines=("untrained", "local", "centralised")
    )
    prepare_store(made, str(tmp_path / "store"))
    run(made, Watcher())
    stored = dataclasses.replace(
        made,
        data=dataclasses.replace(made.data, source=str(tmp_path / "store")),
        output=Output(folder=str(tmp_path / "stored")),
    )
    run(stored, Watcher())
    assert digest(tmp_path / "stored") == digest(tmp_path / "memory")
    for kind in ("evaluation", "baseline"):
        assert lines(tmp_path / "stored", kind) == lines(tmp_path / "memory", kind)
    data = "data.json"
    assert (tmp_path / "stored" / data).read_text() == (tmp_path / "memory" / data).read_text()
    resume(str(tmp_path / "stored"), Watcher())


def test_at_most_so_many_clients_are_measured(files: Path, tmp_path: Path) -> None:
    """The baseline ``local`` trains no others; training itself is as it was."""
    found = {}
    for most in (0, 4, 2):
        made = dataclasses.replace(
            recipe(files, tmp_path / str(most)),
            baselines=("untrained", "local"),
            evaluation=Evaluation(most=most),
        )
        watched = Measured()
        found[most] = run(made, watched), watched
    (all_, _), (four, _), (_, watched) = found.values()
    assert [dataclasses.replace(r, seconds=0) for r in all_.rows] == [
        dataclasses.replace(r, seconds=0) for r in four.rows
    ]
    assert digest(tmp_path / "2") == digest(tmp_path / "4")
    measured = [line["score"] for line in lines(tmp_path / "2", "evaluation")][-1]
    every = [line["score"] for line in lines(tmp_path / "4", "evaluation")][-1]
    assert len(measured) == 2 and len(every) == 4
    assert measured == {name: every[name] for name in measured}
    assert watched.began[-1] == ("local", 2)


class Measured(Watcher):
    """Notes how many clients each training begins with."""

    def __init__(self) -> None:
        self.name = ""
        self.began: list[tuple[str, int]] = []

    def stage(self, name: str, rounds: int) -> None:
        self.name = name

    def round_began(self, number: int, clients: int, tokens: int) -> None:
        self.began.append((self.name, clients))
