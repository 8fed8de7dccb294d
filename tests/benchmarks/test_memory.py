from __future__ import annotations

import subprocess
import sys

import psutil

from benchmarks.memory import Sampler, resident

HOLD = "import sys; held = bytearray(b'x' * {size}); print('ready', flush=True); sys.stdin.read()"
SIZE = 60_000_000


def test_the_peak_counts_the_whole_tree() -> None:
    held = HOLD.format(size=SIZE)
    spawn = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    child = subprocess.Popen(
        [sys.executable, "-c", spawn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        sampler = Sampler(child.pid)
        sampler.stop()
        assert sampler.peak > SIZE
        assert len(sampler.seen) == 2
        assert resident(child.pid)[0] < SIZE
    finally:
        child.communicate()


def test_a_process_that_is_gone_has_no_peak() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert not psutil.pid_exists(child.pid)
    sampler = Sampler(child.pid)
    sampler.stop()
    assert sampler.peak == 0 and sampler.seen == set()
