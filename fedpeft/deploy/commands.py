"""The command lines of a deployment, the same in README, units, containers and on loopback.

Paths in them are relative: the server's to ``server/``, a site's to its own folder, in which they
are started. Flower's own child processes are started there too.
"""

from __future__ import annotations

import json

from fedpeft.deploy.layout import Deployment

CONNECTION = "fedpeft"
"""What Flower's ``config.toml`` calls the server."""

SOCKET = "resident/site.sock"
"""Where a site's process listens, in a folder that only its user can enter."""

POLICY = "policy.yaml"
"""What a site's operator allows."""
NODES = "fedpeft.flower.nodes"
"""A program of fedpeft's own: what ``flwr supernode list`` does not show."""

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""No word to the outside, and no installation of packages at the start of a run."""


SUPERNODE = ("python3", "-P", "-m", "fedpeft.flower.supernode")
"""In the place of ``flower-supernode``, with its options."""


def superlink(host: str, port: int) -> list[str]:
    """The server, for any address of ``host``, with TLS and node authentication."""
    return [
        *("flower-superlink", "--host", host, "--port", str(port)),
        *("--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt"),
        *("--ssl-keyfile", "server.key", "--enable-supernode-auth"),
        "--disable-runtime-dependency-installation",
    ]


def supernode(deployment: Deployment, site: str, server: str, port: int) -> list[str]:
    """A site, which runs no app but fedpeft's (``flower.supernode``).

    server: ``host:port``. port: on loopback, for its own processes.
    """
    return [
        *SUPERNODE,
        *("--superlink", server, "--root-certificates", "ca.crt"),
        *("--auth-supernode-private-key", "node.key", "--port", str(port)),
        *("--node-config", node_config(deployment, site)),
    ]


def resident(site: str) -> list[str]:
    """A site's own process, which answers the messages that its node gets. site: its folder."""
    return ["fedpeft", "site", site]


def node_config(deployment: Deployment, site: str) -> str:
    """What a site's operator tells its node: its client, and the rules that bind it."""
    return " ".join(f'{key}="{value}"' for key, value in settings(deployment, site).items())


def settings(deployment: Deployment, site: str) -> dict[str, str]:
    """The node config by key; the site's process goes by the same, from ``site.json``."""
    found = {"client": site, "socket": SOCKET, "state": "state", "policy": POLICY}
    if deployment.secure:
        found |= {"identity": "identity.key", "identities": "all.json"}
    if deployment.ledgers:
        found["privacy-ledger"] = "privacy.jsonl"
    return found


def run_config(deployment: Deployment) -> str:
    """What the server's app is told."""
    return 'recipe="recipe.yaml"' + (' identities="all.json"' if deployment.secure else "")


def register(site: str) -> list[str]:
    """Makes a site's key known to the server."""
    return ["flwr", "supernode", "register", f"sites/{site}.pub", CONNECTION]


def run(deployment: Deployment, more: str = "") -> list[str]:
    """Submits a run. more: further run config."""
    config = " ".join(filter(None, (run_config(deployment), more)))
    return ["flwr", "run", "app", CONNECTION, "--run-config", config]


def nodes(server: str) -> list[str]:
    """Lists nodes with their keys. server: ``host:port``."""
    return [NODES, server, "ca.crt"]


def runs() -> list[str]:
    """Lists runs."""
    return ["flwr", "list", CONNECTION, "--format", "json"]


def connection(server: str, certificate: str) -> str:
    """Flower's ``config.toml``. certificate: absolute path of the authority's, on that machine."""
    return (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "{server}"\nroot-certificates = {json.dumps(certificate)}\n'
    )
