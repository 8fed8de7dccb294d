"""A site runs no app but fedpeft's: by Flower's own code, with the check in its place."""

from __future__ import annotations

import hashlib
import inspect
import io
import zipfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.fab import Fab
from flwr.supernode import start_client_internal as flower
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.flower.supernode import checked, pulling, why_foreign

pytestmark = pytest.mark.filterwarnings(
    "ignore:GitWildMatchPattern:DeprecationWarning"
)  # flwr 1.41
APP = (resources.files("fedpeft.deploy") / "templates" / "app.toml").read_text()
ROOT = Path(__file__).resolve().parents[2]


def zipped(files: Mapping[str, str]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return data.getvalue()


def built(folder: Path, more: Mapping[str, str], project: str = APP) -> bytes:
    folder = folder / "app"
    folder.mkdir()
    for name, text in {"pyproject.toml": project, **more}.items():
        (folder / name).write_text(text)
    return build_fab_from_disk(folder)


def test_the_app_of_a_deployment_and_the_example_are_ours(tmp_path: Path) -> None:
    assert why_foreign(built(tmp_path, {})) is None
    assert why_foreign(build_fab_from_disk(ROOT / "experiments" / "flower")) is None


@pytest.mark.parametrize(
    ("more", "changed", "why"),
    [
        ({"evil.py": "import os"}, ("", ""), "it holds ['evil.py']"),
        ({"fedpeft.py": "app = 1"}, ("", ""), "it holds ['fedpeft.py']"),
        ({}, ("fedpeft.flower.shim:app", "os:system"), "it names the components"),
        ({}, ("fedpeft.flower.shim:app", "fedpeft.flower.client_app:simulated"), "components"),
        ({}, ("clientapp =", 'agentapp = "os:system"\nclientapp ='), "other components"),
        ({}, ("dependencies = []", 'dependencies = ["evil"]'), "it has dependencies"),
    ],
)
def test_any_other_app_is_foreign(
    more: dict[str, str], changed: tuple[str, str], why: str, tmp_path: Path
) -> None:
    files = {"pyproject.toml": APP.replace(*changed), **more}
    assert why in str(why_foreign(zipped(files)))


def test_what_is_no_app_is_foreign() -> None:
    bomb = zipped({"pyproject.toml": "x = 1\n" * 20_000})
    assert why_foreign(b"") == "it cannot be read: BadZipFile"
    assert why_foreign(zipped({})) == "it cannot be read: KeyError"
    assert "too large" in str(why_foreign(bomb))
    assert "bytes" in str(why_foreign(b"x" * 300_000))
    assert "cannot be read" in str(why_foreign(zipped({"pyproject.toml": "["})))
    assert "none of an app" in str(why_foreign(zipped({"pyproject.toml": "tool = 3"})))


@given(st.integers(0, 600), st.binary(max_size=8), st.integers(0, 8))
def test_a_spoilt_app_is_foreign_or_still_ours(at: int, new: bytes, gone: int) -> None:
    good = zipped({"pyproject.toml": APP})
    assert isinstance(why_foreign(good[:at] + new + good[at + gone :]), str | None)


class State:
    """What Flower's node state is asked before an app is kept; it keeps what it is given."""

    def __init__(self) -> None:
        self.kept: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("get_run", "create_task")):
            return lambda *args, **kwargs: None
        return lambda *args, **kwargs: self.kept.append(name)


def pulled(content: bytes, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[Any]]:
    """What Flower's own function does with a message of an unknown run: kept, answered."""
    answers: list[Any] = []
    monkeypatch.setattr(flower, "_verify_fab", checked(flower._verify_fab))
    monkeypatch.setattr(flower, "_insert_message", lambda reply, *rest: answers.append(reply))
    monkeypatch.setattr(flower, "Message", lambda error, reply_to: error)
    monkeypatch.setattr(flower, "get_fused_config_from_fab", lambda content, run: {})
    digest = hashlib.sha256(content).hexdigest()
    metadata = SimpleNamespace(run_id=1, group_id="1", message_type="train", message_id="m")
    run = SimpleNamespace(fab_hash=digest, series_id=1, primary_task_type="flwr-serverapp")
    state = State()
    pulling(flower._pull_and_store_message)(
        state=state,
        object_store=State(),
        node_config={},
        receive=lambda: (SimpleNamespace(metadata=metadata), None),
        get_run=lambda run_id: run,
        get_fab=lambda fab_hash, run_id: Fab(digest, content, {}),
        pull_object=lambda run_id, object_id: b"",
        confirm_message_received=lambda run_id, message_id: None,
        trusted_entities=None,
    )
    return state.kept, answers


def test_flower_keeps_our_app_and_answers_any_other_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, answers = pulled(built(tmp_path, {}), monkeypatch)
    assert "store_fab" in kept and answers == []
    kept, answers = pulled(zipped({"pyproject.toml": APP, "evil.py": ""}), monkeypatch)
    assert kept == [] and answers == [flower.FAB_VERIFICATION_ERROR]


def test_flower_calls_what_is_replaced_by_these_names() -> None:
    """If one of these changes, the check would not be in place."""
    named = inspect.signature(flower._pull_and_store_message).parameters
    assert {"get_fab", "trusted_entities"} <= set(named)
    loop = inspect.getsource(flower.start_client_internal)
    pull = inspect.getsource(flower._pull_and_store_message)
    assert "run_id = _pull_and_store_message(\n" in loop
    assert loop.count("trusted_entities=trusted_entities") == 1
    assert "if trusted_entities:" in pull and "_verify_fab(fab, trusted_entities)" in pull
    assert pull.index("_verify_fab(") < pull.index("state.store_fab(")
