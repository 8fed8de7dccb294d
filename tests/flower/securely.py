"""A recipe under secure aggregation on an in-memory grid, and the same in one process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Message

from fedpeft.config import Engine, Privacy, Recipe, Rounds, SecureAggregation
from fedpeft.federation import Failure, Federation, Partial
from fedpeft.flower.client_app import simulated
from fedpeft.flower.federation import FlowerFederation, Patience
from fedpeft.flower.identity import read_identities, simulated_identities
from fedpeft.flower.secure import SecureFlowerFederation
from fedpeft.prepare import Prepared, prepare
from fedpeft.secagg.envelope import Kind, kind_of
from fedpeft.secagg.primitives import new_identity
from fedpeft.strategy import Messages
from tests.flower.nodes import InProcess, Reply
from tests.tiny import tiny_recipe

NAMES = ("c0", "c1", "c2", "c3")
SIZES = dict(zip(NAMES, (5, 9, 4, 12), strict=True))  # of what write_tiny writes
STAGES = {
    "advertise": Kind.SETUP,
    "share": Kind.ROSTER,
    "mask": Kind.INBOX,
    "confirm": Kind.SURVIVORS,
    "unmask": Kind.CONFIRMED,
}
SERVER_NOISE = Privacy(unit="client", noise_multiplier=1.0, clip_norm=0.05, delta=1e-3)


def recipe_of(
    folder: Path,
    privacy: Privacy | None = None,
    secure: SecureAggregation | None = None,
    weighting: Any = "examples",
    **strategy: Any,
) -> Recipe:
    """Secure aggregation of updates that are clipped, as most are longer than the bound."""
    privacy = privacy or Privacy()
    return dataclasses.replace(
        tiny_recipe(folder, **strategy),
        privacy=privacy,
        secure_aggregation=secure or SecureAggregation(enabled=True, clip_norm=0.05),
        rounds=Rounds(count=2, weighting="equal" if privacy.unit == "client" else weighting),
    )


def nodes() -> dict[int, dict[str, Any]]:
    """Simulated nodes whose ids are in another order than their clients' names."""
    return {900 - k: {"partition-id": k, "num-partitions": 4} for k in range(4)}


def grid_of(reply: Reply | None = None) -> InProcess:
    return InProcess(nodes(), reply, simulated)


def on_flower(prepared: Prepared, grid: InProcess, wait: float = 5.0) -> SecureFlowerFederation:
    """``wait``: seconds for a reply; the grid's are there at once."""
    inner = FlowerFederation(grid, prepared.recipe, 4, None, Patience(0.05, wait))
    return SecureFlowerFederation(prepared, inner, simulated_identities(0, NAMES))


def on_real_nodes(prepared: Prepared, grid: InProcess, keys: Path) -> SecureFlowerFederation:
    """``keys``: the folder of ``write_keys``."""
    inner = FlowerFederation(grid, prepared.recipe, 4, None, Patience(0.05, 5.0))
    return SecureFlowerFederation(prepared, inner, read_identities(keys / "all.json"))


class Losing:
    """A federation in one process of which some clients fail."""

    def __init__(self, inner: Federation, lost: tuple[str, ...]) -> None:
        self._inner = inner
        self._lost = lost

    def clients(self) -> Mapping[str, int]:
        return self._inner.clients()

    def run(self, round: int, *stacks: Messages) -> Iterator[Any]:
        for reply in self._inner.run(round, *stacks):
            assert isinstance(reply, Messages) and len(reply) == 1
            gone = reply.clients[0] in self._lost
            yield Failure(reply.clients[0], "lost") if gone else reply


def in_process(recipe: Recipe, lost: tuple[str, ...] = ()) -> Federation:
    """``SecureFederation`` of clients that train one by one, as nodes do."""
    prepared = prepare(one_by_one(recipe))
    return prepared.secured(Losing(prepared.federation(), lost))  # type: ignore[arg-type]


def one_by_one(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, engine=Engine(kind="sequential", chunk=1, device="cpu"))


def sent(prepared: Prepared, names: tuple[str, ...] = NAMES) -> Messages:
    state = prepared.strategy.init(prepared.problem)
    return prepared.post.announce(prepared.strategy.send(state, 1, names))


def partial(found: Iterator[Any]) -> Partial:
    [one] = found
    assert isinstance(one, Partial), one
    return one


def assert_same(found: Partial, wanted: Partial) -> None:
    """The same mean of the same number of clients, bit for bit."""
    assert found.clients == wanted.clients
    assert found.replies.clients == wanted.replies.clients
    assert found.replies.scalars.keys() == wanted.replies.scalars.keys()
    for name, value in wanted.replies.scalars.items():
        assert torch.equal(found.replies.scalars[name], value)
    assert found.replies.trees.keys() == wanted.replies.trees.keys()
    for part, tree in wanted.replies.trees.items():
        assert found.replies.trees[part].keys() == tree.keys()
        for name, value in tree.items():
            own = found.replies.trees[part][name]
            assert own.dtype == value.dtype and torch.equal(own, value)


def stage_of(request: Message) -> Kind:
    return Kind(kind_of(blob(request)))


def blob(message: Message) -> bytes:
    blobs = message.content["blobs"]
    assert isinstance(blobs, ConfigRecord)
    found = blobs["secagg"]
    assert isinstance(found, bytes)
    return found


def client_of(message: Message) -> str:
    header = message.content["header"]
    assert isinstance(header, ConfigRecord)
    return str(header["client"])


def silent(stage: Kind, *clients: str) -> Reply:
    def reply(request: Message, answer: Message) -> Message | None:
        gone = stage_of(request) == stage and client_of(request) in clients
        return None if gone else answer

    return reply


def write_keys(folder: Path) -> dict[int, dict[str, Any]]:
    """Real nodes' configuration, by node: every client's identity, and the list of all."""
    folder.mkdir(exist_ok=True)
    listed, config = {}, {}
    for k, name in enumerate(NAMES):
        secret, public = new_identity()
        (folder / f"{name}.key").write_text(secret.hex() + "\n")
        listed[name] = public.hex()
        paths = {"identity": str(folder / f"{name}.key"), "identities": str(folder / "all.json")}
        config[10 + k] = {"client": name, **paths}
    (folder / "all.json").write_text(json.dumps(listed))
    return config
