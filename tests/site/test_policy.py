"""What a site refuses, before anything of it is loaded, and what it says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config_load import dump_recipe, load_recipe
from fedpeft.errors import FedpeftError
from fedpeft.site.policy import Policy, dump_policy, parse_policy, read_policy
from fedpeft.site.rules import (
    check_model,
    check_promise,
    check_recipe,
    check_text,
    least,
    policy_for,
)

FIVE = "partition.clients=5"


def asked(policy: Policy, *overrides: str) -> None:
    recipe = load_recipe("quickstart", [FIVE, *overrides])
    check_text(policy, dump_recipe(recipe))
    check_recipe(policy, recipe)


@pytest.mark.parametrize(
    ("policy", "good", "bad", "message"),
    [
        ({"sources": ["pydocs"]}, [], ["data.source=/etc"], "sources allows pydocs, .* '/etc'"),
        ({"models": ["fedpeft-tiny"]}, [], ["model.name=gpt2"], "models allows .* 'gpt2'"),
        ({"strategies": ["fedavg"]}, [], ["strategy.name=fedprox"], "strategies allows fedavg"),
        ({"adapters": ["lora"]}, [], ["adapter.kind=ia3"], "adapters allows lora, .* 'ia3'"),
        ({}, [], ["adapter.start=x"], "starts allows none, and adapter.start is 'x'"),
        (
            {"starts": ["/a/b"]},
            ["adapter.start=/a/b"],
            ["adapter.start=/a/c"],
            "starts allows /a/b",
        ),
        ({}, [], ["data.test=../../x"], r"data.test is '\.\./\.\./x'"),
        ({}, [], ["adapter.init_lora_weights=/x"], "no paths but adapter.start"),
        ({"max_rank": 8}, ["adapter.r=8"], ["adapter.r=9"], "max_rank allows 8, .*adapter.r is 9"),
        (
            {"max_rank": 8},
            [],
            ["adapter.rank_pattern={q: 64}"],
            "max_rank allows 8, and adapter.rank_pattern.q is 64",
        ),
        (
            {"max_rank": 8},
            ["strategy={name: flora, ranks: [2, 8]}"],
            ["strategy={name: flora, ranks: [2, 16]}"],
            "strategy.ranks.1 is 16",
        ),
        (
            {"privacy_unit": "record"},
            ["privacy.unit=record", "privacy.noise_multiplier=1"],
            [],
            "privacy_unit allows record, and privacy.unit is 'none'",
        ),
        (
            {"max_epsilon": 8.0},
            ["privacy.unit=record", "privacy.epsilon=8"],
            ["privacy.unit=record", "privacy.epsilon=8.5"],
            "max_epsilon allows 8.0, and the run's epsilon is '8.5'",
        ),
        (
            {"max_epsilon": 8.0},
            ["privacy.unit=client", "privacy.noise_multiplier=1", "rounds.weighting=equal"],
            [],
            "max_epsilon allows record or client, and privacy.unit is 'none'",
        ),
        (
            {"max_delta": 1e-5},
            ["privacy.unit=record", "privacy.epsilon=8"],
            ["privacy.unit=record", "privacy.epsilon=8", "privacy.delta=1e-4"],
            "max_delta allows 1e-05, and privacy.delta is 0.0001",
        ),
        (
            {"min_cohort": 4},
            ["rounds.quorum=0.8"],
            ["rounds.quorum=0.6"],
            "min_cohort allows at least 4, and .* is 3",
        ),
        (
            {"secure_aggregation": "required"},
            ["secure_aggregation.enabled=true"],
            [],
            "secure_aggregation allows true, and secure_aggregation.enabled is False",
        ),
    ],
)
def test_a_recipe_is_refused_by_the_key_it_breaks(
    policy: dict[str, Any], good: list[str], bad: list[str], message: str
) -> None:
    known = parse_policy(policy, "policy")
    if good or bad:
        asked(known, *good)
    with pytest.raises(FedpeftError, match=f"^this site's policy refuses the recipe: .*{message}"):
        asked(known, *bad)


def test_a_strategy_that_is_not_allowed_is_not_even_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    text = "strategy: {name: hostile_module}"
    with pytest.raises(FedpeftError, match="strategies allows fedavg, .* 'hostile_module'"):
        check_text(Policy(strategies=("fedavg",)), text)
    assert "hostile_module" not in sys.modules


@pytest.mark.parametrize(
    "text",
    [
        "model: {trust_remote_code: true}",
        "adapter: {kind: lora, deep: [{TRUST_REMOTE_CODE: 1}]}",
        "adapter: {auto_mapping: {parent_library: os}}",
        "data: {allow_pickle: true}",
    ],
)
def test_no_recipe_brings_code(text: str) -> None:
    with pytest.raises(FedpeftError, match="no recipe may bring code to a site"):
        check_text(Policy(), text)


@pytest.mark.parametrize("text", ["[1]", "a: [", "", "!!python/object/apply:os.system [id]"])
def test_what_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(FedpeftError, match="the recipe in the request is no"):
        check_text(Policy(), text)


def test_what_only_model_and_data_tell(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", [FIVE])
    check_model(Policy(base_models=("aa", "bb")), recipe, "bb", 5)
    with pytest.raises(FedpeftError, match="base_models allows aa, .* digest is 'bb'"):
        check_model(Policy(base_models=("aa",)), recipe, "bb", 5)
    with pytest.raises(FedpeftError, match="min_cohort allows at least 5"):
        check_model(Policy(min_cohort=5), recipe, "bb", 5)  # quorum 0.5 of 5
    check_promise(Policy(max_epsilon=3.0), 3.0)
    for epsilon in (3.1, float("inf"), float("nan")):
        with pytest.raises(FedpeftError, match="max_epsilon allows 3.0"):
            check_promise(Policy(max_epsilon=3.0), epsilon)


@pytest.mark.parametrize(
    ("overrides", "fewest"),
    [
        (["rounds.quorum=0"], 1),
        (["rounds.quorum=1"], 20),
        (["rounds.quorum=0.5", "rounds.sampling={kind: fixed, size: 7}"], 4),
        (["rounds.quorum=1", "rounds.sampling={kind: poisson, rate: 0.24}"], 4),
        (["rounds.quorum=1", "rounds.sampling={kind: cyclic, groups: 3}"], 6),
        (["rounds.quorum=0.5", "secure_aggregation.enabled=true"], 14),
    ],
)
def test_the_smallest_cohort_of_a_recipe(overrides: list[str], fewest: int) -> None:
    recipe = load_recipe("quickstart", ["partition.clients=20", *overrides])
    assert least(recipe, 20) == fewest


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["privacy.unit=record", "privacy.epsilon=4"],
        ["secure_aggregation.enabled=true", "strategy={name: fedprox, mu: 0.1}"],
    ],
)
def test_the_policy_of_a_recipe_takes_it_and_survives_its_file(
    tmp_path: Path, overrides: list[str]
) -> None:
    recipe = load_recipe("quickstart", [FIVE, *overrides])
    policy = policy_for(recipe)
    asked(policy, *overrides)
    (tmp_path / "policy.yaml").write_text(dump_policy(policy))
    assert read_policy(tmp_path / "policy.yaml") == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_epsilom: 3", "unknown key 'max_epsilom'. Did you mean 'max_epsilon'"),
        ("max_epsilon: -1", "max_epsilon=-1.0 must be above 0, or left out"),
        ("max_rank: many", "max_rank: Value 'many'"),
        ("min_cohort: 0", "min_cohort=0 must be at least 1"),
        ("strategies: fedavg", "strategies: Invalid value"),
        ("secure_aggregation: maybe", "secure_aggregation: Invalid value 'maybe'"),
        ("- 1", "must be a mapping of keys to values"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_policy_that_is_wrong_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(FedpeftError, match=message):
        read_policy(tmp_path / "policy.yaml")


def test_a_policy_that_is_missing_is_no_policy_that_allows_all(tmp_path: Path) -> None:
    with pytest.raises(FedpeftError, match="cannot be read .*: name the site's policy"):
        read_policy(tmp_path / "policy.yaml")
