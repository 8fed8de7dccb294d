"""FlowerFederation: a round's clients are Flower nodes, simulated or real.

Works over any ``flwr.serverapp.Grid``. A node is known by the client name that it gives when asked,
never by its node id, which changes when a real node starts again. Whoever answers first, replies
are read in the order of the round's clients. A node that is not there, cannot take part or is late
costs its client the round, and the run nothing, as long as there is a quorum.
"""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

from flwr.app import Message as FlowerMessage
from flwr.app import MessageType, RecordDict
from flwr.serverapp import Grid

from fedpeft.comms.uplink import Uplink, keeps_for_codecs, uplink_of
from fedpeft.config import Recipe
from fedpeft.config_comms import size_of
from fedpeft.config_load import dump_recipe, load_strategy
from fedpeft.errors import FedpeftError, PayloadError, ReplyError
from fedpeft.federation import Failure
from fedpeft.flower.courier import Courier, Patience
from fedpeft.flower.digests import Digests
from fedpeft.flower.records import Header, decode, encode, encode_stack
from fedpeft.metrics import Score
from fedpeft.redact import redact
from fedpeft.strategy import Message, Messages
from fedpeft.tree import Tree

log = logging.getLogger(__name__)

STACK = 64
"""Replies that are stacked at once."""


class FlowerFederation:
    """The clients of ``recipe`` on the nodes of a grid; see ``fedpeft.federation.Federation``.

    nodes: how many there are. The first round begins when all have joined, or when the time for it
    is over and ``rounds.quorum`` of them have; others may come later. digests: the server's own;
    without them the nodes must agree with each other. alive: called while waiting; it may raise to
    end the wait. run: the identity of the run, for what sites keep of it.
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
        self._recipe = dump_recipe(recipe)
        self._strategy = strategy = load_strategy(recipe)
        self._uplink = partial(uplink_of, recipe)
        self._keeps = strategy.remembers or strategy.keeps or keeps_for_codecs(recipe.comms)
        self._nodes = nodes
        self._most = 2 * size_of("rounds.max_reply", recipe.rounds.max_reply)  # with all else in it
        self._least = max(1, math.ceil(recipe.rounds.quorum * nodes))
        self._digests = digests
        self._patience = patience or Patience()
        self._courier = Courier(grid, self._patience, alive)
        self._run = run
        self._needed: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._route: dict[str, int] = {}
        self._known: set[int] = set()
        self._refused: dict[int, int] = {}  # node -> round in which it could not take part
        self._trained: set[str] = set()
        self._at = (0, 0)  # round, exchange

    def clients(self) -> Mapping[str, int]:
        """Client -> number of training examples; the first call waits for the nodes.

        Raises FedpeftError when fewer than the quorum join in time and can take part.
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
        """Who has a memory, which must be on its node. Raises FedpeftError in a simulation.

        A node that has lost it cannot take part: its client would begin anew in the middle.
        """
        if self._run:
            self._needed = set(memory)
            self._trained |= self._needed
        elif memory:
            raise FedpeftError(
                f"engine.kind=flower cannot resume this strategy: the memory of "
                f"{len(memory)} clients was on Flower's nodes and is gone with them. Run it again "
                f"from the start, or use engine.kind=cohort or sequential, whose checkpoints hold "
                f"all clients' memory."
            )

    def _join(self) -> None:
        began = time.monotonic()
        while len(ids := self._courier.nodes()) < self._nodes:
            if time.monotonic() - began > self._patience.join:
                if len(ids) >= self._least:
                    log.warning("begins with %d of %d nodes", len(ids), self._nodes)
                    break
                raise FedpeftError(
                    f"{len(ids)} of {self._nodes} nodes joined within {self._patience.join:g} "
                    f"seconds, rounds.quorum asks for {self._least}: start the missing ones, or "
                    f"lower partition.clients or rounds.quorum."
                )
            self._courier.pause(began)
        refused = self._meet(ids, self._patience.reply)
        if len(self._sizes) < self._least:
            self._sizes, self._route = {}, {}
            why = refused[0] if refused else "none answered"
            raise FedpeftError(f"{len(refused)} of {len(ids)} nodes cannot take part: {why}")
        for reason in refused:
            log.warning("a node cannot take part: %s", reason)
        self._refused = dict.fromkeys(set(ids) - self._known, 1)

    def _meet(self, ids: Iterable[int], wait: float) -> list[str]:
        """Asks nodes who they are; returns why some cannot take part."""
        refused = []
        header = Header(recipe=self._recipe, run=self._run)
        nonces = {node: _nonce() for node in ids}
        asked = {n: encode(Message(), replace(header, nonce=nonces[n])) for n in nonces}
        answers = self._courier.ask(MessageType.QUERY, asked, 0, wait)
        present = set(self._courier.nodes())
        for node, answer in sorted(answers.items()):
            try:
                client, examples = self._introduction(answer, nonces[node])
                other = self._route.get(client)
                if other in present and other != node:
                    raise ReplyError(
                        f"client {client!r} has a node already, {other}: give each its own"
                    )
            except ReplyError as error:
                refused.append(f"node {node}: {error}")
                continue
            self._known.add(node)
            self._sizes[client], self._route[client] = examples, node
        return refused

    def _introduction(self, answer: FlowerMessage | None, nonce: str) -> tuple[str, int]:
        """A node's client and its number of training examples."""
        reply, header = self._read(answer)
        if header.nonce != nonce:
            raise ReplyError("its introduction answers another request")
        found = Digests(header.base, header.layout, header.words)
        self._digests = self._digests or found
        if found != self._digests:
            raise ReplyError(
                f"client {header.client!r} has {found}, others {self._digests}: all must load the "
                f"same base model, adapter, tokenizer and class names"
            )
        examples = reply.scalars.get("examples", 0.0)
        if not (header.client and examples >= 1 and examples == int(examples)):
            raise ReplyError(f"it introduced itself as {header.client!r}, {examples} examples")
        if header.client in self._needed and not reply.scalars.get("kept", 0.0) > 0:
            raise ReplyError(
                f"client {header.client!r} has trained in this run and kept nothing of it: give "
                f"its node back its state folder (node config state)"
            )
        return header.client, int(examples)

    def _refresh(self, round: int) -> set[int]:
        """The nodes that are there now. New ones are asked: a restarted client is found again.

        Those that could not take part are asked again in rounds 2, 4, 8, ...
        """
        present = set(self._courier.nodes())
        again = round if round & (round - 1) == 0 else 0
        new = {n for n in present - self._known if self._refused.get(n, -1) < again}
        if new:
            for reason in self._meet(sorted(new), min(self._patience.join, self._patience.reply)):
                log.warning("a node cannot take part: %s", reason)
            self._refused |= dict.fromkeys(new - self._known, round)
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
        present = self._refresh(round)
        busy = self._courier.busy()
        own = asdict(self._digests or Digests())
        common = Header(round, recipe=self._recipe, exchange=self._at[1], run=self._run, **own)
        headers = {
            name: replace(common, client=name, nonce=_nonce())
            for messages in stacks
            for name in messages.clients
        }
        contents: dict[int, RecordDict] = {}
        for messages in stacks:
            free = present - busy
            at = [k for k, name in enumerate(messages.clients) if self._route.get(name) in free]
            sent = messages.rows(at)
            records = encode_stack(sent, [headers[name] for name in sent.clients])
            nodes = [self._route[name] for name in sent.clients]
            contents.update(zip(nodes, records, strict=True))
        share = self._patience.enough if kind == MessageType.TRAIN else 1.0
        answers = self._courier.ask(kind, contents, round, self._patience.reply, share)
        for client in (name for messages in stacks for name in messages.clients):
            node = self._route.get(client)
            if node not in answers:
                late = "is still at work on an earlier request"
                why = late if node in busy else "is not connected"
                yield client, Failure(client, f"its node {why}")
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
        for what in ("client", "round", "exchange", *vars(Digests()), "run", "nonce"):
            theirs, ours = getattr(header, what), getattr(asked, what)
            if theirs != ours:
                raise ReplyError(f"the reply is of {what} {theirs!r}, asked was {ours!r}")
        return reply

    def _read(self, answer: FlowerMessage | None) -> tuple[Message, Header]:
        if answer is None:
            raise ReplyError(
                f"no reply within {self._patience.reply:g} seconds, or before enough others"
                if self._patience.enough < 1
                else f"no reply within {self._patience.reply:g} seconds"
            )
        if answer.has_error():
            reason = str(answer.error.reason or f"error {answer.error.code}")
            raise ReplyError(redact(reason))  # whoever lies may send anything
        return decode(answer.content, self._most)


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
