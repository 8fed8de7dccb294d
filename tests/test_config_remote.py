"""Recipes from another party: bounded, nothing resolved, nothing imported that was not listed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.config_load import dump_recipe, load_recipe
from fedpeft.config_remote import MAX_BYTES, parse_remote
from fedpeft.errors import FedpeftError

GOOD = dump_recipe(load_recipe("quickstart"))


def bomb() -> str:
    lines, before = ["a: &a [x,x,x,x,x,x,x,x,x]"], "a"
    for name in "bcdefghij":
        lines.append(f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]")
        before = name
    return "\n".join(lines)


def test_a_recipe_comes_back_as_it_was_sent() -> None:
    assert parse_remote(GOOD, "the recipe") == load_recipe("quickstart")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (GOOD + "#" * MAX_BYTES, "at most 65536 bytes"),
        ("ü" * (MAX_BYTES // 2 + 1), "at most 65536 bytes"),
        (bomb(), "anchors and aliases"),
        ("a: &a {b: *a}", "anchors and aliases"),
        ("[" * 3000 + "]" * 3000, "levels"),
        ("baselines: [" + "a," * 25_000 + "]", "items"),
        ("name: !!python/object/apply:os.system ['true']", "tags"),
        ("name: !!str x", "tags"),
        (f"seed: {'9' * 5000}", "a number of 5000 characters"),
        ("name: ${oc.env:HF_TOKEN}", "not allowed in a recipe"),
        ("model: {name: '${oc.env:HF_TOKEN}'}", "not allowed in a recipe"),
        ("adapter: {kind: lora, r: '${oc.decode:${oc.env:X}}'}", "not allowed in a recipe"),
        ("model: {name: x, trust_remote_code: true}", "unknown key 'model.trust_remote_code'"),
        ("model: {kwargs: {trust_remote_code: true}}", "unknown key 'model.kwargs'"),
        ("strategy: {name: antigravity}", "strategy.name='antigravity' does not ship"),
        ("strategy: {name: os.path}", "does not ship"),
        ("strategy: {name: fedavg}\nseed: 2020-99-99\nstrategy: {name: os}", "duplicate"),
        ("\x00", "not valid YAML"),
        ("name: [", "not valid YAML"),
        ("- a\n- b", "a mapping"),
    ],
)
def test_what_is_hostile_is_refused(text: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    with pytest.raises(FedpeftError) as caught:
        parse_remote(text, "the recipe in the request")
    assert why in str(caught.value)
    assert "hf_canary" not in str(caught.value)
    assert "antigravity" not in sys.modules


def test_the_operator_may_list_a_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = "from fedpeft.strategies.fedavg import FedAvg\n\nclass Ours(FedAvg):\n    pass\n"
    (tmp_path / "sites_own.py").write_text(own)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = "strategy: {name: sites_own}"
    with pytest.raises(FedpeftError, match="does not ship"):
        parse_remote(text, "r", ["another"])
    assert "sites_own" not in sys.modules
    for listed in (["sites_own"], None):
        assert parse_remote(text, "r", listed).strategy["name"] == "sites_own"


ALPHABET = "{}[]:,&*!|>'\"%@`?- \n#$0123456789.eE_abnstrategy"
PIECES = [
    "${x}",
    "???",
    "<<: ",
    "&a ",
    "*a",
    "strategy: {name: ",
    "model: ",
    "r: 99",
    "\t",
    "!!int ",
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.text(ALPHABET, max_size=12) | st.sampled_from(PIECES), max_size=30))
def test_any_text_is_a_recipe_or_a_fedpeft_error(parts: list[str]) -> None:
    try:
        parse_remote("".join(parts), "r")
    except FedpeftError as error:
        assert str(error).startswith("r")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.text(ALPHABET, max_size=6), st.integers(0, 20))
def test_a_spoilt_recipe_is_a_recipe_or_a_fedpeft_error(at: int, new: str, gone: int) -> None:
    text = GOOD[:at] + new + GOOD[at + gone :]
    try:
        parse_remote(text, "r")
    except FedpeftError:
        return
