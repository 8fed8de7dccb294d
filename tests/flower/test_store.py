"""What a real node keeps between the stages outlives its process, and is used by one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from fedpeft.errors import FedpeftError
from fedpeft.flower.client_app import app
from fedpeft.flower.node import Node
from fedpeft.flower.store import Kept, alone, load, save
from fedpeft.prepare import prepare
from fedpeft.secagg.codec import ProtocolError
from fedpeft.secagg.envelope import Kind
from tests.flower.nodes import InProcess
from tests.flower.securely import (
    STAGES,
    assert_same,
    client_of,
    in_process,
    on_real_nodes,
    partial,
    recipe_of,
    sent,
    stage_of,
    write_keys,
)

pytestmark = pytest.mark.usefixtures("flower_task")


def node_at(folder: Path) -> Node:
    (folder / "own.key").write_text("00" * 32)
    return Node({"identity": str(folder / "own.key")}, RecordDict(), False)


def test_what_is_saved_is_there_for_the_next_process_and_for_its_owner_only(tmp_path: Path) -> None:
    node = node_at(tmp_path)
    assert load(node) == Kept()
    for kept in (Kept(b"state", b"setup"), Kept(b"later")):
        save(node, kept)
        assert load(node_at(tmp_path)) == kept
    assert dict(node.state) == {}
    assert {path.name for path in tmp_path.iterdir()} == {"own.key", "own.key.state"}
    assert (tmp_path / "own.key.state").stat().st_mode & 0o777 == 0o600


def test_a_simulated_node_keeps_it_in_flowers_context(tmp_path: Path) -> None:
    node = Node({}, RecordDict(), True)
    assert load(node) == Kept()
    save(node, Kept(b"state", b"setup"))
    assert load(Node({}, node.state, True)) == Kept(b"state", b"setup")
    assert list(node.state) == ["secagg"]


def test_what_cannot_be_read_or_written_is_an_error(tmp_path: Path) -> None:
    node = node_at(tmp_path)
    save(node, Kept(b"state", b"setup"))
    path = tmp_path / "own.key.state"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ProtocolError, match="the state of secure aggregation in .* ends too early"):
        load(node)
    path.unlink()
    path.mkdir()
    with pytest.raises(FedpeftError, match="own.key.state' cannot be read"):
        load(node)
    with pytest.raises(FedpeftError, match="cannot write .*Nothing was answered"):
        save(node, Kept(b"state"))


def test_two_requests_are_never_answered_at_once(tiny: Path, tmp_path: Path) -> None:
    recipe, keys = recipe_of(tiny), tmp_path / "keys"
    prepared, config = prepare(recipe), write_keys(keys)
    federation = on_real_nodes(prepared, InProcess(config, app=app), keys)
    busy = Node(config[11], RecordDict(), False)
    with alone(busy):
        with pytest.raises(FedpeftError, match="one at a time"), alone(busy):
            pass
        found = partial(federation.run(1, sent(prepared)))
    assert_same(found, partial(in_process(recipe, ("c1",)).run(1, sent(prepared))))
    assert "this client is answering another request" in found.excluded["c1"]
    assert partial(federation.run(2, sent(prepared))).clients == 4


@pytest.mark.parametrize("stage", STAGES)
def test_a_node_whose_process_dies_behind_an_answer_goes_on_and_answers_nothing_twice(
    tiny: Path, tmp_path: Path, stage: str
) -> None:
    """Flower stores the context after the answer: a process that dies then has the older one."""
    recipe, keys = recipe_of(tiny), tmp_path / "keys"
    prepared, config = prepare(recipe), write_keys(keys)
    again: list[str] = []

    def reply(request: Message, answer: Message) -> Message:
        number = request.metadata.dst_node_id
        if stage_of(request) == STAGES[stage] and client_of(request) == "c2":
            grid.contexts[number] = Context(1, number, dict(config[number]), RecordDict(), {})
            second = app(request, grid.contexts[number])
            again.append(second.error.reason if second.has_error() else "answered")
        return answer

    grid = InProcess(config, reply, app)
    found = partial(on_real_nodes(prepared, grid, keys).run(1, sent(prepared)))
    assert_same(found, partial(in_process(recipe).run(1, sent(prepared))))
    refused = {
        Kind.SETUP: "a round is never repeated",
        Kind.CONFIRMED: "no round is under way here",
    }
    [reason] = again
    assert refused.get(STAGES[stage], "each is answered once in a round, in order") in reason


def test_after_the_round_the_file_holds_its_number_alone(tiny: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    prepared, config = prepare(recipe_of(tiny)), write_keys(keys)
    sizes: list[int] = []

    def reply(request: Message, answer: Message) -> Message:
        if stage_of(request) != Kind.CONFIRMED:
            sizes.append((keys / f"{client_of(request)}.key.state").stat().st_size)
        return answer

    grid = InProcess(config, reply, app)
    partial(on_real_nodes(prepared, grid, keys).run(1, sent(prepared)))
    bare = 4 + (8 + 3 + 1 + 32) + 4  # number, name, whether a round is under way, digest
    assert [path.stat().st_size for path in keys.glob("*.state")] == [bare] * 4
    assert len(sizes) == 16 and min(sizes) > bare + 96
    assert all(dict(context.state) == {} for context in grid.contexts.values())
