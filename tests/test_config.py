"""Recipes: three layers into one checked Recipe; every mistake is named with its key and way out."""

from __future__ import annotations

import dataclasses
import difflib
from math import inf, nan
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from fedpeft import config_load
from fedpeft.config import Data, Engine, Model, Recipe
from fedpeft.config_load import (
    builtin_recipes,
    check,
    dump_recipe,
    load_recipe,
    load_strategy,
    parse_recipe,
)
from fedpeft.errors import FedpeftError


def parse(text: str, *overrides: str) -> Recipe:
    return parse_recipe(text, "r.yaml", overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(FedpeftError) as caught:
        parse(text, *overrides)
    return str(caught.value)


def sections(kind: Any = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every key of the schema with its type."""
    found: dict[str, Any] = {}
    for key, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found |= sections(hint, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = hint
    return found


def nested(key: str, value: str) -> str:
    """A YAML flow mapping that sets one dotted key."""
    parts = key.split(".")
    return "".join(f"{{{part}: " for part in parts) + value + "}" * len(parts)


# Layers


def test_an_empty_recipe_is_the_defaults() -> None:
    assert parse("") == parse("# nothing\n") == parse("{}") == Recipe()


def test_file_and_overrides_merge_key_by_key() -> None:
    text = "seed: 3\nrounds: {count: 7, sampling: {kind: fixed, size: 4}}\nbaselines: [local]\n"
    recipe = parse(text, "rounds.sampling.size=2", "local.lr=1e-2", "seed=4", "seed=5")
    assert recipe.rounds.count == 7
    assert (recipe.rounds.sampling.kind, recipe.rounds.sampling.size) == ("fixed", 2)
    assert recipe.rounds.quorum == Recipe().rounds.quorum
    assert (recipe.seed, recipe.local.lr) == (5, 0.01)
    assert recipe.baselines == ("local",)
    assert parse(text, "baselines=[untrained,centralised]").baselines == (
        "untrained",
        "centralised",
    )
    assert parse(text, "rounds={count: 2}").rounds.sampling.size == 4
    assert dataclasses.is_dataclass(recipe) and recipe == parse(dump_recipe(recipe))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1  # type: ignore[misc]


KINDS: list[tuple[str, tuple[str, ...], dict[str, object]]] = [
    ("", (), {"kind": "lora", "r": 8}),
    ("", ("adapter.r=4",), {"kind": "lora", "r": 4}),
    ("", ("adapter.kind=ia3",), {"kind": "ia3"}),
    ("adapter: {kind: ia3}", (), {"kind": "ia3"}),
    ("adapter: {kind: lora}", (), {"kind": "lora"}),
    ("adapter: {r: 2}", (), {"kind": "lora", "r": 2}),
    ("adapter: {kind: lora, x: 1}", ("adapter.r=4",), {"kind": "lora", "x": 1, "r": 4}),
    ("adapter: {kind: lora, x: 1}", ("adapter.kind=lora",), {"kind": "lora", "x": 1}),
    ("adapter: {kind: lora, x: 1}", ("adapter.kind=ia3",), {"kind": "ia3"}),
    ("adapter: {kind: lora}", ("adapter.y=[a]", "adapter.kind=ia3"), {"kind": "ia3", "y": ["a"]}),
    (
        "adapter: {kind: lora, x: {a: 1}}",
        ("adapter.x.b=2",),
        {"kind": "lora", "x": {"a": 1, "b": 2}},
    ),
]


@pytest.mark.parametrize(("text", "overrides", "expected"), KINDS)
def test_another_kind_starts_its_settings_afresh(
    text: str, overrides: tuple[str, ...], expected: dict[str, object]
) -> None:
    assert parse(text, *overrides).adapter == expected


def test_another_strategy_drops_the_settings_of_the_first() -> None:
    text = "strategy: {name: fedprox, mu: 0.5}"
    assert parse(text, "strategy.mu=0.25").strategy == {"name": "fedprox", "mu": 0.25}
    assert parse(text, "strategy.name=fedavg").strategy == {"name": "fedavg"}
    assert type(load_strategy(parse(text))).__name__ == "FedProx"
    assert load_strategy(parse(text)).mu == 0.5  # type: ignore[attr-defined]


# Unknown keys and options


def mistyped(key: str) -> str:
    """A plausible typo in the last part of a key: its middle letter is gone or doubled."""
    head, dot, last = key.rpartition(".")
    middle = len(last) // 2
    typo = (
        last[:middle] + (last[middle] if len(last) < 4 else "") + last[middle + (len(last) > 3) :]
    )
    typo = typo if len(last) > 3 else last[:middle] + 2 * last[middle] + last[middle + 1 :]
    return f"{head}{dot}{typo}"


@pytest.mark.parametrize("key", sections())
def test_every_mistyped_key_is_refused_with_its_path_and_the_near_name(key: str) -> None:
    typo, (section, _, last) = mistyped(key), key.rpartition(".")
    kind: Any = Recipe
    for part in filter(None, section.split(".")):
        kind = get_type_hints(kind)[part]
    siblings = get_type_hints(kind)
    for text, overrides in ((nested(typo, "1"), ()), ("", (f"{typo}=1",))):
        message = refusal(text, *overrides)
        near = difflib.get_close_matches(typo.rpartition(".")[2], sorted(siblings), 1)[0]
        assert near == last or key == "data.test"  # its typo, tet, is as near to text
        assert f"unknown key {typo!r}. Did you mean {near!r}?" in message
        assert "override" in message if overrides else message.startswith("r.yaml: ")


TYPOS = {
    "local: {batchsize: 8}": "unknown key 'local.batchsize'. Did you mean 'batch_size'?",
    "local: {learning_rate: 1}": "unknown key 'local.learning_rate'. Known: accumulate, base_drop",
    "rounds: {sampling: {fracton: 1}}": "unknown key 'rounds.sampling.fracton'. Did you mean 'frac",
    "modle: {name: x}": "unknown key 'modle'. Did you mean 'model'?",
    "lr: 1": "unknown key 'lr'. Did you mean 'local.lr'?",
    "rounds: {rate: 1}": "unknown key 'rounds.rate'. Did you mean 'rounds.sampling.rate'?",
    "local.lr: 1": "unknown key 'local.lr'. Nest it: {local: {lr: ...}}.",
    "1: 2": "unknown key '1'. Known: adapter, baselines",
    "hello": "unknown key 'hello'",
    "strategy: {name: fedprox, spce: 1}": "strategy.spce=1: fedprox has no such setting. Did you ",
    "strategy: {name: fedvag}": "strategy.name='fedvag' does not exist. Did you mean 'fedavg'?",
}


@pytest.mark.parametrize("text", TYPOS)
def test_misplaced_and_unknown_keys_are_explained(text: str) -> None:
    assert TYPOS[text] in refusal(text)


OPTIONS = {
    key: hint.__args__ for key, hint in sections().items() if str(hint).startswith("typing.Literal")
}


@pytest.mark.parametrize("key", OPTIONS)
def test_every_option_is_taken_and_a_mistyped_one_refused(key: str) -> None:
    for option in OPTIONS[key]:
        if key != "partition.kind" or option != "natural":
            parse("", f"{key}={option}")
        typo = option + "x"
        assert typo not in OPTIONS[key]
        message = refusal(nested(key, typo))
        near = difflib.get_close_matches(typo, sorted(OPTIONS[key]), 1)
        assert f"r.yaml: {key}={typo!r} is not an option. Did you mean {near[0]!r}?" in message
        assert all(other in message for other in OPTIONS[key])


def test_the_options_are_found() -> None:
    assert len(OPTIONS) == 9 and OPTIONS["engine.kind"] == ("cohort", "sequential", "flower")


# Values


VALUES = {
    "baselines: [locale]": "baselines='locale' is not an option. Did you mean 'local'?",
    "baselines: local": "baselines='local' must be a list, e.g. [local]",
    "strategy: fedprox": "strategy='fedprox' must be a mapping; write strategy.name=",
    "adapter: lora": "adapter='lora' must be a mapping; write adapter.kind=lora",
    "adapter: null": "adapter=None must be a mapping",
    "adapter: {kind: 3}": "adapter.kind=3 must be a name",
    "strategy: {name: }": "strategy.name=None must be a name, e.g. strategy.name=fedavg",
    "local: 3": "local=3 must be a section with keys optimizer, lr",
    "engine:": "engine=None must be a section with keys kind",
    "local: {lr: fast}": "local.lr: Value 'fast' of type 'str' could not be converted to Float",
    "local: {lr: true}": "local.lr: Value 'True' of type 'bool' could not be converted to Float",
    "local: {lr: }": "local.lr: Incompatible value 'None'",
    "local: {epochs: 1.5}": "local.epochs: Value '1.5' of type 'float' could not be converted to Int",
    "seed: [1]": "seed: ",
    "evaluation: {clients: maybe}": "evaluation.clients: Value 'maybe' is not a valid bool",
    "data: {text: no}": "data.text=False must be text; put it in quotes",
    "model: {revision: 1e5}": "model.revision=100000.0 must be text; put it in quotes",
    "model: {name: null}": "model.name=None must be text",
    "name: !!binary aGk=": "name is a bytes; a recipe holds text, numbers",
    "adapter: {x: !!python/object/apply:pathlib.Path [x]}": "adapter.x is a PosixPath",
    "adapter: {x: !!set {a}}": "not a recipe: Value 'set' is not a supported primitive type",
}


@pytest.mark.parametrize("text", VALUES)
def test_values_of_the_wrong_type_are_refused_by_key(text: str) -> None:
    message = refusal(text)
    assert message.startswith("r.yaml") or "must be a name" in message
    assert VALUES[text] in message


RANGES: dict[str, tuple[list[object], list[object]]] = {
    "at least 0": ([0, 1], [-1]),
    "at least 1": ([1, 2], [0, -1]),
    "above 0 and finite": ([1e-9, 1e9], [0.0, -1.0, inf, nan]),
    "at least 0 and finite": ([0.0, 1e9], [-1e-9, inf, nan]),
    "at least 0 and below 1": ([0.0, 0.999], [-0.1, 1.0, nan, -inf]),
    "above 0 and at most 1": ([1e-9, 1.0], [0.0, 1.001, nan]),
    "at least 0 and at most 1": ([0.0, 1.0], [-0.1, 1.1, nan]),
    "not empty": (["x"], ["", " "]),
}
BOUNDS = {
    "at least 0": "seed data.limit local.steps evaluation.local_test engine.chunk engine.threads "
    "engine.workers",
    "at least 1": "data.max_length partition.classes partition.shards partition.min_examples "
    "rounds.count rounds.sampling.size local.batch_size local.accumulate evaluation.every "
    "output.checkpoint_every output.keep",
    "above 0 and finite": "local.lr partition.alpha",
    "at least 0 and finite": "local.weight_decay local.clip_norm",
    "at least 0 and below 1": "data.holdout rounds.failure_rate local.momentum local.warmup",
    "above 0 and at most 1": "rounds.sampling.fraction rounds.sampling.rate",
    "at least 0 and at most 1": "rounds.quorum",
    "not empty": "name model.name data.source data.train data.text data.label output.folder",
}
BOUND = [(key, rule) for rule, keys in BOUNDS.items() for key in keys.split()]


def replaced(recipe: Any, key: str, value: object) -> Any:
    """The recipe with another value at a dotted key."""
    first, _, rest = key.partition(".")
    below = replaced(getattr(recipe, first), rest, value) if rest else value
    return dataclasses.replace(recipe, **{first: below})


@pytest.mark.parametrize(("key", "rule"), BOUND)
def test_values_out_of_range_are_refused_by_key_value_and_rule(key: str, rule: str) -> None:
    good, bad = RANGES[rule]
    for value in good:
        check(replaced(Recipe(), key, value))
    for value in bad:
        with pytest.raises(FedpeftError) as caught:
            check(replaced(Recipe(), key, value))
        assert str(caught.value) == f"{key}={value!r} must be {rule}."


def test_values_of_files_and_overrides_are_checked() -> None:
    assert refusal("local: {lr: .nan}") == "local.lr=nan must be above 0 and finite."
    assert refusal("", "rounds.quorum=1.5") == "rounds.quorum=1.5 must be at least 0 and at most 1."


def test_every_number_of_the_schema_has_a_range() -> None:
    numbers = {key for key, hint in sections().items() if hint in (int, float)}
    assert len(numbers) > 25
    assert numbers == {k for k, rule in BOUND if rule != "not empty"} | {
        "local.epochs",
        "partition.clients",
    }


def test_rules_over_several_keys() -> None:
    assert "local.epochs=0 needs local.steps to be at least 1" in refusal("", "local.epochs=0")
    assert "local.epochs=-1 must be at least 0" in refusal("", "local.epochs=-1")
    assert parse("", "local.epochs=0", "local.steps=3").local.steps == 3
    assert "partition.clients=0 must be at least 1; only" in refusal("", "partition.clients=0")
    assert "partition.clients=-1 must be at least 0" in refusal("", "partition.clients=-1")
    assert parse("", "partition.clients=0", "partition.kind=natural").partition.clients == 0


def test_devices() -> None:
    for device in ("auto", "cpu", "cuda", "cuda:0", "cuda:11"):
        check(Recipe(engine=Engine(device=device)))
    for device in ("gpu", "cuda:", "cuda:x", "cpu:0", "cuda0", ""):
        with pytest.raises(FedpeftError, match=f"engine.device={device!r} must be auto, cpu, cuda"):
            check(Recipe(engine=Engine(device=device)))


def test_a_recipe_made_in_python_is_checked_alike() -> None:
    check(Recipe())
    with pytest.raises(FedpeftError, match=r"engine\.chunk=-2 must be at least 0"):
        check(Recipe(engine=Engine(chunk=-2)))
    with pytest.raises(FedpeftError, match=r"strategy\.name=None must be a name"):
        check(Recipe(strategy={}))


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
    "name: !!python/object/apply:os.system [exit]\n": "r.yaml, line 1: not valid YAML: could not det",
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
    assert all(key.rpartition(".")[2] + ":" in text for key in sections())


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
