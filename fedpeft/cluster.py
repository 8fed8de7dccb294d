"""Ray, started and left: a local one of what a run needs, or the cluster of ``RAY_ADDRESS``.

Whatever happens, no process that was started here is left behind.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import psutil
import ray

from fedpeft.errors import FedpeftError

REAP = 30.0
"""Seconds that Ray's own processes may take to end; they need one or two."""

REACH = 10.0
"""Seconds in which the head of a cluster must answer."""

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; without it, it warns
}


@contextmanager
def connected(cpus: int, gpus: int, threads: int) -> Iterator[None]:
    """Ray in this process, for as long as the block lasts.

    The Ray that runs in this process already, and is left running; else the cluster that the
    environment variable ``RAY_ADDRESS`` names (HOST:PORT of its head); else a local one with so
    many CPU cores and GPUs. Raises FedpeftError where the cluster cannot be joined.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    leave = ray.shutdown if address else stop
    try:
        if address:
            _join(address)
        else:
            start(cpus, gpus, threads)
        yield
    finally:
        leave()


def start(cpus: int, gpus: int | None, threads: int) -> None:
    """Starts a local Ray whose workers import what this process can.

    gpus: None for all there are. threads: of OpenMP in each worker.
    """
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
    }
    with environment(_QUIET | settings):
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


def _join(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():  # Ray itself would try for ten minutes
            socket.create_connection((host, int(port)), timeout=REACH).close()
        with environment(_QUIET):
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FedpeftError(
            f"RAY_ADDRESS={address!r} names no Ray cluster that can be joined: {reason} Start it "
            f"with `ray start --head`, or unset RAY_ADDRESS to use this machine alone."
        ) from error


def stop() -> None:
    """Ends what ``start`` began; kills it where it takes longer than ``REAP``."""
    ending = processes("ray::", os.path.dirname(ray.__file__) + os.sep)
    ray.shutdown()
    for process in psutil.wait_procs(ending, timeout=REAP)[1]:
        process.kill()


def processes(*marks: str) -> list[psutil.Process]:
    """Processes below this one whose command line holds one of ``marks``."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            if any(mark in command for mark in marks):
                found.append(process)
    return found


@contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the processes that are started inside."""
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:  # what Ray sets besides (its own debugger) goes too
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({n: v for n, v in before.items() if os.environ.get(n) != v})
