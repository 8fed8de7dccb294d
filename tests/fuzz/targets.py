"""One target per parser of what others wrote: bytes in, its own error or a sound result out.

A target takes any bytes. An exception that it lets through is a crash: a defect. Where a checksum
stands in the way, the first bit of the input says whether it is made right. ``SEEDS`` has inputs
that each parser takes, from which spoilt ones are made. The codecs' payloads have a target of their
own (``tests.codecs.fuzz_wire``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord

from fedpeft.config_load import dump_recipe, load_recipe
from fedpeft.config_remote import parse_remote
from fedpeft.deploy import layout
from fedpeft.errors import FedpeftError, ReplyError
from fedpeft.flower.identity import read_identities, read_secret
from fedpeft.flower.records import NPY, Header, decode, encode
from fedpeft.flower.supernode import why_foreign
from fedpeft.manifest import MANIFEST, verify
from fedpeft.model import save_adapter
from fedpeft.privacy.chain import _seal
from fedpeft.privacy.events import Gaussian, as_json
from fedpeft.privacy.ledger import Budget, Ledger
from fedpeft.record.checkpoint import Checkpoint, latest
from fedpeft.record.checkpoint import save as save_checkpoint
from fedpeft.record.metrics_log import MetricsLog
from fedpeft.redact import LIMIT, redact
from fedpeft.start import load_start
from fedpeft.strategy import Message
from tests.secagg import test_messages as secagg
from tests.tiny import LORA, tiny_network

Target = Callable[[bytes], None]


@functools.cache
def folder() -> Path:
    """A folder for one process."""
    return Path(tempfile.mkdtemp(prefix="fedpeft-fuzz-"))


def file(data: bytes, name: str = "file") -> Path:
    path = folder() / name
    path.write_bytes(data)
    return path


def records(data: bytes) -> None:
    """A message of Flower's: its array, its recipe or its version is the input."""
    sent = encode(Message({"t": {"w": torch.zeros(2, 3)}}, {"weight": 1.0}), Header(1, "ada"))
    slot, rest = data[:1], data[1:]
    if slot == b"v":
        sent["header"]["version"] = rest.decode("utf-8", "replace")
    elif slot == b"s":
        shape = tuple(rest[:4])
        sent["tree.t"] = ArrayRecord({"w": Array("float32", shape, NPY, rest[4:])})
    else:
        sent["tree.t"] = ArrayRecord({"w": Array("float32", (2, 3), NPY, rest)})
    with contextlib.suppress(ReplyError):
        decode(sent)


def secure(data: bytes) -> None:
    """A message of secure aggregation: what is read is written as the same bytes."""
    for name, message in secagg.MESSAGES.items():
        with contextlib.suppress(FedpeftError):
            found = secagg.read(name, data)
            assert type(found) is type(message) and found.to_bytes() == data  # type: ignore[attr-defined]


def checkpoint(data: bytes) -> None:
    """A checkpoint's manifest, or (first byte odd) its content, with the right digest."""
    own = folder() / "checkpoints"
    if not own.exists():
        save_checkpoint(own, _CHECKPOINT, keep=1)
    [place] = own.glob("round-*")
    text = data[1:]
    if data[:1] and data[0] & 1:
        try:
            content = json.loads(text)
            text = json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")
        except (ValueError, RecursionError):
            return
        digest = hashlib.sha256(text).hexdigest()
        text = b'{"sha256":"%s","content":%s}' % (digest.encode(), text)
    (place / "manifest.json").write_bytes(text)
    with contextlib.suppress(FedpeftError):
        latest(own, State)


@dataclasses.dataclass(frozen=True)
class State:
    """A strategy's."""

    x: dict[str, torch.Tensor]


_CHECKPOINT = Checkpoint(3, State({"w": torch.ones(2)}), {"ada": {"m": {"w": torch.ones(1)}}}, {})


def metrics(data: bytes) -> None:
    """``metrics.jsonl``, read and cut."""
    log = MetricsLog(file(data, "metrics.jsonl"))
    with contextlib.suppress(FedpeftError):
        lines = log.read()
        log.truncate_after(1)
        assert log.read() == [
            line for line in lines if line["round"] is not None and line["round"] <= 1
        ]


def ledger(data: bytes) -> None:
    """A privacy ledger; with an odd first byte its lines are chained as they should be."""
    text = data[1:]
    if data[:1] and data[0] & 1:
        text, before = b"", "0" * 64
        header = {"kind": "fedpeft privacy ledger", "schema": 1}
        for fields in [json.dumps(header)[1:].encode(), *data[1:].split(b"\n")]:
            body = b'{"previous": "%s", %s' % (before.encode(), fields)
            before = hashlib.sha256(body).hexdigest()
            text += b'{"sha256": "%s", %s\n' % (before.encode(), body[1:])
    path = file(text, "privacy.jsonl")
    with contextlib.suppress(FedpeftError), Ledger.open(path, Budget(9.0, 1e-5, "rdp")) as found:
        assert all(found.epsilon(client) >= 0 for client in found.clients())


def recipe(data: bytes) -> None:
    """A recipe in a request."""
    with contextlib.suppress(FedpeftError):
        parse_remote(data.decode("utf-8", "replace"), "the recipe")


def deployment(data: bytes) -> None:
    """``deployment.json``: names of sites become folders."""
    file(data, layout.NOTE)
    with contextlib.suppress(FedpeftError):
        found = layout.read(folder())
        assert all("/" not in site and site not in (".", "..") for site in found.sites)
        assert isinstance(found.secure, bool) and isinstance(found.ledgers, bool)


def identities(data: bytes) -> None:
    """The list of public keys, and a secret key."""
    path = file(data, "identities")
    with contextlib.suppress(FedpeftError):
        assert all(len(key) == 32 for key in read_identities(path).values())
    with contextlib.suppress(FedpeftError):
        assert len(read_secret(path)) == 32


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "fedpeft.json", MANIFEST)


def adapter(data: bytes) -> None:
    """One file of an adapter folder, which the first byte says; the others as they were."""
    place, name = _adapter(), ADAPTER_FILES[(data[:1] or b"\0")[0] % len(ADAPTER_FILES)]
    before = {one: (place / one).read_bytes() for one in (name, MANIFEST)}
    (place / name).write_bytes(data[1:])
    if name != MANIFEST:
        (place / MANIFEST).unlink()
    try:
        with contextlib.suppress(FedpeftError):
            verify(place, "adapter.start")
            load_start(_network().model, str(place), _network().digest)
            assert all(bool(p.isfinite().all()) for p in _network().model.parameters())
    finally:
        for one, own in before.items():
            (place / one).write_bytes(own)


@functools.cache
def _network():  # type: ignore[no-untyped-def]
    return tiny_network(LORA)


@functools.cache
def _adapter() -> Path:
    place = folder() / "adapter"
    save_adapter(_network(), _network().initial, place, "base")
    return place


def app(data: bytes) -> None:
    """A Flower app: foreign, or nothing but a harmless pyproject."""
    if why_foreign(data) is None:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert not [
                name for name in archive.namelist() if name.endswith((".py", ".so", ".pth"))
            ]


def reason(data: bytes) -> None:
    """Any text as a reason."""
    found = redact(data.decode("utf-8", "replace"))
    assert found.isprintable() and len(found) <= LIMIT


_APP = resources.files("fedpeft.deploy") / "templates" / "app.toml"


def _zipped(text: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("pyproject.toml", text)
    return data.getvalue()


def _deployment() -> bytes:
    layout.write(folder(), layout.Deployment(("c0", "c1"), "fed.example.org", 8000))
    return (folder() / layout.NOTE).read_bytes()


def _checkpoints() -> list[bytes]:
    own = folder() / "seed"
    save_checkpoint(own, _CHECKPOINT, keep=1)
    [place] = own.glob("round-*")
    text = (place / "manifest.json").read_bytes()
    content = json.dumps(json.loads(text)["content"]).encode()
    shutil.rmtree(own)
    return [b"\0" + text, b"\1" + content]


def _ledgers() -> list[bytes]:
    charge = {"round": 1, "note": "", "charges": [[as_json(Gaussian(1.0)), ["ada", "bob"]]]}
    header = _seal("0" * 64, {"kind": "fedpeft privacy ledger", "schema": 1})
    fields = json.dumps(charge)[1:].encode()
    return [b"\0" + header[1] + _seal(header[0], charge)[1], b"\1" + fields + b"\n" + fields]


def _metrics() -> list[bytes]:
    log = MetricsLog(folder() / "seed.jsonl")
    (folder() / "seed.jsonl").unlink(missing_ok=True)
    log.append("note", 1, {"text": "begun"})
    log.append("evaluation", 2, {"scope": "test", "score": {"items": 3, "loss": 0.5}})
    return [log.path.read_bytes()]


def _records() -> list[bytes]:
    content = encode(Message({"t": {"w": torch.zeros(2, 3)}}), Header())
    array = content["tree.t"]["w"].data
    return [b"a" + array, b"s\2\3" + array, b"v0.1.0"]


TARGETS: dict[str, tuple[Target, Callable[[], list[bytes]]]] = {
    "records": (records, _records),
    "secure": (secure, lambda: [m.to_bytes() for m in secagg.MESSAGES.values()]),
    "checkpoint": (checkpoint, _checkpoints),
    "metrics": (metrics, _metrics),
    "ledger": (ledger, _ledgers),
    "recipe": (recipe, lambda: [dump_recipe(load_recipe("quickstart")).encode()]),
    "deployment": (deployment, lambda: [_deployment()]),
    "identities": (identities, lambda: [json.dumps({"c0": "ab" * 32}).encode(), b"ab" * 32]),
    "adapter": (
        adapter,
        lambda: [bytes([n]) + (_adapter() / f).read_bytes() for n, f in enumerate(ADAPTER_FILES)],
    ),
    "app": (app, lambda: [_zipped(_APP.read_text())]),
    "reason": (reason, lambda: [b"FedpeftError: identity='/keys/x.pem' token=abc https://a:b@c/d"]),
}  # fmt: skip
"""Name -> target, and what makes its seeds."""
