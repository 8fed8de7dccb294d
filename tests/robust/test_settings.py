"""Which settings and how many updates a robust rule takes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, get_args

import pytest

from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.robust.settings import Robust, Rule


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        (Robust("median", attackers=3), 7),
        (Robust("geometric_median", attackers=3), 7),
        (Robust("krum", attackers=2), 7),
        (Robust("multi_krum", attackers=2), 7),
        (Robust("multi_krum", attackers=2, keep=6), 8),
        (Robust("bulyan", attackers=2), 11),
        (Robust("trimmed_mean", attackers=2, trim=0.2), 10),
        (Robust("trimmed_mean", attackers=29, trim=0.29), 100),
        (Robust("trimmed_mean", attackers=0, trim=0.0), 1),
        (Robust("norm_clip", attackers=9), 1),
        (Robust("fltrust", attackers=9), 1),
        (Robust("none", attackers=9), 1),
    ],
)
def test_a_rule_needs_its_least_number_of_updates(settings: Robust, least: int) -> None:
    assert settings.least == least
    settings.check(least)
    with pytest.raises(QuorumError, match=rf"robust\.rule={settings.rule}.* at least {least} up"):
        settings.check(least - 1)


def test_every_attacker_assumed_is_cut_from_both_ends_at_the_least_number() -> None:
    for attackers in range(1, 30):
        for percent in range(1, 50):
            settings = Robust("trimmed_mean", attackers=attackers, trim=percent / 100)
            assert settings.cut(settings.least) >= attackers > settings.cut(settings.least - 1)
            assert settings.least > 2 * settings.cut(settings.least)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attackers", -1),
        ("keep", -1),
        ("steps", -1),
        ("trim", 0.5),
        ("trim", -0.1),
        ("trim", float("nan")),
        ("clip_norm", -1.0),
        ("clip_norm", float("inf")),
        ("smoothing", 0.0),
        ("smoothing", float("nan")),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value(field: str, value: float) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(FedpeftError, match=rf"robust\.{field}={value!r}: .*give|must be"):
        Robust(**settings).check(100)


def test_a_setting_that_means_nothing_to_the_rule_is_refused() -> None:
    for rule in get_args(Rule):
        product, weighted = Robust(rule, space="product"), Robust(rule, weighted=True)
        if rule in ("krum", "multi_krum", "bulyan"):
            product.check(10)
        else:
            with pytest.raises(FedpeftError, match=rf"space=product: robust\.rule={rule} "):
                product.check(10)
        if rule in ("none", "norm_clip", "geometric_median"):
            weighted.check(10)
        else:
            with pytest.raises(FedpeftError, match=rf"weighted=True: robust\.rule={rule} "):
                weighted.check(10)
    with pytest.raises(FedpeftError, match=r"trim=0 cuts nothing, so robust\.attackers=1"):
        Robust("trimmed_mean", attackers=1, trim=0.0).check(10)


def test_settings_load_no_torch() -> None:
    """A recipe may hold them; the command line answers before torch is loaded."""
    for module in ("fedpeft.robust.settings", "fedpeft.attacks.settings"):
        code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
