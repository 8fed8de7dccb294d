"""``site.json``: what a site's folder says of its node, the same for the node and its process.

::

    {"format": 1, "config": {"client": NAME, "socket": PATH, "state": DIR, "policy": FILE, ...}}

``config`` is the node config of Flower's SuperNode. Paths are relative to the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedpeft.errors import FedpeftError

FORMAT = 1
NOTE = "site.json"

Config = Mapping[str, str | int | float | bool]


def write_config(folder: Path, config: Config) -> None:
    """Writes ``site.json``."""
    note = {"format": FORMAT, "config": dict(config)}
    (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path) -> Config:
    """The site's node config. Raises FedpeftError where the folder has none."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        config = note["config"]
        if note["format"] != FORMAT or not isinstance(config, dict):
            raise ValueError(f"it must be of format {FORMAT}")
        for key, value in config.items():
            if not isinstance(value, str | int | float | bool):
                raise ValueError(f"{key} must be text or a number")
    except FileNotFoundError:
        raise FedpeftError(
            f"DIR={str(folder)!r} has no {NOTE}: name a site's folder, as `fedpeft deploy init` "
            f"writes them."
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FedpeftError(f"{folder / NOTE} cannot be used: {error}.") from error
    for key in ("client", "socket"):
        if not config.get(key):
            raise FedpeftError(
                f"{folder / NOTE} names no {key}, which a site process needs: write it there, and "
                f"into the node config."
            )
    return config
