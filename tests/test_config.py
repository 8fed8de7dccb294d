"""Recipes: three layers into one checked Recipe; every mistake is named, with its way out."""

from __future__ import annotations

import dataclasses
import difflib
from math import inf, nan
from typing import Any, get_type_hints

import pytest

from fedpeft.config import Engine, Local, Recipe
from fedpeft.config_load import (
    check,
    dump_recipe,
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
    "1: 2": "unknown key '1'. Known: adapter, attack, baselines",
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


NEEDED = {
    "local.clip_per=example": ["local.clip_norm=1.0"],
    "privacy.unit=record": ["privacy.epsilon=1"],
    "privacy.unit=client": ["privacy.epsilon=1", "rounds.weighting=equal"],
    "robust.space=product": ["robust.rule=krum"],
    "attack.kind=backdoor": ["attack.trigger=[5]"],
    **{
        f"{key}={option}": ["fleet.preset=jetson80"]
        for key, hint in sections().items()
        if key.startswith("fleet.") and str(hint).startswith("typing.Literal")
        for option in hint.__args__
        if key != "fleet.preset"
    },
    "fleet.policy=deadline": ["fleet.preset=jetson80", "fleet.deadline=9"],
    **{
        f"comms.{way}.{setting}": [f"comms.{way}.codec={codec}"]
        for way in ("up", "down")
        for codec, settings in {
            "dense": [f"values={name}" for name in ("fp16", "bf16", "int8", "int4", "qsgd")],
            "topk": [
                *(f"positions={name}" for name in ("bitmask", "golomb", "coo", "varint")),
                "scope=tensor",
                "form=weights",
                "feedback=always",
                "feedback=never",
            ],
        }.items()
        for setting in settings
    },
}
"""What an option does not go without."""

ALONE = (
    "partition.kind=natural",
    *("comms.up.form=weights", "comms.down.feedback=always", "comms.down.feedback=never"),
)
"""Options that the quickstart's data, or the direction, refuse."""


@pytest.mark.parametrize("key", OPTIONS)
def test_every_option_is_taken_and_a_mistyped_one_refused(key: str) -> None:
    for option in OPTIONS[key]:
        if f"{key}={option}" not in ALONE:
            parse("", f"{key}={option}", *NEEDED.get(f"{key}={option}", ()))
        typo = option + "x"
        assert typo not in OPTIONS[key]
        message = refusal(nested(key, typo))
        near = difflib.get_close_matches(typo, sorted(OPTIONS[key]), 1)
        assert f"r.yaml: {key}={typo!r} is not an option. Did you mean {near[0]!r}?" in message
        assert all(other in message for other in OPTIONS[key])


def test_the_options_are_found() -> None:
    assert len(OPTIONS) == 38 and OPTIONS["engine.kind"] == ("cohort", "sequential", "flower")


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
    "local: {epochs: 1.5}": "local.epochs: Value '1.5' of type 'float' could not be conv",
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
    "above 0 and below 1": ([1e-9, 0.999], [0.0, 1.0, nan]),
    "not empty": (["x"], ["", " "]),
}
BOUNDS = {
    "at least 0": "seed data.limit local.steps evaluation.most evaluation.sample "
    "evaluation.local_test engine.chunk engine.threads engine.workers privacy.max_rounds "
    "rounds.aborts",
    "at least 1": "data.max_length partition.classes partition.shards partition.min_examples "
    "rounds.count rounds.sampling.size rounds.sampling.groups local.batch_size local.accumulate "
    "evaluation.every output.checkpoint_every output.keep",
    "above 0 and finite": "local.lr partition.alpha privacy.clip_norm privacy.clip_rate "
    "secure_aggregation.clip_norm",
    "at least 0 and finite": "local.weight_decay local.clip_norm rounds.reject_norm",
    "above 0 and below 1": "privacy.delta privacy.quantile",
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
    apart = {"robust", "attack", "comms", "fleet"}  # have checks of their own, and tests of these
    numbers = {key for key in numbers if key.split(".")[0] not in apart}
    assert len(numbers) > 25
    assert numbers == {k for k, rule in BOUND if rule != "not empty"} | {
        "local.epochs",
        "partition.clients",
        "privacy.bands",
        "privacy.epsilon",  # only with a unit: test_config_privacy
        "privacy.noise_multiplier",
        "secure_aggregation.bits",
        "secure_aggregation.threshold",
    }


def test_rules_over_several_keys() -> None:
    assert "local.epochs=0 needs local.steps to be at least 1" in refusal("", "local.epochs=0")
    assert "local.epochs=-1 must be at least 0" in refusal("", "local.epochs=-1")
    assert parse("", "local.epochs=0", "local.steps=3").local.steps == 3
    assert "partition.clients=0 must be at least 1; only" in refusal("", "partition.clients=0")
    assert "partition.clients=-1 must be at least 0" in refusal("", "partition.clients=-1")
    assert parse("", "partition.clients=0", "partition.kind=natural").partition.clients == 0
    assert "local.clip_per='example' needs local.clip_norm above 0" in refusal(
        "", "local.clip_per=example"
    )
    both = parse("", "local.clip_per=example", "local.clip_norm=0.1").local
    assert (both.clip_per, both.clip_norm) == ("example", 0.1)


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


def test_workers_fit_the_engine_and_the_device() -> None:
    for kind, device in (
        ("cohort", "auto"),
        ("cohort", "cuda"),
        ("cohort", "cpu"),
        ("flower", "cuda:1"),
    ):
        check(Recipe(engine=Engine(kind=kind, device=device, workers=4)))  # type: ignore[arg-type]
    check(Recipe(engine=Engine(kind="sequential", workers=1)))
    with pytest.raises(
        FedpeftError, match=r"engine\.workers=2 with engine\.kind=sequential.*cohort"
    ):
        check(Recipe(engine=Engine(kind="sequential", workers=2)))
    with pytest.raises(
        FedpeftError, match=r"engine\.workers=2 with engine\.device='cuda:1'.*=cuda,"
    ):
        check(Recipe(engine=Engine(device="cuda:1", workers=2)))


def test_what_speeds_up_batched_clients_is_refused_without_them() -> None:
    for kind in ("sequential", "flower"):
        for how in ({"compile": "default"}, {"checkpointing": True}):
            with pytest.raises(FedpeftError, match=f"engine.kind={kind} trains one at a time"):
                check(Recipe(engine=Engine(kind=kind, **how)))  # type: ignore[arg-type]
    clipped = Local(clip_per="example", clip_norm=1.0)
    with pytest.raises(FedpeftError, match="too many shapes to compile"):
        check(Recipe(local=clipped, engine=Engine(compile="default")))
    check(Recipe(local=clipped, engine=Engine(checkpointing=True)))
