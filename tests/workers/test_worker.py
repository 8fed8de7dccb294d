"""A worker trains on nothing but what the run has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedpeft.config import Engine
from fedpeft.errors import FedpeftError
from fedpeft.prepare import prepare
from fedpeft.workers.worker import Digests, Worker
from tests.tiny import tiny_recipe, write_tiny


def test_another_base_adapter_or_data_is_refused_by_name(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    recipe = dataclasses.replace(tiny_recipe(tmp_path), engine=Engine(device="cpu"))
    digests = Digests.of(prepare(recipe))
    worker = Worker(recipe, digests)
    assert worker.ready()
    for what in ("base", "adapter", "data"):
        other = dataclasses.replace(digests, **{what: "0123"})
        with pytest.raises(FedpeftError, match=f"another {what} than the run .*not 0123"):
            Worker(recipe, other).ready()
