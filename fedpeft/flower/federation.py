"""FlowerFederation: a round's clients are Flower nodes, simulated or real.

Works over any ``flwr.serverapp.Grid``. A node is known by the client name that it gives when asked,
never by its node id, which changes when a real node starts again. Whoever answers first, replies
are read in the order of the round's clients.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from flwr.app import Message as FlowerMessage
from flwr.app import MessageType, RecordDict
from flwr.serverapp import Grid

from fedpeft.comms.uplink import Uplink, keeps_for_codecs, uplink_of
from fedpeft.config import Recipe
from fedpeft.config_load import dump_recipe, load_strategy
from fedpeft.errors import FedpeftError, PayloadError, ReplyError
from fedpeft.federation import Failure
from fedpeft.flower.records import Header, decode, encode, encode_stack
from fedpeft.metrics import Score
from fedpeft.strategy import Message, Messages
from fedpeft.tree import Tree

log = logging.getLogger(__name__)

STACK = 64
"""Replies that are stacked at once."""


@dataclass(frozen=True)
class Digests:
    """What all parties must have in common: the frozen base and the trainable tensors."""

    base: str
    layout: str


@dataclass(frozen=True)
class Patience:
    """Seconds to wait: for all nodes to join, and for a node's reply (training included)."""

    join: float = 120.0
    reply: float = 3600.0


class FlowerFederation:
    """The clients of ``recipe`` on the nodes of a grid; see ``fedpeft.federation.Federation``.

    nodes: how many must join before the first round. digests: the server's own; without them the
    nodes must agree with each other. alive: called while waiting; it may raise to end the wait.
    run: the identity of the run whose rounds these are, for what sites keep of it.
    """

    def __init__(
        self,
        grid: Grid,
        recipe: Recipe,
        nodes: int,
        digests: Digests | None = None,
        patience: Patience | None = None,
        alive: Callable[[], None] = lambda: None,
        run: str = "",
    ) -> None:
        self._grid = grid
        self._recipe = dump_recipe(recipe)
        self._strategy = strategy = load_strategy(recipe)
        self._uplink = partial(uplink_of, recipe)
        self._keeps = strategy.remembers or strategy.keeps or keeps_for_codecs(recipe.comms)
        self._nodes = nodes
        self._digests = digests
        self._patience = patience or Patience()
        self._alive = alive
        self._run = run
        self._sizes: dict[str, int] = {}
        self._route: dict[str, int] = {}
        self._known: set[int] = set()
        self._trained: set[str] = set()
        self._at = (0, 0)  # round, exchange

    def clients(self) -> Mapping[str, int]:
        """Client -> number of training examples; the first call waits for the nodes.

        Raises FedpeftError when too few nodes join in time, when one cannot take part, or when two
        say that they are the same client.
        """
        if not self._sizes:
            self._join()
        return dict(sorted(self._sizes.items()))

    def run(self, round: int, *stacks: Messages) -> Iterator[Messages | Failure]:
        """Sends each client's node its message; replies of equal schema come in stacks."""
        self.begin(round)
        outcomes = self.ask(MessageType.TRAIN, round, stacks)
        base = "" if self._digests is None else self._digests.base
        if (uplink := self._uplink(base)) is not None:
            yield from self._opened(uplink, round, stacks, outcomes)
            return
        for schema, group in itertools.groupby(outcomes, key=lambda pair: _schema(pair[1])):
            if schema is None:
                yield from (failure for _, failure in group if isinstance(failure, Failure))
                continue
            while part := list(itertools.islice(group, STACK)):
                names, replies = zip(*part, strict=True)
                yield Messages.stack(names, replies)

    def _opened(
        self,
        uplink: Uplink,
        round: int,
        stacks: Sequence[Messages],
        outcomes: Iterable[tuple[str, Message | Failure]],
    ) -> Iterator[Messages | Failure]:
        """The replies with the trees that are in their payloads, one by one."""
        sent = {name: stack.rows([k]) for stack in stacks for k, name in enumerate(stack.clients)}
        for client, outcome in outcomes:
            if isinstance(outcome, Failure):
                yield outcome
                continue
            try:
                like = self._strategy.expects(sent[client][0])
                yield uplink.read(outcome, sent[client], like, round)
            except PayloadError as error:
                yield Failure(client, str(error))

    def evaluate(self, round: int, *stacks: Messages) -> Iterator[dict[str, Score] | Failure]:
        """The nodes' own scores on their hold-outs, client by client."""
        for client, outcome in self.ask(MessageType.EVALUATE, round, stacks):
            if isinstance(outcome, Failure):
                yield outcome
                continue
            try:
                figures = dict(outcome.scalars)
                yield {client: Score(items=int(figures.pop("items")), **figures)}
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                yield Failure(client, f"no score: {error}")

    def memory(self) -> dict[str, dict[str, Tree]]:
        """What clients keep stays on the nodes: only whose there is, client -> {}."""
        return {client: {} for client in sorted(self._trained)} if self._keeps else {}

    def restore(self, memory: Mapping[str, Mapping[str, Tree]]) -> None:
        """Takes an empty memory only. Raises FedpeftError on a resume that would need more."""
        if memory:
            raise FedpeftError(
                f"engine.kind=flower cannot resume this strategy: the memory of "
                f"{len(memory)} clients was on Flower's nodes and is gone with them. Run it again "
                f"from the start, or use engine.kind=cohort or sequential, whose checkpoints hold "
                f"all clients' memory."
            )

    def _join(self) -> None:
        began = time.monotonic()
        while len(ids := sorted(self._grid.get_node_ids())) < self._nodes:
            if time.monotonic() - began > self._patience.join:
                raise FedpeftError(
                    f"{len(ids)} of {self._nodes} nodes joined within {self._patience.join:g} "
                    f"seconds: start the missing ones, or lower partition.clients."
                )
            self._pause(began)
        refused = self._meet(ids)
        if refused:
            raise FedpeftError(f"{len(refused)} of {len(ids)} nodes cannot take part: {refused[0]}")

    def _meet(self, ids: Iterable[int]) -> list[str]:
        """Asks nodes who they are; returns why some cannot take part."""
        refused = []
        header = Header(recipe=self._recipe, run=self._run)
        nonces = {node: _nonce() for node in ids}
        asked = {n: encode(Message(), replace(header, nonce=nonces[n])) for n in nonces}
        answers = self._exchange(MessageType.QUERY, asked, 0)
        first = not self._sizes
        for node, answer in sorted(answers.items()):
            self._known.add(node)
            try:
                client, examples = self._introduction(answer, nonces[node])
                if first and client in self._route:
                    raise ReplyError(f"client {client!r} has a node already; give each its own")
            except ReplyError as error:
                refused.append(f"node {node}: {error}")
                continue
            self._sizes[client], self._route[client] = examples, node
        if first and refused:
            self._sizes, self._route = {}, {}
        return refused

    def _introduction(self, answer: FlowerMessage | None, nonce: str) -> tuple[str, int]:
        """A node's client and its number of training examples."""
        reply, header = self._read(answer)
        if header.nonce != nonce:
            raise ReplyError("its introduction answers another request")
        found = Digests(header.base, header.layout)
        self._digests = self._digests or found
        if found != self._digests:
            raise ReplyError(
                f"client {header.client!r} has {found}, others {self._digests}: all must load the "
                f"same base model and adapter"
            )
        examples = reply.scalars.get("examples", 0.0)
        if not (header.client and examples >= 1 and examples == int(examples)):
            raise ReplyError(f"it introduced itself as {header.client!r}, {examples} examples")
        return header.client, int(examples)

    def _refresh(self) -> set[int]:
        """The nodes that are there now. New ones are asked: a restarted client is found again."""
        present = set(self._grid.get_node_ids())
        new = present - self._known
        for reason in self._meet(sorted(new)) if new else []:
            log.warning("a new node cannot take part: %s", reason)
        return present

    def begin(self, round: int) -> None:
        """Begins an exchange; those of one round are numbered for the clients, from 0."""
        before, exchange = self._at
        self._at = (round, exchange + 1 if before == round else 0)

    def ask(
        self, kind: str, round: int, stacks: Sequence[Messages]
    ) -> Iterator[tuple[str, Message | Failure]]:
        """Sends each client its message; what came of it, in the order of the clients.

        kind: a type of Flower's messages, ``CATEGORY`` or ``CATEGORY.ACTION``.
        """
        self.clients()
        present = self._refresh()
        base = self._digests or Digests("", "")
        common = Header(round, "", base.base, base.layout, self._recipe, self._at[1], self._run)
        headers = {
            name: replace(common, client=name, nonce=_nonce())
            for messages in stacks
            for name in messages.clients
        }
        contents: dict[int, RecordDict] = {}
        for messages in stacks:
            at = [k for k, name in enumerate(messages.clients) if self._route.get(name) in present]
            sent = messages.rows(at)
            records = encode_stack(sent, [headers[name] for name in sent.clients])
            nodes = [self._route[name] for name in sent.clients]
            contents.update(zip(nodes, records, strict=True))
        answers = self._exchange(kind, contents, round)
        for client in (name for messages in stacks for name in messages.clients):
            node = self._route.get(client)
            if node not in answers:
                yield client, Failure(client, "its node is not connected")
                continue
            try:
                reply = self._checked(headers[client], answers.pop(node))
            except ReplyError as error:
                yield client, Failure(client, str(error))
                continue
            if kind != MessageType.EVALUATE:
                self._trained.add(client)
            yield client, reply

    def _checked(self, asked: Header, answer: FlowerMessage | None) -> Message:
        """A reply's message. Raises ReplyError if it is no answer to this very request."""
        reply, header = self._read(answer)
        for what in ("client", "round", "exchange", "base", "layout", "run", "nonce"):
            theirs, ours = getattr(header, what), getattr(asked, what)
            if theirs != ours:
                raise ReplyError(f"the reply is of {what} {theirs!r}, asked was {ours!r}")
        return reply

    def _read(self, answer: FlowerMessage | None) -> tuple[Message, Header]:
        if answer is None:
            raise ReplyError(f"no reply within {self._patience.reply:g} seconds")
        if answer.has_error():
            reason = str(answer.error.reason or f"error {answer.error.code}")
            raise ReplyError(" ".join(reason.split())[:500])
        return decode(answer.content)

    def _exchange(
        self, kind: str, contents: dict[int, RecordDict], round: int
    ) -> dict[int, FlowerMessage | None]:
        """Each node's answer, None where there was none in time."""
        answers: dict[int, FlowerMessage | None] = dict.fromkeys(contents)
        waiting: dict[str, int] = {}
        while contents:  # serialised messages are let go one by one
            node, content = contents.popitem()
            message = FlowerMessage(content, node, kind, group_id=str(round))
            waiting.update({i: node for i in self._grid.push_messages([message]) if i})
        began = time.monotonic()
        while waiting and time.monotonic() - began < self._patience.reply:
            for answer in self._grid.pull_messages(list(waiting)):
                asked = waiting.pop(answer.metadata.reply_to_message_id, None)
                if asked is None:
                    log.warning("passed over a reply that answers nothing, or once more")
                    continue
                answers[asked] = answer
            if waiting:
                self._pause(began)
        return answers

    def _pause(self, began: float) -> None:
        """Waits a fiftieth of the time waited so far, within [5 ms, 1 s]."""
        self._alive()
        time.sleep(min(1.0, max(0.005, (time.monotonic() - began) / 50)))


def _nonce() -> str:
    return secrets.token_hex(8)


def _schema(outcome: Message | Failure) -> object:
    """Messages of equal schema can be stacked; None for a failure."""
    if isinstance(outcome, Failure):
        return None
    shapes = {
        tree: {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()}
        for tree, own in outcome.trees.items()
    }
    return shapes, set(outcome.scalars), set(outcome.blobs)
