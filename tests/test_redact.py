"""What leaves a site in a reason: hypothesis plants secrets in any text around them."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import FedpeftError, PayloadError
from fedpeft.redact import LIMIT, public, public_reason, redact

WORD = st.text(string.ascii_letters + string.digits, min_size=8, max_size=30)
HEX = st.text("0123456789abcdef", min_size=32, max_size=128)
BASE64 = st.text(string.ascii_letters + string.digits + "+/_-", min_size=43, max_size=120)
PROSE = st.text(max_size=60)
FORMS = [
    "{pad} hf_{word} {pad2}",
    "{pad} HF_TOKEN={word} {pad2}",
    '{pad} "token": "{word}" {pad2}',
    "{pad} password: {word} {pad2}",
    "{pad} Authorization: Bearer {word} {pad2}",
    "{pad} https://ann:{word}@hub.example/x {pad2}",
    "{pad} s3://bucket/{word}?sig=1 {pad2}",
    "{pad} '/clinic/ward 3/{word}.csv' {pad2}",
    "{pad} /clinic/{word} {pad2}",
    "{pad} ~/{word}/x {pad2}",
    "{pad} ../{word}/x {pad2}",
    "{pad} C:\\Users\\{word} {pad2}",
    "{pad} (/clinic/{word}) {pad2}",
    "{pad} file:/clinic/{word} {pad2}",
    "{pad} -----BEGIN PRIVATE KEY-----\n{word}\n-----END PRIVATE KEY----- {pad2}",
    "{pad} -----BEGIN OPENSSH PRIVATE KEY-----\n{word}",
]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(FORMS), WORD.map(lambda w: f"Qq{w}"), PROSE, PROSE)
def test_no_secret_gets_through_whatever_stands_around_it(
    form: str, word: str, pad: str, pad2: str
) -> None:
    if word in pad or word in pad2:
        return
    found = redact(form.format(word=word, pad=pad, pad2=pad2), limit=10_000)
    assert word not in found, found


@settings(max_examples=200, deadline=None)
@given(HEX | BASE64)
def test_runs_of_digits_as_long_as_a_key_are_taken_out(key: str) -> None:
    assert key.strip("=+/_-")[:30] not in redact(f"the key {key} is refused")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=6000))
def test_any_text_becomes_one_short_printable_line(text: str) -> None:
    found = redact(text)
    assert len(found) <= LIMIT
    assert found.isprintable()


def test_a_secret_at_the_cut_does_not_get_through_in_part() -> None:
    for size in range(3950, 4010):
        text = "/pad " * (size // 5) + "x" * (size % 5) + " hf_Qq0123456789Qq"
        assert "Qq01" not in redact(text, limit=10_000)


@pytest.mark.parametrize(
    "text",
    [
        "ReplyError: record 'tree.x' of type ConfigRecord is unknown",
        "the server asks for base '0123456789abcdef', this node has 'fedcba9876543210'",
        "node config client='c9' is no client of this recipe. Known: c0, c1, c2.",
        "alpha / r = 2, the mean and/or the sum of base_model.model.bert.encoder.layer.0.query",
        "privacy.unit=record needs node config privacy-ledger=FILE on a real node",
        "data.max_tokens=128 must be at most 64, tokenizer: none",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_the_values_of_secret_environment_variables_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "plain-looking")
    monkeypatch.setenv("EDITOR", "harmless")
    assert redact("plain-looking and harmless") == "[secret] and harmless"


def test_of_foreign_errors_only_the_type_leaves() -> None:
    assert public(KeyError("row of Ann")) == "KeyError (the traceback is in the node's log)"
    assert public_reason("KeyError: Ann") == "KeyError (the traceback is in the node's log)"
    assert public(PayloadError("payload: too short")) == "PayloadError: payload: too short"
    nested = "FedpeftError: identity='/keys/x.pem' cannot be read"
    assert public_reason(nested) == "FedpeftError: identity='[path]' cannot be read"


def test_of_errors_of_the_data_only_the_setting_leaves() -> None:
    def raised(error: Exception) -> FedpeftError:
        space = {"__name__": "fedpeft.data.sources", "error": error}
        try:
            exec("def fail():\n    raise error\nfail()", space)
        except FedpeftError as found:
            return found
        raise AssertionError

    about = raised(FedpeftError("data.label='y': the test split has the label 'HIV'"))
    left = "FedpeftError: data.label does not fit this site's data (the text is in the node's log)"
    assert public(about) == left
    wrapped = FedpeftError("HIV")
    wrapped.__cause__ = about
    assert "HIV" not in public(wrapped)
