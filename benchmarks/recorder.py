"""What one way notes about itself while it runs: time and CPU per round, first step, adapter."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

COMPARED_AFTER = 3
"""The adapters are compared after this many rounds (or after the last, if there are fewer)."""


def machine_cpu() -> float:
    """CPU seconds that everything on the machine has used, and what the hypervisor took."""
    times = psutil.cpu_times()
    busy = times.user + times.nice + times.system
    for extra in ("irq", "softirq", "steal"):
        busy += getattr(times, extra, 0.0)
    return float(busy)


def cpu_beside_me(root: int) -> float:
    """CPU seconds of the living processes of the tree under ``root``, this process left out."""
    top = psutil.Process(root)
    total = 0.0
    for process in [top, *top.children(recursive=True)]:
        try:
            used = process.cpu_times()
        except psutil.Error:
            continue
        if process.pid != os.getpid():
            total += used.user + used.system
    return total


@dataclass
class Recorder:
    """Writes its findings into ``folder``.

    rounds: how many there will be, the untimed first one counted. root: the process at the top of
    the way's tree. seconds, cpu: per round, wall time and CPU seconds of the tree. others: per
    round, the share of the machine that everything else took. gpu_used: the most bytes in use on
    the GPU, by whatever process, between rounds.
    """

    folder: Path
    rounds: int
    root: int
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    gpu_used: int = 0
    _machine: float = 0.0
    _own: float = 0.0
    _began: float = 0.0

    def begin(self) -> None:
        """The next round begins now."""
        self._machine = machine_cpu()
        self._own = cpu_beside_me(self.root) + time.process_time()
        finish_gpu()
        self._began = time.perf_counter()

    def end(self) -> bool:
        """The round is over. True if its global adapter is the one to compare: ``keep`` it."""
        finish_gpu()
        passed = time.perf_counter() - self._began
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            self.gpu_used = max(self.gpu_used, total - free)
        own = time.process_time() + cpu_beside_me(self.root) - self._own
        rest = max(0.0, machine_cpu() - self._machine - own)
        self.seconds.append(passed)
        self.cpu.append(own)
        self.others.append(rest / (passed * (os.cpu_count() or 1)))
        return len(self.seconds) == min(COMPARED_AFTER, self.rounds)

    def keep(self, adapter: Mapping[str, Tensor]) -> None:
        """Writes ``adapter.safetensors``."""
        values = {name: value.detach().contiguous() for name, value in adapter.items()}
        save_file(values, self.folder / "adapter.safetensors")

    def save(self, notes: Mapping[str, Any]) -> None:
        """Writes ``run.json``."""
        found = {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu,
            "others": self.others,
            **self._gpu_memory(),
            **notes,
        }
        (self.folder / "run.json").write_text(json.dumps(found))

    def _gpu_memory(self) -> dict[str, int]:
        """Bytes on the GPU: the most that torch allocated in this process, and what was in use."""
        if not torch.cuda.is_available():
            return {}
        own = torch.cuda.max_memory_allocated()
        return {"gpu_allocated": own, "gpu_used": self.gpu_used}


def finish_gpu() -> None:
    """Waits for this process's work on the GPU, if it has any."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def mark_first_step(model: nn.Module, folder: Path) -> None:
    """Notes in ``folder/first_step`` when the first step is done: as the second forward begins."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            handle.remove()
            finish_gpu()
            note_once(folder / "first_step")

    handle = model.register_forward_pre_hook(hook)


def note_once(path: Path) -> None:
    """Writes the monotonic time into ``path`` unless another process was first."""
    try:
        with path.open("x") as file:
            file.write(repr(time.monotonic()))
    except FileExistsError:
        pass
