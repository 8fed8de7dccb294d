from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

from fedpeft.cli.bars import Bars
from fedpeft.cli.watchers import Lines, Quiet
from fedpeft.config import Recipe
from fedpeft.config_load import dump_recipe
from fedpeft.data.clients import Task
from tests.cli import fakes

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def played(terminal: bool, task: Task = "classification") -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80)
    with Bars(console) as bars:
        fakes.act(Lines(console, bars), task=task)
    return out.getvalue()


def test_a_log_has_no_control_characters_and_no_bars() -> None:
    text = played(terminal=False)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert "━" not in text and "tokens/s" not in text


def test_a_line_per_round() -> None:
    lines = [line.split() for line in played(terminal=False).splitlines()]
    first = ["fedavg", "1/2", "1.250", "1/6", "6.0", "MiB", "1.0", "MiB", "2.5"]
    second = ["fedavg", "2/2", "1.250", "87.6", "%", "6/6", "6.0", "MiB", "6.0", "MiB", "2.5"]
    assert first in lines
    assert second in lines
    assert [line[0] for line in lines if "1/1" in line] == ["local"]
    head = ["round", "train", "loss", "accuracy", "replies", "down", "up", "seconds"]
    assert lines.count(head) == 1


def test_perplexity_for_language_modelling() -> None:
    lines = played(terminal=False, task="causal_lm").splitlines()
    (row,) = [line.split() for line in lines if "2/2" in line]
    assert row[3] == "7.39"
    assert sum("perplexity" in line and "replies" in line for line in lines) == 1


def test_three_excluded_clients_are_named_with_reason() -> None:
    lines = [line.strip() for line in played(terminal=False).splitlines()]
    named = [line for line in lines if "excluded: " in line]
    assert named == [f"client-{n} excluded: NaN in client-{n}" for n in range(3)]
    assert "and 2 more excluded" in lines


def test_a_note_is_shown() -> None:
    assert "note: a checkpoint was skipped" in played(terminal=False)


def test_the_table_comes_last_but_for_where_the_adapter_is() -> None:
    lines = played(terminal=False).splitlines()
    (last,) = [n for n, line in enumerate(lines) if line.startswith("centralised")]
    assert lines[last + 2 :] == [
        "2 rounds; 1 min in all; replies missing: 3 excluded, 1 dropped out",
        "sent, both ways: 3.0 MiB, 20 % of uncompressed float32, 40 % of float16",
    ]


def test_how_to_load_the_adapter(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(Recipe()))
    out = io.StringIO()
    console = Console(file=out, width=80)
    watcher = Lines(console, Bars(console))
    watcher.planned(fakes.plan(labels=4), str(tmp_path))
    watcher.finished(fakes.summary(str(tmp_path), adapter="some/adapter"))
    text = out.getvalue()
    assert "adapter in some/adapter, to load it:" in text
    assert "num_labels=4" in text
    assert "model = peft.PeftModel.from_pretrained(base, 'some/adapter')" in text


def test_a_terminal_has_bars_that_vanish() -> None:
    text = played(terminal=True)
    plain = ESCAPES.sub("", text)
    assert "━" in plain and "ETA" in plain and "round 2/2" in plain
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back
    end = plain[plain.rindex("2 rounds;") :]
    assert "━" not in end and "ETA" not in end


def test_both_say_the_same() -> None:
    def figures(text: str) -> list[str]:
        return re.findall(r"\d+\.\d %", ESCAPES.sub("", text))

    assert figures(played(terminal=True)) == figures(played(terminal=False))


def test_quiet_prints_the_table_only() -> None:
    out = io.StringIO()
    fakes.act(Quiet(Console(file=out, width=80)))
    lines = out.getvalue().splitlines()
    assert lines[0].split() == ["test", "test", "clients", "worst", "bytes", "bytes", "time"]
    assert [line.split()[0] for line in lines[3:]] == [
        "untrained",
        "local-only",
        "fedavg",
        "centralised",
    ]
