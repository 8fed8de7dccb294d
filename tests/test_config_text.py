"""Recipes as text: overrides, YAML, files, built-in names, paths, and the dump that loads back."""

from __future__ import annotations

import dataclasses
from math import inf
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fedpeft import config_load
from fedpeft.config import Data, Model, Recipe
from fedpeft.config_load import builtin_recipes, dump_recipe, load_recipe, parse_recipe
from fedpeft.errors import FedpeftError


def parse(text: str, *overrides: str) -> Recipe:
    return parse_recipe(text, "r.yaml", overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(FedpeftError) as caught:
        parse(text, *overrides)
    return str(caught.value)


# Overrides


SYNTAX = ["seed", "=3", "local..lr=3", ".seed=1", "seed.=1", "baselines[0]=local", "a b=1", ""]


@pytest.mark.parametrize("override", SYNTAX)
def test_an_override_that_is_not_key_value_is_refused(override: str) -> None:
    message = refusal("", override)
    assert f"override {override!r} must be KEY=VALUE with a dotted key, e.g. local.lr" in message


def test_other_wrong_overrides() -> None:
    assert "has no value; write local.lr=null for none" in refusal("", "local.lr=")
    assert "override 'baselines=[local': not valid YAML: " in refusal("", "baselines=[local")
    assert "override 'local=3': local=3 must be a section" in refusal("", "local=3", "local.lr=1")
    assert "output.folder: '${...}'" in refusal("", "output.folder=${")
    assert "override 'local=3': local=3 must be a section" in refusal("", "local.lr=1", "local=3")
    assert "override 'seed.x=1': seed: Value '{'x': 1}'" in refusal("", "seed.x=1")
    assert "override 'local.lr=x': local.lr: " in refusal("local: {lr: 1}", "local.lr=x")
    assert "override 'local={lr: x}': local.lr: " in refusal("", "seed=1", "local={lr: x}")
    assert "r.yaml: local.lr: " in refusal("local: {lr: x}", "local.steps=1")


TEXT = ["1e5", "0123", "no", "a: b", "a=b", "x #1", "[a", "@x", "nul", "runs/ä b", "*x", "- a"]


@pytest.mark.parametrize("value", TEXT)
def test_text_in_an_override_is_taken_as_it_stands(value: str) -> None:
    recipe = parse("", f"output.folder={value}", f"model.revision={value}")
    assert (recipe.output.folder, recipe.model.revision) == (value, value)
    assert parse(dump_recipe(recipe)) == recipe


def test_quotes_and_null_in_an_override_are_yaml() -> None:
    assert parse("", "model.revision='null'").model.revision == "null"
    assert parse("", 'name="a\\tb"').name == "a\tb"
    assert parse("model: {revision: x}", "model.revision=null").model.revision is None
    assert "name=None must be text" in refusal("", "name=null")


# YAML


BROKEN = {
    "seed: 1\nlocal:\n  lr: 1\n  lr: 2\n": "r.yaml, line 4: not valid YAML: found duplicate key lr",
    "seed: 1\nseed: 2\n": "r.yaml, line 2: not valid YAML: found duplicate key seed",
    "seed: 1\nlocal:\n\tlr: 1\n": "r.yaml, line 3: not valid YAML: ",
    "seed: 1\nname: [a\n": "r.yaml, line 3: not valid YAML: ",
    "name: a: b\n": "r.yaml, line 1: not valid YAML: mapping values are not allowed",
    "seed: 1\n---\nseed: 2\n": "r.yaml, line 2: not valid YAML: ",
    "name: &a [*a]\n": "r.yaml, line 1: not valid YAML: YAML recursive aliases",
    "name: !!python/object/apply:os.system [exit]\n": "r.yaml, line 1: not valid YAML: could no",
    "name: \x01": "r.yaml: not a recipe: unacceptable character",
    "- seed\n": "r.yaml: a recipe is a mapping of keys to values, not a list",
    "5": "r.yaml: not a recipe: ",
    "null: 1": "r.yaml: not a recipe: ",
}


@pytest.mark.parametrize("text", BROKEN)
def test_broken_yaml_is_refused_with_its_line(text: str) -> None:
    assert BROKEN[text] in refusal(text)


INTERPOLATIONS = {
    "name: ${oc.env:HOME}": "name",
    "name: a${seed}b": "name",
    "name: ${": "name",
    "name: ???": "name",
    "seed: ${rounds.count}": "seed",
    'adapter: {kind: lora, x: ["a", {y: "${oc.env:HOME}"}]}': "adapter.x[1].y",
    "strategy: ${adapter}": "strategy",
    "local: ${oc.create:{lr:1}}": "local",
}


@pytest.mark.parametrize("text", INTERPOLATIONS)
def test_interpolations_are_refused_and_read_no_environment(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "of-a-person")
    message = refusal(text)
    assert message.startswith(f"r.yaml: {INTERPOLATIONS[text]}: ")
    assert "not allowed in a recipe" in message and "of-a-person" not in message
    key, _, value = text.partition(": ")
    if value[0] == "$" and key in ("name", "seed"):
        assert "not allowed in a recipe" in refusal("", f"{key}={value}")


def test_a_dollar_in_a_comment_is_no_interpolation() -> None:
    assert parse("seed: 1  # was ${SEED}\n").seed == 1


# Dump


NASTY = [
    "1e-4",
    "0x10",
    "no",
    "null",
    "~",
    "",
    " a ",
    "a: b",
    "#a",
    "a #b",
    "1:30",
    "=",
    "<<",
    "- a",
]
NASTY += [
    "2020-01-01",
    "'",
    '"',
    "a\nb",
    "ä😀",
    "\x85",
    "%",
    "@",
    "[a]",
    "{a: b}",
    "!x",
    "&x",
    "*x",
    "?",
]
NASTY += ["1_0", ".5", ".inf", "NaN", "true", "a" * 500, "\\", "a\tb", "|", ">", "---", "+1", "1."]


def test_a_dumped_recipe_loads_back_equal() -> None:
    numbers = [1, 1.0, 1e-5, 1e22, -0.0, 2**70, None, True, inf]
    settings = {"kind": "lora", "x": [numbers, NASTY], **{text: {text: [text]} for text in NASTY}}
    recipe = Recipe(model=Model(revision="1e-4"), adapter=settings, baselines=(), seed=2**70)
    again = parse(dump_recipe(recipe))
    assert again == recipe
    assert repr(again) == repr(recipe)  # 1 is not True, 1.0 is not 1


def test_the_dump_is_complete_and_does_not_gain_defaults() -> None:
    recipe = Recipe(adapter={"kind": "lora"}, strategy={"name": "fedprox"})
    text = dump_recipe(recipe)
    assert parse(text) == recipe
    written = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(written, dict)
    as_read = {
        "baselines": (*written["baselines"],),
        "attack": {**written["attack"], "trigger": ()},
        "comms": {
            **written["comms"],
            **{way: {**written["comms"][way], "densities": ()} for way in ("up", "down")},
        },
    }
    assert {**written, **as_read} == dataclasses.asdict(recipe)


# Files, built-in names, paths


def test_a_file_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("name: ä\n", encoding="utf-8")
    assert load_recipe(str(tmp_path / "my.yaml"), ["seed=2"]) == Recipe(name="ä", seed=2)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe4\n")
    with pytest.raises(FedpeftError, match=r"latin\.yaml cannot be read: .*utf-8"):
        load_recipe(str(tmp_path / "latin.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(FedpeftError, match=r"folder\.yaml cannot be read: .*[Dd]irectory"):
        load_recipe(str(tmp_path / "folder.yaml"))


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two built-in recipes, in place of those that fedpeft ships; works in an empty folder."""
    (tmp_path / "package" / "recipes").mkdir(parents=True)
    for name in ("quick", "slow"):
        (tmp_path / "package" / "recipes" / f"{name}.yaml").write_text(f"name: {name}\n")
    (tmp_path / "package" / "recipes" / "README.md").write_text("")
    monkeypatch.setattr(config_load.resources, "files", lambda package: tmp_path / package)
    (tmp_path / "package").rename(tmp_path / "fedpeft")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_a_plain_name_is_a_built_in_recipe(shipped: Path) -> None:
    assert builtin_recipes() == ["quick", "slow"]
    assert load_recipe("quick", ["seed=1"]) == Recipe(name="quick", seed=1)
    with pytest.raises(FedpeftError, match=r"'quik' does not exist\. Did you mean 'quick'\? Known"):
        load_recipe("quik")
    with pytest.raises(
        FedpeftError, match=r"quik\.yaml does not exist\. Built-in recipes: quick, s"
    ):
        load_recipe("quik.yaml")
    with pytest.raises(FedpeftError, match=r"\./quick does not exist"):
        load_recipe("./quick")


def test_a_file_never_stands_in_for_a_built_in_name_silently(shipped: Path) -> None:
    (shipped / "mine").write_text("name: mine\n")
    (shipped / "quick").write_text("name: not the built-in\n")
    assert load_recipe("quick").name == "quick"
    assert load_recipe("./quick").name == "not the built-in"
    with pytest.raises(FedpeftError, match=r"To load the file of that name, write \./mine"):
        load_recipe("mine")


def test_every_recipe_that_ships_loads() -> None:
    names = builtin_recipes()
    assert names
    for name in names:
        assert load_recipe(name) == parse(dump_recipe(load_recipe(name)))


def test_paths_in_a_recipe_start_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for name in ("data", "pydocs", "recipes/imdb"):
        (tmp_path / name).mkdir()
    (tmp_path / "m").write_text("")
    path = tmp_path / "recipes" / "r.yaml"

    path.write_text("data: {source: ../data}\nmodel: {name: ../m}\n")
    recipe = load_recipe("recipes/r.yaml")
    assert recipe.data.source == str((tmp_path / "data").resolve())
    assert recipe.model.name == str((tmp_path / "m").resolve())

    path.write_text("data: {source: imdb}\nmodel: {name: bert/base}\n")
    recipe = load_recipe(str(path))
    assert recipe.data.source == str((tmp_path / "recipes" / "imdb").resolve())
    assert recipe.model.name == "bert/base"  # nothing lies there: a name on the hub

    recipe = load_recipe(str(path), ["data.source=data", "model.name=imdb"])
    assert recipe.data.source == str((tmp_path / "data").resolve())
    assert recipe.model.name == "imdb"  # overrides start from the working folder

    path.write_text("data: {source: ~/data}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe(str(path)).data.source == str((tmp_path / "data").resolve())


def test_built_in_data_and_models_are_never_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (Data().source, Model().name):
        (tmp_path / name).mkdir()
    (tmp_path / "r.yaml").write_text(f"data: {{source: {Data().source}}}\n")
    recipe = load_recipe("r.yaml", [f"model.name={Model().name}"])
    assert recipe == Recipe()


def test_a_parsed_text_without_a_folder_keeps_its_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert parse("data: {source: data}").data.source == "data"
    assert refusal("data: {source: ''}") == "data.source='' must be not empty."
