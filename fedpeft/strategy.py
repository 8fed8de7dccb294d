"""The nouns and verbs of every algorithm: Message, Cohort, Strategy; init, send, train, receive.

A strategy is one frozen dataclass in one file: its fields are its settings, its four verbs are the
paper's pseudo-code, and all that it remembers between rounds is an explicit state that it takes and
returns. ``train`` is written once for a cohort of K clients (a real client is a cohort of one):
every tree in it is stacked, ``[K, *shape]``.

A complete algorithm (federated averaging without weights)::

    @dataclass(frozen=True)
    class State:
        adapter: Tree

    @dataclass(frozen=True)
    class Plain(Strategy[State]):
        def init(self, problem):
            return State(problem.initial)

        def send(self, state, round, clients):
            return Messages.broadcast(clients, {"adapter": state.adapter})

        def train(self, messages, cohort):
            fit = cohort.fit(messages.trees["adapter"])
            return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

        def receive(self, state, replies):
            return State(weighted_mean(replies, "adapter"))

        def adapter(self, state):
            return state.adapter
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from fedpeft import tree as trees_
from fedpeft.errors import FedpeftError, suggest
from fedpeft.tree import Tree

S = TypeVar("S")

Adjust = Callable[[Tree, Tree, Mapping[str, Tree]], Tree]
"""``(gradient, adapter, own) -> gradient``, all stacked; applied after clipping, before the step.

Its rows are the clients that step together, which may be some of the cohort's; ``own`` holds the
same clients' rows of the trees that ``Cohort.fit`` was given under that name.
"""


@dataclass(frozen=True)
class Message:
    """What travels to or from one client: named trees, named numbers, opaque payloads.

    One to one with a Flower ``RecordDict``: an ``ArrayRecord`` per tree, one ``MetricRecord`` for
    the scalars, one ``ConfigRecord`` for the blobs.
    """

    trees: Mapping[str, Tree] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    blobs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Messages:
    """The messages of K named clients, stacked: trees ``[K, *shape]``, scalars ``[K]`` float64.

    Rows are in the order of ``clients``.
    """

    clients: tuple[str, ...]
    trees: Mapping[str, Tree] = field(default_factory=dict)
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    blobs: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)

    @staticmethod
    def broadcast(
        clients: Sequence[str],
        trees: Mapping[str, Tree],
        scalars: Mapping[str, float] | None = None,
        blobs: Mapping[str, bytes] | None = None,
    ) -> Messages:
        """The same message to every client, as views on one copy (10,000 clients cost one)."""
        k = len(clients)
        return Messages(
            tuple(clients),
            {name: trees_.broadcast(t, k) for name, t in trees.items()},
            {
                n: torch.full((k,), float(v), dtype=torch.float64)
                for n, v in (scalars or {}).items()
            },
            {name: (blob,) * k for name, blob in (blobs or {}).items()},
        )

    @staticmethod
    def stack(clients: Sequence[str], messages: Sequence[Message]) -> Messages:
        """Stacks single messages. Raises ValueError where their names, shapes or dtypes differ."""
        first = messages[0]
        for other in messages[1:]:
            for part in ("trees", "scalars", "blobs"):
                mine, theirs = set(getattr(first, part)), set(getattr(other, part))
                if mine != theirs:
                    raise ValueError(f"messages differ in {part}: {sorted(mine ^ theirs)}")
        return Messages(
            tuple(clients),
            {n: trees_.stack([m.trees[n] for m in messages]) for n in first.trees},
            {
                n: torch.tensor([m.scalars[n] for m in messages], dtype=torch.float64)
                for n in first.scalars
            },
            {n: tuple(m.blobs[n] for m in messages) for n in first.blobs},
        )

    def reply(self, trees: Mapping[str, Tree], **scalars: Tensor) -> Messages:
        """A reply of the same clients: stacked trees, and scalars ``[K]`` such as ``weight``."""
        numbers = {name: v.detach().to("cpu", torch.float64) for name, v in scalars.items()}
        return Messages(self.clients, dict(trees), numbers)

    def to(self, device: torch.device) -> Messages:
        """The messages with their trees on ``device``; scalars stay on the CPU."""
        moved = {n: {m: x.to(device) for m, x in t.items()} for n, t in self.trees.items()}
        return Messages(self.clients, moved, self.scalars, self.blobs)

    def __len__(self) -> int:
        return len(self.clients)

    def __getitem__(self, k: int) -> Message:
        return Message(
            {name: trees_.row(t, k) for name, t in self.trees.items()},
            {name: float(v[k]) for name, v in self.scalars.items()},
            {name: v[k] for name, v in self.blobs.items()},
        )

    def rows(self, index: Sequence[int]) -> Messages:
        """The messages of the clients at ``index``; views where the index is a plain range."""
        at = list(index)
        if at and at == list(range(at[0], at[-1] + 1)):
            part = slice(at[0], at[-1] + 1)
            pick = {n: {m: x[part] for m, x in t.items()} for n, t in self.trees.items()}
        else:
            pick = {n: trees_.rows(t, at) for n, t in self.trees.items()}
        return Messages(
            tuple(self.clients[i] for i in at),
            pick,
            {name: v[at] for name, v in self.scalars.items()},
            {name: tuple(v[i] for i in at) for name, v in self.blobs.items()},
        )

    def split(self, size: int) -> Iterator[Messages]:
        """Consecutive stacks of at most ``size`` clients."""
        for start in range(0, len(self), size):
            yield self.rows(range(start, min(start + size, len(self))))


Replies = Iterable[Messages]
"""Valid replies, stack by stack, in the order of the round's clients. Can be read once."""


def weighted_mean(replies: Replies, tree: str, weight: str = "weight") -> Tree:
    """``sum_k p_k x_k`` of one tree with ``p_k`` proportional to the scalar ``weight``; streams.

    Sums run in float64 and are cast once. Raises ValueError when no reply has weight.
    """
    return trees_.mean((r.trees[tree], r.scalars[weight]) for r in replies)


@dataclass(frozen=True)
class Problem:
    """What a strategy may know before the first round.

    initial: every trainable tensor of the model as peft initialised it, float32.
    scaling: LoRA layer (the prefix of its tensors' names) -> s in ``W + s B A``; else empty.
    clients: names of all registered clients.
    rounds: communication rounds that the run will have.
    seed: the run's seed; derive streams with ``fedpeft.streams``.
    """

    initial: Tree
    scaling: Mapping[str, float]
    clients: tuple[str, ...]
    rounds: int
    seed: int


@dataclass(frozen=True)
class Fit:
    """The result of local training.

    adapter: stacked tree, ``[K, *shape]``, the names that ``fit`` was given.
    loss: mean training loss over the steps, nats per example or token, ``[K]``.
    steps: optimizer steps taken, ``[K]``.
    """

    adapter: Tree
    loss: Tensor
    steps: Tensor


class Cohort(ABC):
    """K clients that train in lockstep on one shared frozen model, each on its own data.

    clients: their names. weights: aggregation weights ``[K]`` (float64) as the recipe says.
    initial: every trainable tensor as peft initialised it, unstacked; never to be written.
    Nothing of one client can reach another through a cohort.
    """

    clients: tuple[str, ...]
    weights: Tensor
    initial: Tree

    @abstractmethod
    def fit(
        self,
        start: Tree,
        *,
        fixed: Tree | None = None,
        adjust: Adjust | None = None,
        own: Mapping[str, Tree] | None = None,
    ) -> Fit:
        """Local training from ``start`` (stacked) with the recipe's optimizer, steps and batches.

        Exactly the tensors of ``start`` are trained; ``fixed`` (unstacked) holds the model's other
        trainable tensors, the same for all clients. Together they must name every trainable tensor
        of the model. ``adjust`` maps the clipped gradient, e.g. a proximal term; what it needs of
        each client (stacked trees) comes through ``own``, never from outside.
        """

    @abstractmethod
    def gradients(self, at: Tree, *, fixed: Tree | None = None) -> Tree:
        """The gradient of each client's mean loss over all its training data, stacked."""

    @abstractmethod
    def losses(self, at: Tree, *, fixed: Tree | None = None) -> Tensor:
        """Each client's mean loss over all its training data, ``[K]``; forward only."""

    @abstractmethod
    def recall(self, name: str, default: Tree) -> Tree:
        """The clients' private memory ``name``, stacked; ``default``'s rows where there is none."""

    @abstractmethod
    def remember(self, name: str, value: Tree) -> None:
        """Keeps ``value`` (stacked) as the clients' private memory ``name`` for later rounds."""


class Strategy(ABC, Generic[S]):
    """One federated algorithm: subclasses are final frozen dataclasses; fields are its settings.

    pools: a reference that trains on the union of all clients' data; not federated.
    remembers: clients keep private memory between rounds.
    shares: the result is one global adapter; without it every client ends with its own.
    exact: with LoRA, the state after a round stands for the weighted mean of the clients' dense
    updates, ``dW = sum_k p_k dW_k``; without it the mean of factors or something else.
    linear: ``receive`` reads replies only through means of their trees and scalars weighted by the
    scalar ``weight``; so replies may be averaged in parts, each part with its total weight.
    averages: what a lone client trained is the state after the round; without it the server takes
    a step of its own (a server optimizer, a merge of task vectors).
    """

    pools: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    shares: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    averages: ClassVar[bool] = True

    @abstractmethod
    def init(self, problem: Problem) -> S:
        """The server's state before round 1."""

    @abstractmethod
    def send(self, state: S, round: int, clients: Sequence[str]) -> Messages:
        """What the server sends to this round's clients; ``round`` counts from 1."""

    @abstractmethod
    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        """The clients' half, for a cohort. Sees nothing but the messages and the cohort."""

    @abstractmethod
    def receive(self, state: S, replies: Replies) -> S:
        """The state after the round, from its valid replies (at least one).

        Replies that are left unread are trained and counted all the same.
        """

    @abstractmethod
    def adapter(self, state: S) -> Tree:
        """The global adapter that the state stands for: every trainable tensor of the model."""

    def expects(self, sent: Message) -> Mapping[str, Tree]:
        """The trees that a reply to ``sent`` must hold, by name, shape and dtype: the same."""
        return sent.trees

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        """The complete adapters that these clients would use now, stacked.

        By default what ``adapter`` would give them: the message's tree ``adapter``. Strategies
        whose messages hold less, or whose clients keep something private, say otherwise.
        """
        return messages.trees["adapter"]


def available() -> dict[str, str]:
    """Strategies that ship with fedpeft: name -> first line of the file's docstring."""
    package = importlib.import_module("fedpeft.strategies")
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"fedpeft.strategies.{info.name}")
            found[info.name] = (inspect.getdoc(module) or "").split("\n")[0]
    return found


def load(name: str) -> type[Strategy[Any]]:
    """The strategy class of a module: ``fedavg`` ships with fedpeft, any other is the user's.

    The module must define exactly one ``Strategy``. Raises FedpeftError that lists what exists.
    """
    package = importlib.import_module("fedpeft.strategies")
    known = [module.name for module in pkgutil.iter_modules(package.__path__)]
    shipped, plain = name in known, "." not in name
    if plain and not shipped and not (name.isidentifier() and importlib.util.find_spec(name)):
        raise FedpeftError(f"strategy.name={name!r} does not exist. {suggest(name, known)}")
    path = f"fedpeft.strategies.{name}" if shipped else name
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        raise FedpeftError(
            f"strategy.name={name!r}: no module {error.name!r} on the Python path. Give the "
            f"name of an importable module, or one of: {', '.join(known)}."
        ) from None
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Strategy)
        and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise FedpeftError(
            f"strategy.name={name!r}: module {path} must define exactly one Strategy, found "
            f"{[c.__name__ for c in own]}."
        )
    return own[0]


def build(name: str, settings: Mapping[str, object]) -> Strategy[Any]:
    """A strategy with its settings checked against its own dataclass fields.

    Raises FedpeftError for an unknown setting (with the near name) or a value of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    kind = load(name)
    try:
        schema = OmegaConf.structured(kind)
        known = [str(key) for key in schema]
        for key, value in settings.items():
            if key not in known:
                raise FedpeftError(
                    f"strategy.{key}={value!r}: {name} has no such setting. {suggest(key, known)}"
                )
        made = OmegaConf.to_object(OmegaConf.merge(schema, dict(settings)))
    except OmegaConfBaseException as error:
        at, reason = error.full_key, str(error).split("\n")[0]
        given = f"strategy.{at}={settings.get(str(at))!r}" if at else f"strategy.name={name!r}"
        raise FedpeftError(f"{given} is refused by {name}: {reason}.") from None
    assert isinstance(made, Strategy)
    return made


__all__ = [
    "Adjust",
    "Cohort",
    "Fit",
    "Message",
    "Messages",
    "Problem",
    "Replies",
    "Strategy",
    "available",
    "build",
    "load",
    "weighted_mean",
]
