"""What clients were given once and keep: the versions of each client, one copy for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedpeft.errors import FedpeftError
from fedpeft.tree import Tree

PREFIX = "kept."
"""Of its names among the clients' memories in a checkpoint."""

VERSION = "kept version"
"""The entry beside the tensors of a kept tree that holds its version."""


class Shelf:
    """See ``Cohort.keep``. Only the newest version of a name is here; of older ones, who has them.

    So a process needs one copy, and a client that lags behind is brought from there to a newer
    version, as it would be from its own.
    """

    def __init__(self) -> None:
        self._newest: dict[str, tuple[int, Tree]] = {}
        self._versions: dict[str, dict[str, int]] = {}

    def keep(self, clients: Sequence[str], name: str, version: int, value: Tree) -> None:
        """The clients keep ``value`` from now on. Versions of a name only grow."""
        if version > self.kept([], name, 0)[0]:
            self._newest[name] = version, {n: t.detach() for n, t in value.items()}
        self._versions.setdefault(name, {}).update(dict.fromkeys(clients, version))

    def kept(self, clients: Sequence[str], name: str, since: int) -> tuple[int, Tree]:
        """See ``Cohort.kept``."""
        versions = self._versions.get(name, {})
        for client in clients:
            own = versions.get(client, 0)
            if own < since:
                raise FedpeftError(
                    f"client {client!r} keeps version {own} of {name!r}, and was sent what comes "
                    f"after version {since}: what it missed cannot be made up for, so it does not "
                    f"train. Start the run again, or give the client back its memory."
                )
        found = self._newest.get(name, (0, {}))
        assert found[0] >= since or not clients, "the newest is at least what each client keeps"
        return found

    def memory(self) -> dict[str, dict[str, Tree]]:
        """Client -> ``kept.NAME`` -> version and, where newest, the tree: one object for all."""
        found: dict[str, dict[str, Tree]] = {}
        for name, versions in self._versions.items():
            newest, value = self._newest[name]
            whole = {VERSION: torch.tensor(newest), **value}
            for client, version in versions.items():
                tree = whole if version == newest else {VERSION: torch.tensor(version)}
                found.setdefault(client, {})[f"{PREFIX}{name}"] = tree
        return found

    @staticmethod
    def of(memory: Mapping[str, Mapping[str, Tree]]) -> Shelf:
        """The shelf that ``memory`` was taken from; other names in it are passed over."""
        shelf = Shelf()
        for client, own in memory.items():
            for key, tree in own.items():
                if key.startswith(PREFIX):
                    name, version = key.removeprefix(PREFIX), int(tree[VERSION])
                    shelf._versions.setdefault(name, {})[client] = version
                    if len(tree) > 1 and version > shelf.kept([], name, 0)[0]:
                        value = {n: t for n, t in tree.items() if n != VERSION}
                        shelf._newest[name] = version, value
        return shelf
