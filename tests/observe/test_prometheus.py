"""Metrics as a scraper reads them, by prometheus-client's own parser."""

from __future__ import annotations

import dataclasses
import math
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedpeft.config import Comms, Privacy, Recipe
from fedpeft.config_load import dump_recipe, load_recipe
from fedpeft.deploy.local import free_ports
from fedpeft.errors import FedpeftError
from fedpeft.observe import prometheus
from fedpeft.observe.prometheus import HOST, Metrics, check_port
from fedpeft.observe.watchers import metrics
from fedpeft.privacy.events import Gaussian
from fedpeft.privacy.ledger import Budget, Ledger
from fedpeft.record.folder import RunFolder
from tests.cli.fakes import NAMES, act, plan, report

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """(name, labels) -> value; without when a series began."""
    return {
        (one.name.removeprefix("fedpeft_"), tuple(sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if not one.name.endswith("_created")
    }


def run_folder(path: Path, recipe: Recipe) -> str:
    RunFolder.create(path).describe(dump_recipe(recipe), "data")
    return str(path)


def test_a_run_in_figures(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", load_recipe("quickstart"))
    made = Metrics()
    act(made, folder)
    found = samples(made.registry.text())
    assert found["rounds_total", ()] == 2  # its own, not that of the baseline
    assert found["round", ()] == 2 and found["rounds_planned", ()] == 2
    assert found["sampled_total", ()] == 12 and found["replies_total", ()] == 7
    assert found["train_loss", ()] == 1.25
    assert found["test_accuracy", ()] == 0.8765 and found["test_loss", ()] == 2.0
    assert found["round_seconds_count", ()] == 2 and found["round_seconds_sum", ()] == 5
    assert found["round_seconds_bucket", (("le", "1.0"),)] == 0
    assert found["round_seconds_bucket", (("le", "5.0"),)] == 2
    size = 2**20
    assert found["bytes_total", (("direction", "down"), ("kind", "adapter"))] == 12 * size
    assert found["bytes_total", (("direction", "up"), ("kind", "adapter"))] == 7 * size
    for name in NAMES[:5]:
        assert found["exclusions_total", (("client", name), ("reason", "other"))] == 1
    assert found["run_ended", ()] == 1
    assert found["bytes_budget_left", ()] == math.inf and found["epsilon_budget", ()] == math.inf
    assert math.isnan(found["epsilon_spent", ()])


def test_of_many_clients_none_is_named(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", load_recipe("quickstart"))
    made = Metrics()
    made.planned(dataclasses.replace(plan(), clients=prometheus.NAMED + 1), folder)
    made.stage("fedavg", 2)
    made.round_done(report(1, {"a": "no reply within 3 seconds", "b": "no reply within 4 s"}), None)
    found = samples(made.registry.text())
    assert found["exclusions_total", (("client", ""), ("reason", "no reply"))] == 2


def test_budgets_go_on_where_the_run_was_left(tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        load_recipe("quickstart"),
        comms=Comms(budget="100 MiB"),
        privacy=Privacy(unit="record", epsilon=8.0, delta=1e-4, max_rounds=2),
    )
    folder = run_folder(tmp_path / "run", recipe)
    fields = {"clients": 6, "replies": 6, "failures": [], "loss": 1.0, "seconds": 1.0}
    books = {"bytes_down": {"adapter": 2**20}, "bytes_up": {"adapter": 2**20}}
    RunFolder.open(Path(folder)).metrics.append("round", 1, fields | books)
    made = Metrics()
    made.planned(plan(), folder)
    made.stage("fedavg", 2)
    assert samples(made.registry.text())["round", ()] == 1
    made.round_done(report(2), None)
    found = samples(made.registry.text())
    assert found["bytes_budget_left", ()] == (100 - 2 - 12) * 2**20
    assert found["rounds_total", ()] == 1 and found["round", ()] == 2
    assert found["epsilon_budget", ()] == 8 and math.isnan(found["epsilon_spent", ()])
    with Ledger.open(tmp_path / "run" / "privacy.jsonl", Budget(8.0, 1e-4)) as ledger:
        ledger.charge(1, {"a": Gaussian(5.0)})
        once = ledger.epsilon("a")
        assert samples(made.registry.text())["epsilon_spent", ()] == once
        ledger.charge(2, {"a": Gaussian(5.0)})
        assert samples(made.registry.text())["epsilon_spent", ()] == ledger.epsilon("a") > once


def test_a_damaged_ledger_costs_its_own_figure_only(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", load_recipe("quickstart"))
    made = Metrics()
    made.planned(plan(), folder)
    (tmp_path / "run" / "privacy.jsonl").write_text("nothing of ours\n")
    found = samples(made.registry.text())
    assert math.isnan(found["epsilon_spent", ()]) and found["rounds_planned", ()] == 2


def test_a_scrape_is_answered_on_loopback_until_the_end() -> None:
    [port] = free_ports(1)
    with metrics(port, "--metrics-port") as made:
        made.stage("", 1)
        server = made.registry._server
        assert server.server_address == (HOST, port) == ("127.0.0.1", port)
        with urllib.request.urlopen(f"http://{HOST}:{port}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            assert samples(answer.read().decode())["rounds_total", ()] == 0
        with pytest.raises(FedpeftError, match=r"metrics-port=\d+: 127.0.0.1:\d+ cannot be served"):
            Metrics().registry.serve(port)
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(f"http://{HOST}:{port}/metrics")


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_what_is_no_port(port: int) -> None:
    with pytest.raises(FedpeftError, match=f"--metrics-port={port} must be a port"):
        check_port(port, "--metrics-port")


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FedpeftError, match=r"pip install 'fedpeft\[metrics\]'"):
        check_port(9100, "--metrics-port")
