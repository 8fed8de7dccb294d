"""The commands on a real run of a tiny model: run, check, resume, and the adapter at the end."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers
from click.testing import Result
from typer.testing import CliRunner

import fedpeft.model
from fedpeft.cli import loading, watchers
from fedpeft.cli.app import app
from fedpeft.config import Engine, Model, Recipe, Rounds
from fedpeft.config_load import dump_recipe, load_recipe
from fedpeft.deploy.local import free_ports, listens
from fedpeft.metrics import Tally
from fedpeft.prepare import prepare
from tests.tiny import CLASSES, tiny_recipe, write_tiny


@pytest.fixture(scope="module", autouse=True)
def no_progress() -> Iterator[None]:
    """What ``fedpeft.cli.logs`` says in the environment, too late here: it was imported before."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a model and ``recipe.yaml``."""
    folder = tmp_path_factory.mktemp("files")
    write_tiny(folder)
    made = dataclasses.replace(
        tiny_recipe(folder), engine=Engine(chunk=2, device="cpu"), rounds=Rounds(count=2)
    )
    (folder / "recipe.yaml").write_text(dump_recipe(made))
    return folder


def call(files: Path, command: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, [command, str(files / "recipe.yaml"), *arguments])


@pytest.fixture(scope="module")
def done(files: Path) -> Result:
    """A complete run into ``files/out``."""
    return call(files, "run", f"output.folder={files / 'out'}")


def test_a_run_ends_with_the_table(done: Result) -> None:
    assert (done.exit_code, done.stderr) == (0, "")
    before, table, after = done.stdout.rsplit("\n\n", 2)
    rows = [line.split()[0] for line in table.splitlines()[3:]]
    assert rows == ["untrained", "local-only", "fedavg", "centralised"]
    assert re.search(r"^fedavg +1/2 .*\nfedavg +2/2 .*\nlocal +1/1 ", before, re.MULTILINE)
    assert after.startswith("2 rounds; ")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.stdout)


# peft 0.21 still asks transformers by a name that it renamed
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_adapter_loads_as_printed(done: Result, files: Path) -> None:
    """peft alone, with the lines that the run printed, gives the score that it printed."""
    text = done.stdout
    code = text[text.index("  base = transformers.") :]
    space = {"transformers": transformers, "peft": peft, "fedpeft": fedpeft}
    exec("\n".join(line.removeprefix("  ") for line in code.splitlines()), space)
    model = space["model"]
    assert isinstance(model, peft.PeftModel)
    recipe = load_recipe(str(files / "out" / "recipe.yaml"))
    test = prepare(recipe).population.test
    batch = test.batch(torch.arange(len(test))[None])
    tally = Tally("classification", CLASSES)
    with torch.no_grad():
        logits = model.eval()(input_ids=batch.tokens, attention_mask=batch.mask).logits
    tally.add(logits, batch, torch.zeros(len(test), dtype=torch.int64))
    lines = (files / "out" / "metrics.jsonl").read_text().splitlines()
    (row,) = [r for r in json.loads(lines[-1])["rows"] if r["name"] == "fedavg"]
    assert tally.scores()[0].loss == pytest.approx(row["score"]["loss"], rel=1e-5)


def test_a_folder_is_not_overwritten(done: Result, files: Path) -> None:
    again = call(files, "run", f"output.folder={files / 'out'}")
    assert again.exit_code == 2
    assert "holds a run already" in again.stderr and "fedpeft resume" in again.stderr


def test_json_of_a_run(files: Path, tmp_path: Path) -> None:
    done = call(files, "run", f"output.folder={tmp_path / 'r'}", "baselines=[]", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [e["event"] for e in events if e["event"] != "chunk_done"] == [
        "planned",
        "stage",
        "round_began",
        "round_done",
        "round_began",
        "round_done",
        "summary",
    ]
    assert sum(e["clients"] for e in events if e["event"] == "chunk_done") == 2 * 4
    assert (tmp_path / "r" / "adapter" / "adapter_config.json").is_file()
    assert events[-1]["adapter"] == str(tmp_path / "r" / "adapter")


def test_verbose_names_the_lane(files: Path, tmp_path: Path) -> None:
    done = call(files, "check", "--verbose")
    assert done.exit_code == 0
    assert "fedpeft.cohort.choose: lane fold" in done.stdout


def test_a_log_and_metrics_beside_the_screen(files: Path, tmp_path: Path) -> None:
    [port] = free_ports(1)
    log, out = tmp_path / "log.jsonl", f"output.folder={tmp_path / 'r'}"
    own = ["--log", str(log), "--metrics-port", str(port)]
    done = call(files, "run", out, "baselines=[]", *own)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "replies, loss" not in done.stdout and "lane fold" not in done.stdout
    assert re.search(r"^fedavg +2/2 ", done.stdout, re.MULTILINE)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    found = [line["round"] for line in lines if "replies, loss" in line["message"]]
    assert found == [1, 2]
    assert "fedpeft.cohort.choose" in {line["logger"] for line in lines}
    assert not listens(port)


def test_a_log_that_cannot_be_written(files: Path, tmp_path: Path) -> None:
    log = tmp_path / "missing" / "log.jsonl"
    done = call(files, "run", f"output.folder={tmp_path / 'r'}", "--log", str(log))
    assert done.exit_code == 2 and f"--log={str(log)!r} cannot be written" in done.stderr
    assert not (tmp_path / "r").exists()


def test_check_trains_nothing(files: Path, tmp_path: Path) -> None:
    done = call(files, "check", f"output.folder={tmp_path / 'r'}", "local.lr=0.5")
    assert (done.exit_code, done.stderr) == (0, "")
    assert not (tmp_path / "r").exists()
    words = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "clients 4, all in a round" in words
    assert "engine cohort on cpu, lane fold" in words
    assert "clients at once 2" in words


def test_a_store_is_written_and_run(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    made = call(files, "store", str(folder), "engine.chunk=2")
    assert (made.exit_code, made.stderr) == (0, "")
    assert made.stdout == f"4 clients, 35 training and hold-out examples in {folder}\n"
    again = call(files, "store", str(folder))
    assert again.exit_code == 2 and "is there already" in again.stderr
    of_store = call(files, "store", str(tmp_path / "t"), f"data.source={folder}")
    assert of_store.exit_code == 2 and "is a store already" in of_store.stderr
    done = call(files, "run", f"data.source={folder}", f"output.folder={tmp_path / 'r'}")
    assert (done.exit_code, done.stderr) == (0, "")


def test_check_reads_every_byte_of_a_store(files: Path, tmp_path: Path) -> None:
    call(files, "store", str(tmp_path / "s"))
    assert call(files, "check", f"data.source={tmp_path / 's'}").exit_code == 0
    with (tmp_path / "s" / "tokens.npy").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\3\0\0\0")
    done = call(files, "check", f"data.source={tmp_path / 's'}")
    assert done.exit_code == 2 and "tokens.npy: its SHA-256" in done.stderr


def test_check_as_json(files: Path) -> None:
    done = call(files, "check", "--json", "rounds.count=7")
    (event,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert event["event"] == "plan"
    assert (event["plan"]["clients"], event["plan"]["rounds"]) == (4, 7)


def test_check_refuses_what_run_refuses(files: Path) -> None:
    done = call(files, "check", "strategy.name=fedvag")
    assert done.exit_code == 2
    assert "fedavg" in done.stderr and done.stdout == ""


def test_resume_ends_a_run_that_was_interrupted(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: object, number: int, clients: int, tokens: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(watchers.Quiet, "round_began", stop, raising=False)
        stopped = call(files, "run", f"output.folder={tmp_path / 'r'}", "baselines=[]", "--quiet")
    assert stopped.exit_code == 130
    assert stopped.stderr == f"interrupted. The run can go on: fedpeft resume {tmp_path / 'r'}\n"
    done = CliRunner().invoke(app, ["resume", str(tmp_path / "r")])
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "note: resumed after round 1" in lines
    assert next(line.split()[1] for line in lines if line.startswith("fedavg  ")) == "2/2"


@pytest.mark.slow  # imports everything once more
def test_ctrl_c_in_a_shell(files: Path, tmp_path: Path) -> None:
    main = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # as in a shell
        "from fedpeft.cli import main; main()"
    )
    recipe = [str(files / "recipe.yaml"), f"output.folder={tmp_path / 'a run'}"]
    more = ["rounds.count=100000", "evaluation.every=100000", "output.checkpoint_every=100000"]
    with subprocess.Popen(
        [sys.executable, "-c", main, "run", "--json", *recipe, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stderr
        for line in process.stdout:
            if json.loads(line)["event"] == "chunk_done":
                break
        process.send_signal(signal.SIGINT)
        rest, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130
    assert errors == f"interrupted. The run can go on: fedpeft resume '{tmp_path / 'a run'}'\n"
    assert all(json.loads(line)["event"] != "summary" for line in rest.splitlines())
    assert list((tmp_path / "a run" / "checkpoints").iterdir())


def test_lines_for_each_kind_of_model() -> None:
    mean = Recipe(model=Model(name="org/encoder", pooling="mean", revision="v1"))
    assert loading.lines(mean, 3, "out/adapter") == [
        "base = transformers.AutoModel.from_pretrained(",
        "    'org/encoder', revision='v1', dtype='float32')",
        "base = fedpeft.model.MeanPoolClassifier(base, 3)",
        "model = peft.PeftModel.from_pretrained(base, 'out/adapter')",
    ]
    decoder = dataclasses.replace(
        mean, data=dataclasses.replace(mean.data, task="causal_lm"), model=Model(name="org/decoder")
    )
    assert loading.lines(decoder, 0, "out/adapter") == [
        "base = transformers.AutoModelForCausalLM.from_pretrained(",
        "    'org/decoder', dtype='float32')",
        "model = peft.PeftModel.from_pretrained(base, 'out/adapter')",
    ]
    assert loading.lines(Recipe(model=Model(random=True)), 3, "out/adapter") == []
