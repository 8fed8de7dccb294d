"""Names and numbers by name behave as the tuple and the dict that they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.names import Names, Roster

WORDS = sorted(["c10", "c2", "", "ünlü", "名前", "\U0001f600", "z", "a b", "\uffee"])


def test_names_are_the_strings_in_their_order() -> None:
    names = Names.of(WORDS)
    assert list(names) == WORDS
    assert (len(names), names[0], names[-1]) == (9, WORDS[0], WORDS[-1])
    assert names[1:3] == tuple(WORDS[1:3]) and names[::-4] == tuple(WORDS[::-4])
    with pytest.raises(IndexError, match="none is number 9"):
        names[9]
    with pytest.raises(IndexError):
        names[-10]


def test_every_name_is_found_and_no_other() -> None:
    names = Names.of(WORDS)
    assert [names.find(word) for word in WORDS] == list(range(9))
    for other in ("c1", "c100", "zz", "\U0001f601", " ", "\udc80"):
        assert names.find(other) == -1 and other not in names
    assert 3 not in names


@pytest.mark.parametrize("wrong", [["b", "a"], ["a", "a"]])
def test_names_must_ascend(wrong: list[str]) -> None:
    with pytest.raises(ValueError, match="distinct and ascending"):
        Names.of(wrong)


def test_no_names() -> None:
    assert list(Names.of([])) == [] and Names.of([]).find("a") == -1


def test_a_roster_is_a_mapping() -> None:
    roster = Roster(Names.of(["a", "b"]), np.array([3, 1]))
    assert roster == {"a": 3, "b": 1} and list(roster) == ["a", "b"]
    assert type(roster["b"]) is int
    with pytest.raises(KeyError, match="c"):
        roster["c"]
