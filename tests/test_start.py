"""Adapter folders from elsewhere: each fault is an error that names folder, file and field."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from fedpeft.errors import FedpeftError
from fedpeft.manifest import MANIFEST, seal, verify
from fedpeft.model import Network, adapter_config, attach, build_network, save_adapter
from tests.tiny import CLASSES, LORA, tiny_model, tiny_network

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    net = tiny_network(LORA)
    values = {name: value + 0.5 for name, value in net.initial.items()}
    save_adapter(net, values, tmp_path / "adapter", "base")
    return tmp_path / "adapter"


def begin(folder: Path, **changed: Any) -> Network:
    base = tiny_model().eval().requires_grad_(False)
    model = attach(base, {**LORA, **changed}, "classification", 0)
    return build_network(model, "classification", CLASSES, torch.device("cpu"), str(folder))


def test_what_was_saved_is_where_training_goes_on(folder: Path) -> None:
    initial = tiny_network(LORA).initial
    assert all(torch.equal(v, initial[n] + 0.5) for n, v in begin(folder).initial.items())
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert set(listed) == {p.name for p in folder.iterdir()} - {MANIFEST}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21
def test_plain_peft_loads_a_sealed_folder_and_we_one_of_peft(folder: Path, tmp_path: Path) -> None:
    loaded = peft.PeftModel.from_pretrained(tiny_model(), str(folder))
    (tmp_path / "theirs").mkdir()
    loaded.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    assert not (tmp_path / "theirs" / MANIFEST).exists()
    ours = begin(folder).initial
    assert all(torch.equal(v, ours[n]) for n, v in begin(tmp_path / "theirs").initial.items())


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def relink(path: Path) -> None:
    outside = path.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


SEALED: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (lambda f: flip(f / WEIGHTS, -5), "safetensors' was changed: its SHA-256"),
    "flipped note": (lambda f: flip(f / "fedpeft.json", 3), "'fedpeft.json' was changed"),
    "truncated": (lambda f: os.truncate(f / WEIGHTS, 90), "safetensors' has 90 bytes, not"),
    "extra file": (lambda f: (f / "adapter_model.bin").touch(), "'adapter_model.bin' is not in"),
    "newline": (lambda f: (f / "a\nb").touch(), "'a\\nb' is not in fedpeft-manifest.json"),
    "folder": (lambda f: (f / "sub").mkdir(), "'sub' is not in fedpeft-manifest.json"),
    "missing file": (lambda f: (f / WEIGHTS).unlink(), "safetensors' is missing"),
    "link": (lambda f: relink(f / WEIGHTS), "safetensors' is a link"),
    "linked manifest": (lambda f: relink(f / MANIFEST), "'fedpeft-manifest.json' is a link"),
    "no manifest": (lambda f: (f / MANIFEST).write_text("{"), "'fedpeft-manifest.json' is no JSON"),
    "deep": (lambda f: (f / MANIFEST).write_text("[" * 9**6), "'fedpeft-manifest.json' is no JSON"),
    "version": (lambda f: (f / MANIFEST).write_text('{"version": 9}'), "has version 9"),
}


@pytest.mark.parametrize("fault", SEALED)
def test_a_sealed_folder_is_as_it_was_sealed(fault: str, folder: Path) -> None:
    spoil, why = SEALED[fault]
    spoil(folder)
    with pytest.raises(FedpeftError) as caught:
        begin(folder)
    assert why in str(caught.value) and "adapter.start=" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/b", "a\nb", "", ".hidden", "x" * 200]
)
def test_names_in_a_manifest_are_plain(name: str, folder: Path) -> None:
    listed = json.loads((folder / MANIFEST).read_text())
    listed["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (folder / MANIFEST).write_text(json.dumps(listed))
    with pytest.raises(FedpeftError, match="must be a plain file name"):
        begin(folder)


def config(**changed: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        found = json.loads((folder / CONFIG).read_text()) | changed
        (folder / CONFIG).write_text(json.dumps(found))

    return spoil


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return spoil


def first(found: dict[str, torch.Tensor], make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    name = sorted(found)[0]
    found[name] = make(found[name]).contiguous()


def nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[-1] = float("nan")
    return tensor


EVIL = "^(([a-z_.0-9])+)+$X"
STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "alpha": (config(lora_alpha=9999), f"{CONFIG}: lora_alpha is 9999"),
    "rank": (config(r=4), f"{CONFIG}: r is 4"),
    "huge rank": (config(r=10**7), f"{CONFIG}: r is 10000000"),
    "regex": (config(target_modules=EVIL), f"{CONFIG}: target_modules is"),
    "pattern": (config(rank_pattern={EVIL: 9}), f"{CONFIG}: rank_pattern is"),
    "unknown field": (config(use_magic=True), f"{CONFIG}: 'use_magic' is a field that this peft"),
    "unknown type": (config(peft_type="NEW"), f"{CONFIG}: peft_type is 'NEW'"),
    "foreign module": (config(auto_mapping={"parent_library": "os"}), "auto_mapping is"),
    "no type": (lambda f: (f / CONFIG).write_text("{}"), f"{CONFIG}: peft_type is None"),
    "no json": (lambda f: (f / CONFIG).write_text("{"), f"'{CONFIG}' is no JSON"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), f"'{CONFIG}' must be a JSON object"),
    "huge json": (lambda f: (f / CONFIG).write_text(" " * 5 * 2**20), "at most 4194304 are read"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "it is no safetensors file"),
    "header": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 8), "it is no safetensors file"),
    "cut": (lambda f: os.truncate(f / WEIGHTS, 900), "it is no safetensors file"),
    "huge file": (lambda f: os.truncate(f / WEIGHTS, 10**8), f"'{WEIGHTS}' has 100000000 bytes"),
    "pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), f"'{WEIGHTS}' is missing"),
    "pipe": (lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)), "is no regular file"),
    "link": (lambda f: relink(f / WEIGHTS), f"'{WEIGHTS}' is a link"),
    "nan": (weights(lambda w: first(w, nan)), "holds NaN or Inf"),
    "float64": (weights(lambda w: first(w, torch.Tensor.double)), "is of torch.float64"),
    "int8": (weights(lambda w: first(w, lambda t: t.to(torch.int8))), "is of torch.int8"),
    "shape": (weights(lambda w: first(w, lambda t: t[:1])), "has shape"),
    "extra": (weights(lambda w: w.update(more=torch.zeros(1))), "do not have: ['more']"),
    "half": (weights(lambda w: [w.pop(n) for n in sorted(w)[::2]]), "tensors are missing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", STRANGE)
def test_a_folder_of_anybody_elses_is_checked_field_by_field(fault: str, folder: Path) -> None:
    (folder / MANIFEST).unlink()
    spoil, why = STRANGE[fault]
    spoil(folder)
    with pytest.raises(FedpeftError) as caught:
        begin(folder)
    assert why in str(caught.value) and "adapter.start=" in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"target_modules": EVIL}, "adapter.target_modules: .*regular expressions"),
        ({"target_modules": ["query", EVIL]}, "adapter.target_modules: .*regular expressions"),
        ({"exclude_modules": ".*"}, "adapter.exclude_modules: .*regular expressions"),
        ({"modules_to_save": ["a|b"]}, "adapter.modules_to_save: .*regular expressions"),
        ({"rank_pattern": {EVIL: 4}}, "adapter.rank_pattern: .*regular expressions"),
        ({"alpha_pattern": {"^x": 4}}, "adapter.alpha_pattern: .*regular expressions"),
        ({"layers_pattern": ["(a+)+"]}, "adapter.layers_pattern: .*regular expressions"),
        ({"r": 10**7}, "adapter.r=10000000 must be at most"),
        ({"rank_pattern": {"query": 10**7}}, "adapter.rank_pattern=10000000 must be at most"),
        ({"megatron_config": {}, "megatron_core": "os"}, "adapter.megatron_config.*import"),
        ({"auto_mapping": {"parent_library": "os"}}, "adapter.auto_mapping.*import"),
    ],
)
def test_a_recipe_asks_for_no_regular_expression_and_no_import(
    changed: dict[str, Any], why: str
) -> None:
    with pytest.raises(FedpeftError, match=why):
        adapter_config({**LORA, **changed}, "classification")


@pytest.mark.parametrize("name", ["../evil", "/abs/x", "a/b", "a\nb", "", "a.b"])
def test_names_of_experts_make_no_paths(name: str) -> None:
    with pytest.raises(FedpeftError, match="a name is 1 to 64 letters"):
        adapter_config({"kind": "xlora", "adapters": {name: "x"}}, "classification")


def test_an_experts_own_configuration_is_checked(folder: Path) -> None:
    settings = {"kind": "xlora", "hidden_size": 16, "adapters": {"one": str(folder)}}
    adapter_config(settings, "classification")
    config(target_modules=EVIL)(folder)
    with pytest.raises(FedpeftError, match="adapter.adapters.one.*bytes, not"):
        adapter_config(settings, "classification")
    (folder / MANIFEST).unlink()
    with pytest.raises(FedpeftError, match="adapter.adapters.one.target_modules.*regular"):
        adapter_config(settings, "classification")


def test_names_of_modules_and_all_linear_are_taken() -> None:
    for names in (["query", "layer.0.attention"], "all-linear", "query"):
        adapter_config({**LORA, "target_modules": names}, "classification")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from([CONFIG, WEIGHTS, MANIFEST, "fedpeft.json"]), st.data())
def test_any_spoilt_file_is_refused_or_was_not_spoilt(
    folder: Path, name: str, data: st.DataObject
) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    good = before[name]
    at = data.draw(st.integers(0, len(good)))
    new = good[:at] + data.draw(st.binary(max_size=9)) + good[at + data.draw(st.integers(0, 9)) :]
    try:
        (folder / name).write_bytes(new)
        try:
            verify(folder, "folder")
            assert new == good or name == MANIFEST
        except FedpeftError:
            assert new != good
    finally:
        (folder / name).write_bytes(good)


def test_a_sealed_folder_says_what_is_in_it_now(folder: Path) -> None:
    (folder / "more").write_bytes(save({"x": torch.zeros(1)}))
    seal(folder)
    assert verify(folder, "folder")
    (folder / MANIFEST).unlink()
    assert not verify(folder, "folder")
