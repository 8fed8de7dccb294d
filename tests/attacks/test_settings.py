"""Which settings an attack takes."""

from __future__ import annotations

from typing import Any

import pytest

from fedpeft.attacks.settings import Attack
from fedpeft.errors import FedpeftError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("share", 1.5),
        ("share", float("nan")),
        ("poisoned", -0.1),
        ("factor", -1.0),
        ("factor", float("inf")),
        ("std", float("nan")),
        ("z", -0.5),
        ("target", -1),
        ("position", -1),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value(field: str, value: float) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(FedpeftError, match=rf"attack\.{field}={value!r}: .*give"):
        Attack(**settings).check()


def test_a_backdoor_needs_a_trigger() -> None:
    Attack("label_flip").check()
    Attack("backdoor", trigger=(0, 7)).check()
    for trigger in ((), (3, -1)):
        with pytest.raises(FedpeftError, match=r"attack\.trigger=\(.* a backdoor needs"):
            Attack("backdoor", trigger=trigger).check()
