"""The bill of materials and the audit of pins, on the environment that runs the tests."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dependencies", ROOT / ".ci" / "dependencies.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_bill_lists_all_that_a_user_gets(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["dependencies.py", "sbom", str(tmp_path)])
    script.main()
    [file] = tmp_path.iterdir()
    first = file.read_bytes()
    script.main()
    assert file.read_bytes() == first
    found = json.loads(first)
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", found["serialNumber"])
    versions = {entry["name"]: entry["version"] for entry in found["components"]}
    for name in ("torch", "transformers", "peft", "flwr", "cryptography", "omegaconf"):
        assert versions[name] == metadata.version(name)
    assert not {"pytest", "ruff", "mypy"} & versions.keys()
    refs = {found["metadata"]["component"]["bom-ref"], *(e["bom-ref"] for e in found["components"])}
    assert len(refs) == len(found["components"]) + 1
    below = {ref for entry in found["dependencies"] for ref in (entry["ref"], *entry["dependsOn"])}
    assert below == refs


def test_the_audit_finds_a_pin_that_is_missing_another_or_left_over(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = script.pins()
    assert len(pinned) > 50
    changed = {**pinned, "numpy": "1.0", "left-pad": "1.0"}
    del changed["torch"]
    monkeypatch.setattr(script, "pins", lambda: changed)
    found = "\n".join(script.faults())
    assert "constraints.txt pins 1.0" in found
    assert re.search(r"torch \S+ has no pin", found)
    assert "left-pad is pinned in constraints.txt, and nothing needs it" in found
