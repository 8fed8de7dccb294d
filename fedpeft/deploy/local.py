"""A deployment on this machine alone: every role a process of its own, over loopback.

TLS, node authentication and node configurations are those of the real machines; only addresses are
others. What Flower itself keeps lies in a folder that is deleted at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft.deploy import commands, trial
from fedpeft.deploy.create import RUN
from fedpeft.deploy.layout import SERVER, SITES, Deployment, read
from fedpeft.deploy.processes import Process, Processes, interruptible, stop
from fedpeft.errors import FedpeftError

HOST = "127.0.0.1"
COMPLETED = "finished:completed"

COMMAND_SECONDS = 300.0
"""For the server to listen, and for each of Flower's commands."""

JOIN_SECONDS = 600.0
"""For all sites to join: they load model and data on the same cores."""

LOOK_SECONDS = 0.5
"""Between two looks at the run's log."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

FAILS = 3
"""Ends of a run without a checkpoint more, after which it is not started again."""

VIEWS = 5
"""How often the log is asked for where it ends before the run does."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """A run that was completed.

    adapter: its folder. seconds: of the run. down, up: bytes from and to the server, as Flower
    counts them.
    """

    adapter: Path
    seconds: float
    down: int
    up: int


@dataclass(frozen=True)
class Settings:
    """How a trial goes.

    resume: go on with the run in the server's folder. restart: start again what dies, as systemd
    would, and go on with a run that ended with it. run_config: further run config of Flower's, as
    ``reply-timeout=60``.
    """

    resume: bool = False
    restart: bool = False
    run_config: str = ""


def up(folder: Path, say: Say, settings: Settings | None = None) -> Outcome:
    """Starts server and sites, plays the recipe once, ends all processes.

    folder: of ``create.init``; its ``logs/`` gets what each process prints. say: called with every
    line that a person wants to see.

    Raises FedpeftError where something does not start, and where the run does not end as completed.
    """
    folder = folder.resolve()
    deployment = read(folder)
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    own = settings or Settings()
    with contextlib.ExitStack() as stack:
        stack.enter_context(interruptible())
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedpeft-")))
        processes = stack.enter_context(Processes(logs, environment(len(deployment.sites))))
        stack.callback((logs / trial.NOTE).unlink, missing_ok=True)
        return _Federation(folder, deployment, scratch, processes, say, own).play()


@dataclass
class _Federation:
    folder: Path
    deployment: Deployment
    scratch: Path
    processes: Processes
    say: Say
    settings: Settings = field(default_factory=Settings)
    lost: set[str] = field(default_factory=set)

    def play(self) -> Outcome:
        port, *ports = free_ports(1 + len(self.deployment.sites))
        server = self._serve(port)
        self.say(f"the server listens on {HOST}:{port}; logs are in {self.folder / 'logs'}")
        names = self.deployment.sites
        for site in names:
            self._flwr(commands.register(site))
        for site in names:
            self._stay(site)
        for site, own in zip(names, ports, strict=True):
            self._join(site, port, own)
        self.say(f"{len(names)} sites are started: {', '.join(names)}")
        found = self._played(server, port)
        traffic = found["network-traffic"]
        return Outcome(
            self.folder / SERVER / RUN / "adapter",
            float(found["elapsed"]),
            int(traffic["outbound-bytes"]),
            int(traffic["inbound-bytes"]),
        )

    def _played(self, server: Process, port: int) -> Any:
        """What Flower says of the run that was completed, the last of those that it took."""
        resume, fails, before = self.settings.resume, 0, self._progress()
        while True:
            found = self._once(server, port, resume)
            if found["status"] == COMPLETED:
                return found
            now = self._progress()
            fails = 1 if now != before else fails + 1
            text = f"the run ended as {found['status']} ({found['status-details']})"
            if not self.settings.restart or fails > FAILS:
                raise FedpeftError(f"{text}: see {self.folder / 'logs'}.")
            before, resume = now, bool(now)
            self.say(f"{text}: {'going on from its last checkpoint' if resume else 'once more'}")

    def _progress(self) -> list[str]:
        """The checkpoints of the run in the server's folder."""
        return sorted(p.name for p in (self.folder / SERVER / RUN / "checkpoints").glob("round-*"))

    def _once(self, server: Process, port: int, resume: bool) -> Any:
        """What Flower says of one run of its own, from its submission to its end."""
        own = self.settings.run_config
        more = [own, f"resume={str(resume).lower()}"]
        if "join-timeout" not in own:
            more.append(f"join-timeout={JOIN_SECONDS}")
        command = commands.run(self.deployment, " ".join(filter(None, more)))
        run = str(self._flwr(command)["run-id"])
        for _ in range(VIEWS):
            self._follow(run, server, port)
            [found] = self._flwr(["flwr", "list", commands.CONNECTION, "--run-id", run])["runs"]
            if found["status"].startswith("finished"):
                break
        return found

    def _serve(self, port: int) -> Process:
        home = self.scratch / SERVER
        home.mkdir()
        certificate = str(self.folder / SERVER / "ca.crt")
        text = commands.connection(f"{HOST}:{port}", certificate)
        (home / "config.toml").write_text(text, encoding="utf-8")
        command = [*commands.superlink(HOST, port), "--database", str(home / "superlink.db")]
        server = self._start("server", command, self.folder / SERVER, home)
        server.until(lambda: listens(port), "it listened", COMMAND_SECONDS)
        trial.note(self.folder / "logs", f"{HOST}:{port}")
        return server

    def _stay(self, site: str) -> Process:
        """The site's process, which its node hands messages to once it is there."""
        own = self.folder / SITES / site
        return self._start(f"process-{site}", commands.resident("."), own, self.scratch / site)

    def _join(self, site: str, port: int, own: int) -> Process:
        command = commands.supernode(self.deployment, site, f"{HOST}:{port}", own)
        return self._start(f"site-{site}", command, self.folder / SITES / site, self.scratch / site)

    def _follow(self, run: str, server: Process, port: int) -> None:
        """Shows the run's log until Flower says that it is at its end."""
        command = ["flwr", "log", run, commands.CONNECTION, "--stream"]
        home = self.scratch / "viewer"
        home.mkdir(exist_ok=True)
        shutil.copyfile(self.scratch / SERVER / "config.toml", home / "config.toml")
        viewer = self._start("run", command, self.folder / SERVER, home)
        with viewer.log.open(encoding="utf-8", errors="replace") as lines:
            over = False
            while not over:
                over = viewer.ended(LOOK_SECONDS)
                for line in filter(None, (_COLOUR.sub("", line).rstrip() for line in lines)):
                    self.say(line)
                over = self._tend(server, port) or over
        stop([viewer.popen])
        self.processes.started.remove(viewer)

    def _tend(self, server: Process, port: int) -> bool:
        """Sees to what has ended; whether the server was among it, and is there again."""
        dead = [p for p in self.processes.started if p.name != "run" and p.ended()]
        if server in dead and not self.settings.restart:
            raise FedpeftError(
                f"the server ended with {server.popen.returncode} in the middle of the run: see "
                f"{server.log}."
            )
        for process in dead:
            if not process.due and process.name not in self.lost:
                code = process.popen.returncode
                self.say(f"{process.name} ended with {code}: see {process.log}")
                if not self.settings.restart:
                    self.lost.add(process.name)
            waits = process is not server and process.waits(time.monotonic())
            if self.settings.restart and not waits:
                self.processes.restart(process)
                self.say(f"{process.name} is started again")
        if server not in dead:
            return False
        server.until(lambda: listens(port), "it listened again", COMMAND_SECONDS)
        return True

    def _start(self, name: str, command: Sequence[str], folder: Path, home: Path) -> Process:
        return self.processes.start(name, [*_program(command[0]), *command[1:]], folder, home)

    def _flwr(self, command: Sequence[str]) -> Any:
        """What one of Flower's commands answers. Raises FedpeftError where it fails."""
        home = {"FLWR_HOME": str(self.scratch / SERVER)}
        own = {**self.processes.environment, **home}
        asked = [*command, "--format", "json"]
        return answer(asked, self.folder / SERVER, own, COMMAND_SECONDS)


def answer(command: Sequence[str], folder: Path, own: Mapping[str, str], seconds: float) -> Any:
    """What a command says in JSON. folder: where it is started. own: its environment.

    Raises FedpeftError where it fails, and where it takes longer than ``seconds``.
    """
    try:
        done = subprocess.run(
            [*_program(command[0]), *command[1:]],
            cwd=folder,
            env=own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise FedpeftError(
            f"`{' '.join(command)}` has not answered within {seconds:g} seconds: is the server "
            f"overloaded, or does a firewall drop what is sent to it?"
        ) from None
    try:
        found = json.loads(done.stdout)
        failed = done.returncode != 0 or not found["success"]
    except (ValueError, KeyError, TypeError):
        failed = True
    if failed:
        raise FedpeftError(
            f"`{' '.join(command)}` failed with {done.returncode}: "
            f"{(done.stderr or done.stdout).strip()[-2000:]}"
        )
    return found


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody uses now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [int(one.getsockname()[1]) for one in sockets]


def listens(port: int) -> bool:
    """Whether somebody answers on a port of loopback."""
    with socket.socket() as one:
        one.settimeout(1.0)
        return one.connect_ex((HOST, port)) == 0


def _program(name: str) -> list[str]:
    """A program of this Python's environment. Raises FedpeftError where it is missing."""
    if name == commands.NODES:
        return [sys.executable, "-P", "-m", name]
    found = Path(sysconfig.get_path("scripts")) / name
    if not found.exists():
        raise FedpeftError(f"{name} is not installed beside this Python: pip install flwr.")
    return [str(found)]


def environment(sites: int) -> Mapping[str, str]:
    """Of all processes: the cores are shared, and loopback is never asked of a proxy."""
    own = os.environ
    threads = max(1, (os.cpu_count() or 1) // sites)
    return {
        "OMP_NUM_THREADS": str(threads),
        **own,
        **commands.ENVIRONMENT,
        "NO_PROXY": ",".join(filter(None, (own.get("NO_PROXY"), HOST))),
        "PATH": os.pathsep.join(filter(None, (sysconfig.get_path("scripts"), own.get("PATH")))),
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",  # the logs are files
    }
