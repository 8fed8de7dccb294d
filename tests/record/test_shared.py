"""What many clients keep alike is written once, and comes back to each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fedpeft.record.checkpoint import Checkpoint, latest, save


@dataclass(frozen=True)
class State:
    step: int


def test_a_tree_that_clients_share_is_written_once(tmp_path: Path) -> None:
    common = {"x": torch.rand(1000)}
    memory = {f"c{k}": {"kept": common, "own": {"x": torch.tensor(k)}} for k in range(50)}
    path = save(tmp_path, Checkpoint(1, State(1), memory, {}), keep=1)
    assert sum(f.stat().st_size for f in path.glob("*.safetensors")) < 4000 + 50 * 100
    found = latest(tmp_path, State)[0].memory
    for k in range(50):
        assert torch.equal(found[f"c{k}"]["kept"]["x"], common["x"])
        assert int(found[f"c{k}"]["own"]["x"]) == k
