"""Every sentence with which a recipe's privacy is refused, and a recipe that it lets through."""

from __future__ import annotations

import pytest

from fedpeft.config_load import parse_recipe
from fedpeft.errors import FedpeftError

RECORD = "privacy: {unit: record, noise_multiplier: 1.0}"
CLIENT = "privacy: {unit: client, noise_multiplier: 1.0%s}\nrounds: {weighting: equal%s}"


def client(more: str = "", rounds: str = "") -> str:
    return CLIENT % (more, rounds)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        RECORD,
        "privacy: {unit: record, epsilon: 4.0}",
        client(),
        client(", adaptive: true"),
        client(", bands: -1", ", sampling: {kind: cyclic}"),
        client(", noise: client"),
        client(", noise: shares") + "\nsecure_aggregation: {enabled: true}",
        client(", randomness: seeded"),
    ],
)
def test_these_go(text: str) -> None:
    parse_recipe(text, "here")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("privacy: {epsilon: 4.0}", "but privacy.unit=none protects nobody: set privacy.unit="),
        ("privacy: {noise_multiplier: 1.0}", "protects nobody"),
        ("privacy: {unit: record}", "epsilon=0 and .*noise_multiplier=0: give one of the two"),
        ("privacy: {unit: record, epsilon: 1.0, noise_multiplier: 1.0}", "give one of the two"),
        (client(", randomness: seeded") + "\nengine: {workers: 2}", "each the same noise"),
        (client(", randomness: seeded") + "\nengine: {kind: flower}", "each the same noise"),
        (RECORD + "\nlocal: {clip_norm: 1.0}", "leave local.clip_norm out"),
        (RECORD + "\nengine: {compile: default}", "Set engine.compile=none"),
        ("privacy: {unit: record, epsilon: 1.0, noise: client}", "belong to privacy.unit=client"),
        ("privacy: {unit: record, epsilon: 1.0, adaptive: true}", "belong to privacy.unit=client"),
        ("privacy: {unit: record, epsilon: 1.0, bands: 4}", "belong to privacy.unit=client"),
        ("privacy: {unit: client, epsilon: 1.0}", "Set rounds.weighting=equal"),
        (client(", noise: client, adaptive: true"), "Set privacy.noise=server"),
        (client(", noise: client, bands: 2"), "Set privacy.noise=server"),
        (client(", adaptive: true, bands: 2"), "one bound for the whole run"),
        (client(", bands: 2") + "\noutput: {checkpoint_every: 2}", "Set output.checkpoint_every=1"),
        (client(", noise: shares"), "Set secure_aggregation.enabled=true"),
        (
            client(", noise: shares", ", sampling: {kind: poisson}")
            + "\nsecure_aggregation: {enabled: true}",
            "Use rounds.sampling.kind=fixed, uniform or cyclic",
        ),
    ],
)
def test_these_do_not_go_together(text: str, sentence: str) -> None:
    with pytest.raises(FedpeftError, match=sentence):
        parse_recipe(text, "here")


@pytest.mark.parametrize("field", ["epsilon", "noise_multiplier", "delta", "clip_norm"])
@pytest.mark.parametrize("value", [".nan", ".inf", "-1.0"])
def test_figures_that_mean_nothing_are_refused(field: str, value: str) -> None:
    """Test 59 of the list."""
    given = {"epsilon": "4.0"} if field != "noise_multiplier" else {}
    whole = given | {"unit": "record", field: value}
    text = ", ".join(f"{name}: {own}" for name, own in whole.items())
    with pytest.raises(FedpeftError, match=rf"privacy\.{field}"):
        parse_recipe(f"privacy: {{{text}}}", "here")


@pytest.mark.parametrize("value", ["0.0", "1.0", "1.5"])
def test_delta_is_a_probability(value: str) -> None:
    with pytest.raises(FedpeftError, match=r"privacy\.delta"):
        parse_recipe(f"privacy: {{unit: record, epsilon: 1.0, delta: {value}}}", "here")
