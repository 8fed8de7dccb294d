"""What a run was computed with: hardware and versions, nothing that identifies a user."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = (
    "fedpeft",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "flwr",
    "flwr-datasets",
    "datasets",
    "ray",
    "safetensors",
    "numpy",
    "omegaconf",
)


def describe() -> dict[str, object]:
    """The environment as JSON-able values.

    No environment variables, host, user or path names: the file may be published with the results.
    """
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {
            "model": _cpu_model(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        },
        "threads": {
            "intra_op": torch.get_num_threads(),
            "inter_op": torch.get_num_interop_threads(),
        },
        "cuda": _cuda(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": _git(Path(__file__).parents[1]),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _cuda() -> dict[str, object] | None:
    if not torch.cuda.is_available():
        return None
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "version": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "devices": [{"name": d.name, "memory_bytes": d.total_memory} for d in devices],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(package: Path) -> dict[str, object] | None:
    """Revision of the checkout that ``package`` is part of; None where it is no checkout."""
    top = _run_git(package, "rev-parse", "--show-toplevel")
    revision = _run_git(package, "rev-parse", "--verify", "HEAD")
    if not top or not revision or Path(top) / package.name != package.resolve():
        return None
    changes = _run_git(package, "status", "--porcelain", "--untracked-files=no")
    return {"revision": revision, "modified": bool(changes)}


def _run_git(folder: Path, *arguments: str) -> str | None:
    """Git's answer; None without git, or where it refuses."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            env=clean,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
