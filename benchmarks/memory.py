"""Peak memory of a process and all its descendants, sampled from outside."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil


def resident(pid: int) -> tuple[int, bool]:
    """Bytes of a process and whether they are its proportional share (PSS), else RSS."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024, True
    except OSError:
        pass
    return int(psutil.Process(pid).memory_info().rss), False


class Sampler:
    """Samples the tree under a process every ``interval`` seconds until stopped.

    peak: largest sum in bytes. proportional: pages shared within the tree were counted once (PSS).
    seen: every process that was ever in the tree.
    """

    def __init__(self, root: int, interval: float = 1.0) -> None:
        self.peak = 0
        self.proportional = True
        self.seen: set[psutil.Process] = set()
        self._root = root
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the sampling."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        self._sample()
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        try:
            top = psutil.Process(self._root)
            tree = [top, *top.children(recursive=True)]
        except psutil.Error:
            return
        self.seen.update(tree)
        total = 0
        for process in tree:
            try:
                size, proportional = resident(process.pid)
            except psutil.Error:
                continue
            total += size
            self.proportional &= proportional
        self.peak = max(self.peak, total)
