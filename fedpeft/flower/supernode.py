"""A site's SuperNode that runs no code but the fedpeft that is installed there.

    python -m fedpeft.flower.supernode ...     options as of flower-supernode

Flower's nodes run the app that the server sends. Flower 1.41 can check an app's Ed25519 signatures
(``--trusted-entities``; ``supernode/start_client_internal.py``, ``_verify_fab``), but only Flower's
hub delivers signatures: of an app that is submitted to one's own SuperLink,
``superlink/servicer/control/control_handlers.py``, ``start_run``, sets ``verification_dict = {}``,
and a node with trusted entities refuses it. fedpeft's app needs no signature: it is one
``pyproject.toml`` that names the installed package. So this program takes the place of that check:
before an app is stored or run, it must hold nothing else; any other one is answered with Flower's
own verification error. The check is in the site's own process, and neither the server nor who
submits a run can turn it off. With ``--trusted-entities`` an app must pass both.
"""

from __future__ import annotations

import io
import sys
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flwr.common.logger import log
from flwr.supercore.fab import Fab
from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode

WARNING = 30
MAX_FILE = 64 * 1024
"""Bytes of a file of the app."""

MAX_APP = 256 * 1024
PROJECT, CONTENT = "pyproject.toml", ".info/CONTENT"
HARMLESS = {PROJECT, CONTENT, "README.md", "LICENSE"}
"""The files that the app may have; nothing in them is code."""

COMPONENTS = {
    "serverapp": {"fedpeft.flower.server_app:app"},
    "clientapp": {"fedpeft.flower.client_app:app", "fedpeft.flower.shim:app"},
}
"""What the app may name, of the installed package."""

OURS = {"fedpeft": "checked by content"}
"""Stands for trusted entities where Flower was given none; no key has this name."""

Verify = Callable[[Fab, dict[str, str]], bool]


def why_foreign(app: bytes) -> str | None:
    """What makes an app (a FAB, a zip file) another than fedpeft's; None if nothing does."""
    if len(app) > MAX_APP:
        return f"it has {len(app)} bytes"
    try:
        with zipfile.ZipFile(io.BytesIO(app)) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if not set(names) <= HARMLESS or len(set(names)) != len(names):
                return f"it holds {sorted(set(names) - HARMLESS)[:3] or 'a file twice'}"
            if any(entry.file_size > MAX_FILE for entry in entries):
                return "a file in it is too large"
            project = tomllib.loads(archive.read(PROJECT).decode("utf-8"))
    except Exception as error:  # whatever a hostile archive makes the parsers raise
        return f"it cannot be read: {type(error).__name__}"
    try:
        named = project["tool"]["flwr"]["app"]["components"]
        needed = project["project"]["dependencies"]
        known = all(named[key] in COMPONENTS[key] for key in named)
    except (KeyError, TypeError, AttributeError):
        return "its pyproject.toml is none of an app, or it names other components"
    if set(named) != set(COMPONENTS) or not known:
        return f"it names the components {named!r:.200}"
    return "it has dependencies" if needed != [] else None


def checked(verify: Verify) -> Verify:
    """Flower's check of an app against trusted entities, with ours before it."""

    def both(fab: Fab, trusted_entities: dict[str, str]) -> bool:
        why = why_foreign(fab.content)
        if why is not None:
            log(WARNING, "Refused an app that is not fedpeft's: %s.", why)
            return False
        return trusted_entities is OURS or verify(fab, trusted_entities)

    return both


def pulling(pull: Callable[..., int | None]) -> Callable[..., int | None]:
    """Flower's pulling of a message, with every app checked."""

    def pull_checked(**given: Any) -> int | None:
        changed = dict(given)
        if not given["trusted_entities"]:
            fetch: Callable[[str, int], Fab] = given["get_fab"]

            def get_fab(fab_hash: str, run_id: int) -> Fab:
                found = fetch(fab_hash, run_id)
                return replace(found, verifications={"valid_license": "not asked"})

            changed |= {"get_fab": get_fab, "trusted_entities": OURS}
        return pull(**changed)

    return pull_checked


def main() -> None:
    """``flower-supernode``, with the check in place."""
    own: Any = start_client_internal
    own._verify_fab = checked(own._verify_fab)
    own._pull_and_store_message = pulling(own._pull_and_store_message)
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
