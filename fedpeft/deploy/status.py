"""What a deployment is doing: its sites, Flower's runs, and what the run folder says.

While the server runs it is asked; when it does not answer, the record is shown all the same.
"""

from __future__ import annotations

import json
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)

from fedpeft.config import Recipe
from fedpeft.config_load import parse_recipe
from fedpeft.deploy import commands, trial
from fedpeft.deploy.layout import CA, NOTE, SERVER, SITES, check_sites, read
from fedpeft.deploy.local import answer, environment
from fedpeft.deploy.renew import WARNED_DAYS, certificate
from fedpeft.errors import FedpeftError
from fedpeft.observe.progress import Progress, Spent, progress, spent

ANSWER_SECONDS = 60.0
"""For the server to say who is there: Flower's programs take seconds to start."""


@dataclass(frozen=True)
class Site:
    """A site by its client's name.

    state: ``online``, ``offline``, ``registered`` (never seen), ``not registered``, or ``unknown``
    where the server does not answer. since: ISO 8601, when it came online or was last seen; or
    empty. privacy: what is on its own ledger, where the folder has it.
    """

    name: str
    state: str
    since: str
    privacy: Spent | None


@dataclass(frozen=True)
class Run:
    """A run as Flower counts it; seconds from its start, bytes over the wire to and from sites."""

    id: str
    status: str
    details: str
    seconds: float
    down: int
    up: int


@dataclass(frozen=True)
class Status:
    """See the module. server: its address. unreachable: why it did not answer; empty if it did.

    certificate_ends: ISO 8601. warnings: what somebody should see to.
    """

    server: str
    unreachable: str
    sites: tuple[Site, ...]
    runs: tuple[Run, ...]
    progress: Progress
    certificate_ends: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """Where things are, in a whole folder or in a server's own."""

    server: Path
    sites: tuple[str, ...]
    address: str
    recipe: Recipe


def status(folder: Path, now: datetime) -> Status:
    """The status of the deployment whose folder, or whose server's folder, this is.

    now: aware of its zone. Raises FedpeftError where the folder is neither.
    """
    warnings: list[str] = []
    place = _place(folder, warnings)
    nodes: Mapping[str, Any] = {}
    runs: tuple[Run, ...] = ()
    unreachable = ""
    try:
        nodes, runs = _ask(place, warnings)
    except FedpeftError as error:
        unreachable = str(error)
    ends = certificate(place.server / "server.crt").not_valid_after_utc
    for path in (place.server / "server.crt", folder / CA / "ca.crt"):
        if path.exists():
            warnings += _aged(path, now)
    run = place.server / place.recipe.output.folder
    try:
        done = progress(run, place.recipe)
    except FedpeftError as error:
        warnings.append(str(error))
        done = Progress(0, place.recipe.rounds.count)
    sites = []
    for name in place.sites:
        node = nodes.get(name, {"status": "unknown" if unreachable else "not registered"})
        since = node.get("online" if node["status"] == "online" else "offline") or ""
        sites.append(Site(name, node["status"], since, _own(folder, name, place.recipe, warnings)))
    return Status(
        place.address, unreachable, tuple(sites), runs, done, ends.isoformat(), tuple(warnings)
    )


def _place(folder: Path, warnings: list[str]) -> _Place:
    if (folder / NOTE).exists() or not (folder / "flower" / "config.toml").exists():
        deployment = read(folder)
        server, sites, address = folder / SERVER, deployment.sites, deployment.server
        try:
            address = trial.find(folder / "logs") or address
        except FedpeftError as error:
            warnings.append(str(error))
    else:
        server = folder
        try:
            sites = check_sites(list(json.loads((server / "all.json").read_bytes())))
            told = tomllib.loads((server / "flower" / "config.toml").read_text(encoding="utf-8"))
            address = str(told["superlink"][commands.CONNECTION]["address"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FedpeftError(
                f"DIR={str(folder)!r} is no whole server's folder: {error}. Copy `server/` again "
                f"from the folder that `fedpeft deploy init` wrote."
            ) from error
    try:
        text = (server / "recipe.yaml").read_text(encoding="utf-8")
    except OSError as error:
        raise FedpeftError(f"{server / 'recipe.yaml'} cannot be read: {error.strerror}.") from error
    return _Place(server, sites, address, parse_recipe(text, str(server / "recipe.yaml")))


def _ask(place: _Place, warnings: list[str]) -> tuple[dict[str, Any], tuple[Run, ...]]:
    """Nodes by the names of sites, and runs. Raises FedpeftError where the server is silent."""
    with tempfile.TemporaryDirectory(prefix="fedpeft-") as home:
        text = commands.connection(place.address, str((place.server / "ca.crt").resolve()))
        (Path(home) / "config.toml").write_text(text, encoding="utf-8")
        own = {**environment(1), "FLWR_HOME": home}
        command = commands.nodes(place.address)
        nodes = answer(command, place.server, own, ANSWER_SECONDS)["nodes"]
        runs = answer(commands.runs(), place.server, own, ANSWER_SECONDS)["runs"]
    names = _keys(place)
    strangers = sum(node["key"].strip() not in names for node in nodes)
    if strangers:
        warnings.append(
            f"{strangers} nodes are registered whose keys are in no file of "
            f"{place.server / SITES}: `flwr supernode list` shows them, `flwr supernode "
            f"unregister` ends their right to take part."
        )
    by_name = {names[n["key"].strip()]: n for n in nodes if n["key"].strip() in names}
    return by_name, tuple(map(_run, runs))


def _keys(place: _Place) -> dict[str, str]:
    """The sites' public keys as Flower has them (PEM) -> name."""
    found = {}
    for name in place.sites:
        path = place.server / SITES / f"{name}.pub"
        try:
            key = load_ssh_public_key(path.read_bytes())
        except (OSError, ValueError) as error:
            raise FedpeftError(f"{path} is no public key of a node: {error}.") from error
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        found[pem.decode().strip()] = name
    return found


def _run(told: Mapping[str, Any]) -> Run:
    traffic = told["network-traffic"]
    return Run(
        str(told["run-id"]),
        str(told["status"]),
        str(told["status-details"]),
        float(told["elapsed"]),
        int(traffic["outbound-bytes"]),
        int(traffic["inbound-bytes"]),
    )


def _own(folder: Path, site: str, recipe: Recipe, warnings: list[str]) -> Spent | None:
    try:
        return spent(folder / SITES / site / "privacy.jsonl", recipe)
    except FedpeftError as error:
        warnings.append(str(error))
        return None


def _aged(path: Path, now: datetime) -> list[str]:
    """A sentence where a certificate is at its end, or near it."""
    ends = certificate(path).not_valid_after_utc
    if ends - now > timedelta(days=WARNED_DAYS):
        return []
    when = "ended" if ends <= now else "ends"
    way = "fedpeft deploy renew DIR" if path.name == "server.crt" else "fedpeft deploy init"
    return [f"{path} {when} on {ends:%Y-%m-%d}: `{way}`, where the authority's key is."]
