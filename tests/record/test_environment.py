"""environment.json: enough to repeat a run, nothing about the user."""

from __future__ import annotations

import getpass
import json
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedpeft.record import environment

FOUND = environment.describe()


def test_hardware_and_versions_are_recorded() -> None:
    assert FOUND["python"] == platform.python_version()
    packages = FOUND["packages"]
    assert isinstance(packages, dict)
    for name in ("torch", "transformers", "peft", "flwr", "numpy", "safetensors"):
        assert packages[name]
    assert packages["torch"].split("+")[0] == torch.__version__.split("+")[0]
    cpu, threads = FOUND["cpu"], FOUND["threads"]
    assert isinstance(cpu, dict) and isinstance(threads, dict)
    assert cpu["model"] and cpu["cores"] >= 1 and cpu["memory_bytes"] > 2**28
    assert threads["intra_op"] == torch.get_num_threads()
    assert (FOUND["cuda"] is None) == (not torch.cuda.is_available())
    json.dumps(FOUND, allow_nan=False)


def test_a_package_that_is_not_installed_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_PACKAGES", ("no-such-package",))
    assert environment.describe()["packages"] == {"no-such-package": None}


def test_no_secret_path_or_personal_name_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HF_TOKEN", "USER", "LOGNAME", "HOSTNAME"):
        monkeypatch.setenv(variable, "of-a-person")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for module, function in ((platform, "node"), (socket, "gethostname"), (getpass, "getuser")):
        monkeypatch.setattr(module, function, lambda: "of-a-person")
    text = json.dumps(environment.describe())
    assert "of-a-person" not in text
    assert str(tmp_path) not in text and sys.prefix not in text


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "fedpeft").mkdir()
    (tmp_path / "fedpeft" / "tree.py").write_text("one = 1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_the_revision_of_a_checkout_is_recorded(checkout: Path) -> None:
    revision = git(checkout, "rev-parse", "HEAD")
    package = checkout / "fedpeft"
    assert environment._git(package) == {"revision": revision, "modified": False}
    (package / "new.txt").write_text("untracked files do not count")
    assert environment._git(package) == {"revision": revision, "modified": False}
    (package / "tree.py").write_text("one = 2\n")
    assert environment._git(package) == {"revision": revision, "modified": True}


def test_the_repository_around_an_installed_package_is_not_its_revision(checkout: Path) -> None:
    package = checkout / ".venv" / "lib" / "site-packages" / "fedpeft"
    package.mkdir(parents=True)
    assert environment._git(package) is None


def test_without_git_or_a_commit_there_is_no_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "fedpeft"
    package.mkdir()
    git(tmp_path, "init", "--quiet")
    assert environment._git(package) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._git(package) is None


def test_git_variables_of_the_caller_do_not_mislead(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "--quiet")
    revision = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert environment._git(checkout / "fedpeft") == {"revision": revision, "modified": False}
