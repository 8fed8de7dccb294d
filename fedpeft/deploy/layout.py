"""What a deployment is, and where everything lies in its folder.

::

    README.md              the commands, in order, for each machine
    deployment.json        what ``Deployment`` says
    compose.yaml           all machines as containers; with Dockerfile
    ca/                    the certificate authority; ca.key belongs on none of the machines
    server/                goes to the server, whole
    sites/NAME/            goes to that site, whole, and to nobody else

Nothing in one site's folder is secret of another site's.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedpeft.errors import FedpeftError

FORMAT = 1
NOTE = "deployment.json"
CA, SERVER, SITES = "ca", "server", "sites"
HOME = "/var/lib/fedpeft"
"""Where README and units expect ``server/``, ``site/`` and ``venv/`` on the machines."""

_FAULTS = (OSError, ValueError, TypeError, KeyError, AttributeError)
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Deployment:
    """The sites, which are the recipe's clients by name, and where they reach the server.

    secure: whether the recipe aggregates securely. ledgers: whether each site keeps a privacy
    ledger of its own. Both are what the sites' operators agree to, and bind the nodes
    (``flower.node``).
    """

    sites: tuple[str, ...]
    host: str
    port: int
    secure: bool = False
    ledgers: bool = False

    @property
    def server(self) -> str:
        """``host:port``, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def check_sites(sites: Sequence[str]) -> tuple[str, ...]:
    """The names in order; each becomes a folder. Raises FedpeftError for one that cannot."""
    for name in sites:
        if not _SITE.fullmatch(name):
            raise FedpeftError(
                f"--site {name!r} must be 1 to 63 letters, digits, '_', '-' or '.', the first one "
                f"a letter or digit: it names a folder. Call the recipe's client so."
            )
    twice = sorted({name for name in sites if list(sites).count(name) > 1})
    if twice:
        raise FedpeftError(f"--site {twice[0]!r} is given twice: every site is one client.")
    return tuple(sorted(sites))


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``. Raises FedpeftError."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        good = is_address(host)
    else:
        good = bool(_HOST.fullmatch(host))
    if not good or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise FedpeftError(
            f"--server {text!r} must be HOST:PORT, by which every site reaches the server: a name "
            f"or an IP address (IPv6 in brackets), and a port from 1 to 65535."
        )
    return host, int(port)


def is_address(host: str) -> bool:
    """Whether a host is an IP address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def write(folder: Path, deployment: Deployment) -> None:
    """Writes ``deployment.json``."""
    note = {"format": FORMAT, **asdict(deployment)}
    (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> Deployment:
    """What ``deployment.json`` says. Raises FedpeftError where it is none of ours."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        if note.pop("format") != FORMAT:
            raise ValueError(f"it must be of format {FORMAT}")
        found = Deployment(**{**note, "sites": check_sites(note["sites"])})
        if not (isinstance(found.secure, bool) and isinstance(found.ledgers, bool)):
            raise ValueError("secure and ledgers must be true or false")
        parse_address(found.server)
    except FileNotFoundError:
        raise FedpeftError(
            f"DIR={str(folder)!r} has no {NOTE}: name a folder that `fedpeft deploy init` wrote."
        ) from None
    except (*_FAULTS, RecursionError) as error:
        raise FedpeftError(
            f"{folder / NOTE} cannot be used: {error}. Write the folder again with "
            f"`fedpeft deploy init`."
        ) from error
    return found
