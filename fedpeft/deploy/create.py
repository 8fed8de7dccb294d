"""Writes the folder of a federation: keys, node configuration, units, containers, instructions."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from string import Template

from fedpeft.config import Output, Recipe
from fedpeft.config_load import dump_recipe, load_recipe
from fedpeft.data.partition import client_names
from fedpeft.deploy import commands, keys
from fedpeft.deploy.layout import (
    CA,
    HOME,
    SERVER,
    SITES,
    Deployment,
    check_sites,
    parse_address,
    write,
)
from fedpeft.errors import FedpeftError
from fedpeft.site.folder import write_config
from fedpeft.site.policy import dump_policy
from fedpeft.site.rules import policy_for

CONTAINER = "server"
"""The server's name among containers; its certificate is valid for it too."""

RUN = "run"
"""The run folder, in ``server/``."""


def init(
    folder: Path,
    recipe: str,
    overrides: Sequence[str] = (),
    sites: int | Sequence[str] = (),
    server: str = "localhost:8000",
) -> Deployment:
    """Writes a new federation into ``folder``, which must be new or empty, whole or not at all.

    recipe, overrides: as for a run. sites: how many, with the names that the recipe's partition
    gives its clients, or their names. server: ``host:port`` by which every site reaches the server.

    Raises FedpeftError for a folder that is not empty, and for sites that are not the recipe's
    clients, as far as that can be seen without its data.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FedpeftError(f"DIR={str(folder)!r} is not empty: name a new folder, or an empty one.")
    host, port = parse_address(server)
    loaded = load_recipe(recipe, overrides)
    deployment = Deployment(
        site_names(loaded, sites),
        host,
        port,
        secure=loaded.secure_aggregation.enabled,
        ledgers=loaded.privacy.unit == "record",
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_all(written, folder, deployment, loaded)
        os.replace(written, folder)
    except OSError as error:
        raise FedpeftError(
            f"DIR={str(folder)!r} cannot be written: {error.strerror or error}. Name another one."
        ) from error
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return deployment


def site_names(recipe: Recipe, sites: int | Sequence[str]) -> tuple[str, ...]:
    """The sites by name, ascending. Raises FedpeftError where the recipe has other clients.

    The names of ``partition.kind=natural`` are in the data, which are not read: the nodes refuse a
    name that is none.
    """
    partition = recipe.partition
    natural = partition.kind == "natural"
    if isinstance(sites, int) and natural:
        raise FedpeftError(
            f"--sites {sites} with partition.kind=natural: the clients have names of their own. "
            f"Name each of them: --site NAME."
        )
    count = sites if isinstance(sites, int) else len(sites)
    if count < 1:
        raise FedpeftError("there are no sites: give --sites N, or --site NAME for each.")
    if count != partition.clients and not (natural and partition.clients == 0):
        raise FedpeftError(
            f"{count} sites and partition.clients={partition.clients}: every site is one of the "
            f"recipe's clients. Add partition.clients={count}, or give {partition.clients} sites."
        )
    if natural:
        assert not isinstance(sites, int)
        return check_sites(sites)
    known = tuple(client_names(count))
    given = known if isinstance(sites, int) else check_sites(sites)
    if given != known:
        wrong = next(name for name in given if name not in known)
        raise FedpeftError(
            f"--site {wrong!r} is no client of this recipe: partition.kind={partition.kind} calls "
            f"them {known[0]} to {known[-1]}. Give --sites {count} instead."
        )
    return known


def _write_all(at: Path, folder: Path, deployment: Deployment, recipe: Recipe) -> None:
    """at: where the files are written. folder: where they will be."""
    for name in (CA, SERVER, SITES):
        (at / name).mkdir()
    authority = keys.Authority.new(datetime.now(UTC))
    authority.write(at / CA)
    listed = {}
    for site in deployment.sites:
        listed[site] = _write_site(at, deployment, site, recipe)
    _write_server(at, deployment, recipe, authority)
    for place in (at / SERVER, *(at / SITES / site for site in deployment.sites)):
        (place / "all.json").write_text(json.dumps(listed, indent=2) + "\n")
        shutil.copyfile(at / CA / "ca.crt", place / "ca.crt")
    write(at, deployment)
    _fill(at / "README.md", "README.md", _told(deployment, recipe, folder))
    _fill(at / "Dockerfile", "Dockerfile", {"home": HOME, "wheel": _wheel()})
    (at / ".dockerignore").write_text("*\n!*.whl\n")  # no key is handed to the builder
    _write_containers(at, deployment, recipe)


def _write_site(at: Path, deployment: Deployment, site: str, recipe: Recipe) -> str:
    """A site's folder; returns its public identity."""
    place = at / SITES / site
    place.mkdir(mode=0o700)
    public = keys.write_node_key(place)
    known = at / SERVER / SITES
    known.mkdir(exist_ok=True)
    (known / f"{site}.pub").write_bytes(public)
    write_config(place, commands.settings(deployment, site))
    values = {"site": site, "policy": dump_policy(policy_for(recipe))}
    _fill(place / commands.POLICY, "policy.yaml", values)
    command = commands.supernode(deployment, site, deployment.server, 9094)
    home = f"{HOME}/site"
    _write_unit(place / "fedpeft-site.service", f"site {site}", home, commands.resident("."))
    _write_unit(place / "fedpeft-node.service", f"Flower's node of {site}", home, command)
    return keys.write_identity(place)


def _write_server(
    at: Path, deployment: Deployment, recipe: Recipe, authority: keys.Authority
) -> None:
    place = at / SERVER
    authority.write_server(place, [deployment.host, "localhost", "127.0.0.1", CONTAINER])
    (place / "recipe.yaml").write_text(dump_recipe(replace(recipe, output=Output(folder=RUN))))
    (place / "app").mkdir()
    _fill(place / "app" / "pyproject.toml", "app.toml", {})
    (place / "flower").mkdir()
    here = f"127.0.0.1:{deployment.port}"
    text = commands.connection(here, f"{HOME}/{SERVER}/ca.crt")
    (place / "flower" / "config.toml").write_text(text)
    _write_unit(place / "fedpeft-server.service", "server", f"{HOME}/{SERVER}", _serve(deployment))


def _serve(deployment: Deployment) -> list[str]:
    """The server for every address of its machine; it remembers the sites' keys."""
    return [*commands.superlink("0.0.0.0", deployment.port), "--database", "superlink.db"]


def _write_unit(path: Path, what: str, folder: str, command: Sequence[str]) -> None:
    values = {
        "what": what,
        "home": HOME,
        "folder": folder,
        "command": shlex.join([f"{HOME}/venv/bin/{command[0]}", *command[1:]]),
        "environment": _environment(),
    }
    _fill(path, "unit.service", values)


def _write_containers(at: Path, deployment: Deployment, recipe: Recipe) -> None:
    """``compose.yaml``, as JSON, which is YAML."""
    shared = [f"{path}:{path}:ro" for path in _paths(recipe)]

    def service(own: str, place: str, command: Sequence[str]) -> dict[str, object]:
        return {
            "build": ".",
            "working_dir": f"{HOME}/{place}",
            "command": list(command),
            "environment": {**commands.ENVIRONMENT, "FLWR_HOME": f"{HOME}/{place}/flower"},
            "volumes": [f"./{own}:{HOME}/{place}", *shared],
        }

    services = {CONTAINER: service(SERVER, SERVER, _serve(deployment))}
    for site in deployment.sites:
        own = f"{SITES}/{site}"
        command = commands.supernode(deployment, site, f"{CONTAINER}:{deployment.port}", 9094)
        services[f"site-{site}"] = service(own, "site", commands.resident("."))
        services[f"node-{site}"] = {
            **service(own, "site", command),
            "depends_on": [CONTAINER, f"site-{site}"],
        }
    (at / "compose.yaml").write_text(json.dumps({"services": services}, indent=2) + "\n")


def _told(deployment: Deployment, recipe: Recipe, folder: Path) -> dict[str, str]:
    """What README's template leaves open."""
    registers = [shlex.join(commands.register(site)) for site in deployment.sites]
    paths, rules, state = _paths(recipe), [], ["`state/`"]
    if deployment.secure:
        rules.append(" Sites train under secure aggregation only.")
        state.append("`identity.key.state` beside the identity")
    if deployment.ledgers:
        rules.append(" Each site keeps a privacy ledger of its own.")
        state.append("`privacy.jsonl`")
    kept = f" Never restore {' or '.join(state)} from a backup."
    return {
        "count": str(len(deployment.sites)),
        "version": metadata.version("fedpeft"),
        "wheel": _wheel(),
        "server": deployment.server,
        "host": deployment.host,
        "port": str(deployment.port),
        "names": ", ".join(f"`{site}`" for site in deployment.sites),
        "rules": "".join(rules),
        "folder": shlex.quote(str(folder)),
        "paths": f": {', '.join(f'`{path}`' for path in paths)}" if paths else "",
        "home": HOME,
        "environment": _environment(),
        "register": "\n".join(registers),
        "compose_register": "\n".join(f"docker compose exec server {r}" for r in registers),
        "run": shlex.join(commands.run(deployment)),
        "resume": shlex.join(commands.run(deployment, "resume=true")),
        "connection": commands.CONNECTION,
        "sites": "\n".join(f"| `{site}` | `{SITES}/{site}/` |" for site in deployment.sites),
        "site_state": kept,
    }


def _paths(recipe: Recipe) -> list[str]:
    """The folders and files that the recipe names."""
    named = dict.fromkeys((recipe.data.source, recipe.model.name, recipe.adapter.get("start")))
    return [name for name in named if isinstance(name, str) and os.path.isabs(name)]


def _environment() -> str:
    return " ".join(f"{key}={value}" for key, value in commands.ENVIRONMENT.items())


def _wheel() -> str:
    return f"fedpeft-{metadata.version('fedpeft')}-py3-none-any.whl"


def _fill(path: Path, template: str, values: Mapping[str, str]) -> None:
    text = (resources.files("fedpeft.deploy") / "templates" / template).read_text("utf-8")
    path.write_text(Template(text).substitute(values), encoding="utf-8")
