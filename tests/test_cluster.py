"""A cluster is joined or refused at once; the environment comes back as it was."""

from __future__ import annotations

import os
import socket

import pytest
import ray

from fedpeft import cluster
from fedpeft.errors import FedpeftError


def test_a_cluster_that_is_not_there_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    refused = pytest.raises(FedpeftError, match=rf"^RAY_ADDRESS='{address}' names .*`ray start")
    with refused, cluster.connected(cpus=2, gpus=0, threads=1):
        pass
    assert not ray.is_initialized()


def test_the_environment_comes_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPEFT_KEPT", "before")
    before = dict(os.environ)
    with pytest.raises(OSError, match="inside"), cluster.environment({"FEDPEFT_KEPT": "now"}):
        assert os.environ["FEDPEFT_KEPT"] == "now"
        os.environ["FEDPEFT_OTHER"] = "set inside"
        raise OSError("inside")
    assert dict(os.environ) == before
