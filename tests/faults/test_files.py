"""Faults 63 and 64: adapters, names, models and recipes that somebody else wrote."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedpeft.config import Engine, Model, Output, Recipe, Rounds
from fedpeft.config_load import parse_recipe
from fedpeft.errors import CheckpointError, FedpeftError
from fedpeft.events import Watcher
from fedpeft.redact import without_secrets
from fedpeft.run import resume, run
from tests.faults.register import fault
from tests.test_run import Stopper, interrupt
from tests.tiny import LORA, tiny_recipe, write_tiny

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def recipe_of(tiny: Path, out: Path) -> Recipe:
    return dataclasses.replace(
        tiny_recipe(tiny),
        rounds=Rounds(count=2),
        engine=Engine(chunk=2, threads=1, device="cpu", workers=1),
        output=Output(folder=str(out)),
        baselines=(),
    )


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a run."""
    out = tmp_path_factory.mktemp("exported") / "run"
    run(recipe_of(tiny, out), Watcher())
    return out / "adapter"


Spoil = Callable[[Path], object]


def unseal(folder: Path) -> None:
    """As somebody else would write it."""
    for name in ("fedpeft.json", "fedpeft-manifest.json"):
        (folder / name).unlink()


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    """The weights written anew, as somebody else would: without fedpeft's seal."""

    def spoil(folder: Path) -> None:
        unseal(folder)
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return spoil


def config(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        unseal(folder)
        found = json.loads((folder / CONFIG).read_text())
        change(found)
        (folder / CONFIG).write_text(json.dumps(found))

    return spoil


def raw(name: str, data: Callable[[bytes], bytes], sealed: bool = False) -> Spoil:
    def spoil(folder: Path) -> None:
        if not sealed:
            unseal(folder)
        (folder / name).write_bytes(data((folder / name).read_bytes()))

    return spoil


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def first(found: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    name = min(found)
    found[name] = change(found[name])


class Payload:
    """What a pickle would do when it is read."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("pickle-was-read"),)


def as_pickle(folder: Path) -> None:
    unseal(folder)
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))


GIANT = (2**40).to_bytes(8, "little") + b"{}"
ROWS: dict[str, tuple[Spoil, str]] = {
    "cut short": (raw(WEIGHTS, lambda data: data[:-100]), f"{WEIGHTS}: it is no safetensors file"),
    "empty": (raw(WEIGHTS, lambda data: b""), f"{WEIGHTS}: it is no safetensors file"),
    "giant header": (raw(WEIGHTS, lambda data: GIANT), f"{WEIGHTS}: it is no safetensors file"),
    "one bit": (raw(WEIGHTS, flip, sealed=True), f"{WEIGHTS!r} was changed"),
    "one bit of the configuration": (
        raw(CONFIG, lambda data: data.replace(b'"r": 2', b'"r": 3'), sealed=True),
        f"{CONFIG!r} was changed",
    ),
    "nan": (
        weights(lambda f: first(f, lambda v: v * torch.nan)),
        "holds NaN or Inf",
    ),
    "more": (weights(lambda f: f.update(more=torch.ones(1))), "['more']"),
    "float64": (weights(lambda f: first(f, torch.Tensor.double)), "is of torch.float64"),
    "int8": (weights(lambda f: first(f, lambda v: v.to(torch.int8))), "is of torch.int8"),
    "half": (
        weights(lambda f: [f.pop(n) for n in sorted(f)[::2]]),
        f"{WEIGHTS}: tensors are missing",
    ),
    "shape": (weights(lambda f: first(f, lambda v: v[:1].clone())), "has shape"),
    "broadcast": (weights(lambda f: first(f, lambda v: torch.ones(1))), "has shape"),
    "rank": (config(lambda c: c.update(r=16)), f"{CONFIG}: r is 16, the recipe"),
    "huge rank": (config(lambda c: c.update(r=10**7)), f"{CONFIG}: r is 10000000"),
    "alpha": (config(lambda c: c.update(lora_alpha=9999)), f"{CONFIG}: lora_alpha is 9999"),
    "field": (
        config(lambda c: c.update(evil=1)),
        f"{CONFIG}: 'evil' is a field that this peft lacks",
    ),
    "no json": (raw(CONFIG, lambda data: b"{"), f"{CONFIG!r} is no JSON"),
    "a list": (raw(CONFIG, lambda data: b"[]"), f"{CONFIG!r} must be a JSON object"),
    "kind": (config(lambda c: c.update(peft_type="EVIL")), f"{CONFIG}: peft_type is 'EVIL'"),
    "no kind": (config(lambda c: c.pop("peft_type")), f"{CONFIG}: peft_type is None"),
    "pattern": (
        config(lambda c: c.update(target_modules="^(([a-z_.0-9])+)+$X")),
        f"{CONFIG}: target_modules is '^(([a-z_.0-9])+)+$X'",
    ),
    "module": (
        config(lambda c: c.update(auto_mapping={"parent_library": "os", "base_model_class": "x"})),
        f"{CONFIG}: auto_mapping is",
    ),
    "note": (
        raw("fedpeft.json", lambda data: b"{", sealed=True),
        "'fedpeft.json' has 1 bytes, not",
    ),
    "pickle": (as_pickle, f"{WEIGHTS!r} is missing"),
}


@fault(63, "E")
@pytest.mark.parametrize("row", ROWS)
def test_an_adapter_that_is_not_what_it_should_be(
    tiny: Path, tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    spoil, wanted = ROWS[row]
    shutil.copytree(exported, tmp_path / "start")
    spoil(tmp_path / "start")
    monkeypatch.chdir(tmp_path)
    made = recipe_of(tiny, tmp_path / "run")
    begun = {**LORA, "start": str(tmp_path / "start")}
    with pytest.raises(FedpeftError) as caught:
        run(dataclasses.replace(made, adapter=begun), Watcher())
    assert wanted in str(caught.value)
    assert str(tmp_path / "start") in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"start"}  # no run, no pickle


@fault(63, "E")
def test_the_adapter_as_it_was_written_is_taken(tiny: Path, tmp_path: Path, exported: Path) -> None:
    begun = {**LORA, "start": str(exported)}
    run(dataclasses.replace(recipe_of(tiny, tmp_path / "run"), adapter=begun), Watcher())


@fault(63, "E")
@pytest.mark.parametrize(
    ("adapter", "wanted"),
    [
        (
            {"kind": "lora", "target_modules": "^(([a-z_.0-9])+)+$X"},
            "regular expressions are not compiled",
        ),
        ({"kind": "lora", "adapter_name": "/abs/evil"}, "adapter.adapter_name is not a setting"),
        ({"kind": "../evil"}, "adapter.kind='../evil' does not exist"),
    ],
)
def test_an_adapter_of_a_recipe_names_no_path_and_no_endless_pattern(
    tiny: Path, tmp_path: Path, adapter: dict[str, Any], wanted: str
) -> None:
    made = dataclasses.replace(recipe_of(tiny, tmp_path / "run"), adapter=adapter)
    with pytest.raises(FedpeftError) as caught:
        run(made, Watcher())
    assert wanted in str(caught.value)
    assert not (tmp_path / "run").exists()


@fault(63, "E")
@pytest.mark.parametrize("name", ["../evil", "/abs/evil", "a/b", "a\nb", ""])
def test_clients_names_are_never_paths(tmp_path: Path, name: str) -> None:
    """Not an error: a name is data, in every file of the run and in no file's name."""
    home = tmp_path / "home"
    home.mkdir()
    write_tiny(home)
    data = (home / "data.jsonl").read_text()
    named = data.replace('"client": "c1"', f'"client": {json.dumps(name)}')
    (home / "data.jsonl").write_text(named)
    made = recipe_of(home, home / "runs" / "run")
    if not name:
        with pytest.raises(FedpeftError):
            run(made, Watcher())
        return
    run(dataclasses.replace(made, strategy={"name": "local"}), Watcher())
    assert {p.name for p in tmp_path.iterdir()} == {"home"}
    assert {p.name for p in home.iterdir()} == {"model", "data.jsonl", "runs"}
    assert not [p for p in home.rglob("*") if "evil" in p.name or p.name in ("a", "a\nb")]


@fault(63, "E")
def test_a_checkpoint_that_is_a_link_out_of_the_run_is_not_read(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(recipe_of(tiny, out), Stopper(2, interrupt))
    shutil.move(out / "checkpoints", tmp_path / "elsewhere")
    (out / "checkpoints").mkdir()
    for own in (tmp_path / "elsewhere").iterdir():
        (out / "checkpoints" / own.name).symlink_to(own)
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        resume(str(out), Watcher())


@fault(64, "E")
@pytest.mark.parametrize("key", ["model.trust_remote_code", "adapter.trust_remote_code"])
def test_a_recipe_cannot_ask_for_remote_code(tiny: Path, tmp_path: Path, key: str) -> None:
    section, _, name = key.partition(".")
    with pytest.raises(FedpeftError, match="trust_remote_code"):
        made = parse_recipe(f"{section}: {{{name}: true, kind: lora}}" if section == "adapter"
                            else f"{section}: {{{name}: true}}", "here")  # fmt: skip
        run(dataclasses.replace(recipe_of(tiny, tmp_path / "run"), adapter=made.adapter), Watcher())
    assert not (tmp_path / "run").exists()


def with_code(tiny: Path, home: Path, file: str, **fields: Any) -> None:
    """A model folder one of whose files asks for a class in a file beside it."""
    shutil.copytree(tiny / "model", home)
    (home / "evil.py").write_text("open('evil-was-run', 'w')\nclass Evil: pass\n")
    found = json.loads((home / file).read_text())
    (home / file).write_text(json.dumps({**found, **fields}))


@fault(64, "E")
def test_a_model_with_code_of_its_own_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "model"
    auto = {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.Evil"}
    with_code(tiny, home, "config.json", model_type="evil", auto_map=auto)
    monkeypatch.chdir(tmp_path)
    made = dataclasses.replace(recipe_of(tiny, tmp_path / "run"), model=Model(name=str(home)))
    with pytest.raises(FedpeftError, match=r"model\.name=.*could not be loaded"):
        run(made, Watcher())
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@fault(64, "E")
def test_a_tokenizer_with_code_of_its_own_is_read_without_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "model"
    auto = {"AutoTokenizer": ["evil.Evil", None]}
    with_code(tiny, home, "tokenizer_config.json", tokenizer_class="Evil", auto_map=auto)
    monkeypatch.chdir(tmp_path)
    made = dataclasses.replace(recipe_of(tiny, tmp_path / "run"), model=Model(name=str(home)))
    run(made, Watcher())
    assert {path.name for path in tmp_path.iterdir()} == {"model", "run"}


TOKEN = "hf_" + "Ab1" * 8


@fault(64, "E")
@pytest.mark.parametrize(
    "text",
    [f"model: {{name: {TOKEN}}}", "data: {source: 'https://me:pass@example.org/data.csv'}"],
)
def test_a_recipe_with_a_secret_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(FedpeftError, match="looks like a secret.*set HF_TOKEN") as caught:
        parse_recipe(text, "here")
    assert TOKEN not in str(caught.value) and "pass@" not in str(caught.value)
    override = text.removeprefix("model: {name: ").removesuffix("}")
    if override == TOKEN:
        with pytest.raises(FedpeftError) as caught:
            parse_recipe("", "here", [f"model.name={TOKEN}"])
        assert TOKEN not in str(caught.value)


@fault(64, "E")
def test_errors_and_logs_repeat_no_secret() -> None:
    text = f"401 for https://me:pass@hub/x?token={TOKEN} with HF_TOKEN={TOKEN}, password=abc"
    assert without_secrets(text) == "401 for https://[secret]@hub/x?[secret] with [secret] [secret]"
    plain = "tokenizer: secret aggregation of 7 tokens"
    assert without_secrets(plain) == plain
