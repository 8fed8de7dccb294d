"""No text, path, token or private tensor of a site in anything that it sends or the server writes.

Canaries are planted at the sites of a federation in memory, clients are made to fail with them in
their errors, and then all messages, the server's log and its run folder are searched.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import pytest
from flwr.app import ArrayRecord, Context, Message, RecordDict

from fedpeft.cohort.clients import TorchCohort
from fedpeft.config import Output, Recipe
from fedpeft.config_load import dump_recipe
from fedpeft.flower.server_app import main
from tests import canary
from tests.flower.nodes import InProcess
from tests.tiny import tiny_recipe, write_tiny

pytestmark = pytest.mark.usefixtures("flower_task")

TEXT, LABEL, TOKEN = "Qcanarytextq", "Qcanarylabel", "hf_Qcanarytoken0123456789"
ERROR, ENV, PATH = "Qcanaryerror", "Qcanaryenvironment", "Qcanarypath"
CANARIES = {name: globals()[name] for name in ("TEXT", "LABEL", "TOKEN", "ERROR", "ENV", "PATH")}
SITE_LOGS = ("fedpeft.flower.client_app", "fedpeft.cohort")
"""Who logs at a site; the whole of an error belongs there."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny model, and data whose rows hold a canary in text and label."""
    folder = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        write_tiny(folder)
        rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
        for row in rows:
            row["text"] = f"{TEXT} {row['text']}"
            row["label"] = f"{LABEL}-{row['label']}"
        (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        yield folder


def serve(recipe: Recipe, grid: InProcess, folder: Path) -> Path:
    """Runs the server; its folder."""
    server = folder / "server"
    server.mkdir()
    recipe = dataclasses.replace(recipe, output=Output(folder=str(server / "run")))
    (server / "recipe.yaml").write_text(dump_recipe(recipe))
    app = (resources.files("fedpeft.deploy") / "templates" / "app.toml").read_text()
    config: Any = {
        **tomllib.loads(app)["tool"]["flwr"]["app"]["config"],
        "recipe": str(server / "recipe.yaml"),
        "join-timeout": 0.05,
        "reply-timeout": 5.0,
        "identities": str(server / "all.json"),
    }
    (server / "all.json").write_text(json.dumps({f"c{k}": f"{k}" * 64 for k in range(4)}))
    main(grid, Context(1, 0, {}, RecordDict(), config))
    return server


def places(grid: InProcess, server: Path, caplog: pytest.LogCaptureFixture) -> list[canary.Place]:
    found = list(canary.messages([*grid.seen, *(answer for _, answer in grid.answers)]))
    found += canary.files(server)
    logged = [r for r in caplog.records if not r.name.startswith(SITE_LOGS)]
    write = logging.Formatter("%(message)s").format
    return [*found, *((f"log of {r.name}", write(r).encode()) for r in logged)]


def private(grid: InProcess) -> dict[str, bytes]:
    """The numbers of what clients keep to themselves."""
    found = {}
    for node, context in grid.contexts.items():
        for key, record in context.state.items():
            if isinstance(record, ArrayRecord):
                for name, array in record.items():
                    numbers = array.numpy().tobytes()
                    if len(set(numbers)) > 8:
                        found[f"{node} {key} {name}"] = numbers[:64]
    return found


@pytest.mark.parametrize("strategy", ["fedavg", "fedsa_lora"])
def test_nothing_of_a_site_is_sent_or_written_by_the_server(
    strategy: str,
    planted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SITE_SECRET", ENV)
    fit = TorchCohort.fit

    def fail(self: TorchCohort, *args: Any, **named: Any) -> Any:
        if "c1" in self.clients and self.round == 1:
            raise ValueError(f"{ERROR}: {TEXT} in /{PATH}/x.csv with {TOKEN}, {ENV}")
        return fit(self, *args, **named)

    monkeypatch.setattr(TorchCohort, "fit", fail)
    nodes = {900 - k: {"client": f"c{k}"} for k in range(4)}
    grid = InProcess(nodes)
    server = serve(tiny_recipe(planted, name=strategy), grid, tmp_path)
    failed = [a for _, a in grid.answers if a.has_error()]
    assert len(failed) == 1
    assert strategy == "fedsa_lora" or (server / "run" / "adapter").is_dir()
    kept = private(grid)
    assert bool(kept) == (strategy == "fedsa_lora")
    assert canary.leaks({**CANARIES, **kept}, places(grid, server, caplog)) == []
    assert ERROR in caplog.text  # the site's own log has it


def test_errors_of_fedpefts_own_do_not_carry_the_sites_paths(
    planted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rules of the operator, whose errors name files, answer a plain recipe."""
    (tmp_path / PATH).mkdir()
    key = tmp_path / PATH / "identity.key"
    key.write_text(f"{TOKEN} is no key")
    keys = {"identity": str(key), "identities": str(key)}
    recipe = tiny_recipe(planted)
    secure = dataclasses.replace(recipe.secure_aggregation, enabled=True)
    asked: list[Message] = []
    secured = dataclasses.replace(recipe, secure_aggregation=secure)
    rules = [(recipe, {**keys, "privacy-ledger": str(key)}), (secured, keys)]
    for number, (one, config) in enumerate(rules):
        grid = InProcess({900 - k: {"client": f"c{k}", **config} for k in range(4)})
        (tmp_path / f"{number}").mkdir()
        with pytest.raises(Exception):  # noqa: B017  # no round has enough clients
            serve(one, grid, tmp_path / f"{number}")
        asked += [answer for _, answer in grid.answers]
        found = places(grid, tmp_path / f"{number}" / "server", caplog)
        assert canary.leaks(CANARIES, found) == []
    reasons = {str(answer.error.reason) for answer in asked if answer.has_error()}
    assert any("identity='[path]'" in reason for reason in reasons), reasons


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    for name, form in enumerate(sorted(canary.forms("Qcanary/ü text"))):
        (tmp_path / f"{name}.bin").write_bytes(b"before " + form + b" behind")
    found = canary.leaks({"it": "Qcanary/ü text"}, canary.files(tmp_path))
    assert len(found) == len(list(tmp_path.iterdir())) > 8
    assert canary.leaks({"other": "Qanother"}, canary.files(tmp_path)) == []
    (tmp_path / "Qanother").touch()
    assert canary.leaks({"other": "Qanother"}, canary.files(tmp_path)) == ["Qanother: other"]
