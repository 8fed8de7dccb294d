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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from fedpeft.errors import FedpeftError, suggest
from fedpeft.message import Message, Messages, Replies, gather, weighted_mean
from fedpeft.pruning.structure import Structure
from fedpeft.training import Adjust, Cohort, Expand, Fit, Route, Walk
from fedpeft.tree import Tree

S = TypeVar("S")
Key = TypeVar("Key", int, tuple[float, ...])


def _no_weight(layer: str) -> Tensor:
    """Raises FedpeftError."""
    raise FedpeftError(
        f"the pretrained weight of {layer!r} is not at hand here: choose a setting of the strategy "
        f"that does not need it."
    )


def _nothing_public() -> Tree:
    """Raises FedpeftError."""
    raise FedpeftError(
        "the strategy starts from a gradient on public data, and there are none: name a split that "
        "the server owns with data.public, or choose another start of the strategy."
    )


def _no_structure() -> Structure:
    """Raises FedpeftError."""
    raise FedpeftError(
        "the strategy prunes the model, and what can be pruned from it is not at hand here: choose "
        "a strategy that does not prune."
    )


@dataclass(frozen=True)
class Problem:
    """What a strategy may know before the first round.

    initial: every trainable tensor of the model as peft initialised it, float32.
    scaling: LoRA layer (the prefix of its tensors' names) -> s in ``W + s B A``; else empty.
    clients: names of all registered clients, ascending; there may be a million.
    rounds: rounds of the run. seed: the run's; derive streams with ``fedpeft.streams``. steps:
    optimizer steps of a client in a round, 0 where they depend on its data. lr: of these steps.
    weight: LoRA layer -> its pretrained weight ``[d_out, d_in]``, a copy in float32 on the CPU.
    public_gradients: the gradient of the mean loss over the server's own public data by these
    weights, at ``initial``: LoRA layer -> ``[d_out, d_in]``. structure: what can be pruned.
    """

    initial: Tree
    scaling: Mapping[str, float]
    clients: Sequence[str]
    rounds: int
    seed: int
    weight: Callable[[str], Tensor] = _no_weight
    public_gradients: Callable[[], Tree] = _nothing_public
    steps: int = 0
    lr: float = 0.0
    structure: Callable[[], Structure] = _no_structure


@dataclass(frozen=True)
class Effort:
    """What a client's training costs, beside that of the whole model with the whole adapter.

    pruned: share of the frozen base's products that it does not run, at least 0 and below 1.
    adapter: share of the adapter's weights that it trains, above 0 and at most 1. forward: examples
    (at most all that it has) whose loss it computes before training, and again after it. step:
    FLOPs of every optimizer step beside the model's.
    """

    pruned: float = 0.0
    adapter: float = 1.0
    forward: int = 0
    step: float = 0.0


def group_by(clients: Sequence[str], key: Callable[[str], Key]) -> list[tuple[str, ...]]:
    """The clients in groups of equal key, smallest key first; in their order within each."""
    found: dict[Key, list[str]] = {}
    for client in clients:
        found.setdefault(key(client), []).append(client)
    return [tuple(found[k]) for k in sorted(found)]


class Strategy(ABC, Generic[S]):
    """One federated algorithm: subclasses are final frozen dataclasses; fields are its settings.

    pools: a reference that trains on the union of all clients' data; not federated.
    remembers: clients keep private memory between rounds.
    shares: the result is one global adapter; without it every client ends with its own.
    exact: with LoRA, the state after a round stands for the weighted mean of the clients' dense
    updates, ``dW = sum_k p_k dW_k``; without it the mean of factors or something else.
    keeps: clients keep what the server once sent them (``Cohort.keep``).
    folds: the frozen base changes; ``base`` and ``followed`` say how.
    walks: clients train by ``Cohort.walk``, without gradients, in place of ``fit``.
    linear: ``receive`` reads replies only through means of their trees and scalars by the scalar
    ``weight`` (and who they are from); so they may be averaged in parts of that total weight.
    averages: what a lone client trained is the state after the round; without it the server takes
    a step of its own (a server optimizer, a merge of task vectors).
    codable: the numbers that it sends are weights or updates, which a codec may round; without it
    each means something by itself.
    tells: scalars that ``receive`` reads in replies, beside their weight.
    exchanges: how often in a round ``send``, ``train``, ``receive`` follow each other, with the
    clients whose replies to the exchange before were valid.
    """

    pools: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    shares: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    keeps: ClassVar[bool] = False
    folds: ClassVar[bool] = False
    walks: ClassVar[bool] = False
    averages: ClassVar[bool] = True
    codable: ClassVar[bool] = True
    tells: ClassVar[tuple[str, ...]] = ()
    exchanges: ClassVar[int] = 1

    @abstractmethod
    def init(self, problem: Problem) -> S:
        """The server's state before round 1."""

    @abstractmethod
    def send(self, state: S, round: int, clients: Sequence[str]) -> Messages:
        """What the server sends to these clients, one of ``groups``; ``round`` counts from 1."""

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

    def asks(self) -> frozenset[str]:
        """Which of ``gradients``, ``losses``, ``weight_gradients`` the clients are asked for.

        And ``steps``, where ``train`` gives ``Cohort.fit`` a number of its own; ``pruned``, where
        it prunes their models.
        """
        return frozenset()

    def needs(self) -> Mapping[str, object]:
        """What the recipe must say for the rule to hold: ``local.*`` or ``comms.up.feedback``."""
        return {}

    def left(self, messages: Messages, reply: Messages, cohort: Cohort) -> None:
        """On the clients, after ``train``: what leaves them, as the server will read it.

        That is what a codec makes of the reply: for a rule by which clients remember what arrives.
        """

    def groups(self, state: S, clients: Sequence[str]) -> list[tuple[str, ...]]:
        """A round's clients, divided so that within a group messages have equal names and shapes.

        Groups train one after another; ``send`` is called for each. By default all are one.
        """
        return [tuple(clients)]

    def expects(self, sent: Message) -> Mapping[str, Tree]:
        """The trees that a reply to ``sent`` must hold, by name, shape and dtype: the same."""
        return sent.trees

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        """The complete adapters that these clients would use now, stacked.

        By default what ``adapter`` would give them: the message's tree ``adapter``. Strategies
        whose messages hold less, or whose clients keep something private, say otherwise.
        """
        return messages.trees["adapter"]

    def figures(self, state: S) -> Mapping[str, float | Sequence[float]]:
        """What the last round's aggregate says of itself, for the run's record; {} for nothing."""
        return {}

    def efforts(self, state: S, clients: Sequence[str]) -> Mapping[str, Effort]:
        """What the next training will cost these clients; who is not named trains everything.

        For the fleet's clock (``fedpeft.fleet``); bytes it takes from the messages themselves.
        """
        return {}

    def told(self, state: S, times: Mapping[str, float]) -> S:
        """The state after a round, when the server has seen how long its clients took.

        times: client -> seconds from when it was sent its first message to when its last reply was
        there, by the fleet's clock; of the clients whose replies ``receive`` was given. Called once
        a round, after the last ``receive``, where the run has a fleet.
        """
        return state

    def pruned(self, messages: Messages, cohort: Cohort) -> Tree:
        """What these clients' models still have; goes with ``personal``. Empty: everything."""
        return {}

    def base(self, state: S) -> Tree:
        """How far the frozen weights are from the pretrained: LoRA layer -> ``[d_out, d_in]``."""
        return {}

    def followed(self, messages: Messages, cohort: Cohort) -> Tree:
        """``base`` as these clients have it, after the messages; goes with ``personal``."""
        return {}


def addressed(
    strategy: Strategy[S], state: S, round: int, clients: Sequence[str]
) -> list[Messages]:
    """A round's messages, one stack for each of the strategy's groups.

    Raises ValueError unless every client is in one group.
    """
    stacks = [strategy.send(state, round, group) for group in strategy.groups(state, clients)]
    if sorted(name for sent in stacks for name in sent.clients) != sorted(clients):
        raise ValueError(f"{type(strategy).__name__}.groups must have every client in one group")
    return stacks


def shipped() -> list[str]:
    """Names of the strategies that ship with fedpeft; none is imported."""
    package = importlib.import_module("fedpeft.strategies")
    return [module.name for module in pkgutil.iter_modules(package.__path__)]


def available() -> dict[str, str]:
    """Strategies that ship with fedpeft: name -> first line of the file's docstring."""
    found = {}
    for name in shipped():
        if not name.startswith("_"):
            module = importlib.import_module(f"fedpeft.strategies.{name}")
            found[name] = (inspect.getdoc(module) or "").split("\n")[0]
    return found


def load(name: str) -> type[Strategy[Any]]:
    """The strategy class of a module: ``fedavg`` ships with fedpeft, any other is the user's.

    The module must define exactly one ``Strategy``. Raises FedpeftError that lists what exists.
    """
    known = shipped()
    ours, plain = name in known, "." not in name
    if plain and not ours and not (name.isidentifier() and importlib.util.find_spec(name)):
        raise FedpeftError(f"strategy.name={name!r} does not exist. {suggest(name, known)}")
    path = f"fedpeft.strategies.{name}" if ours else name
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
    "Effort",
    "Expand",
    "Fit",
    "Message",
    "Messages",
    "Problem",
    "Replies",
    "Route",
    "Strategy",
    "Walk",
    "addressed",
    "available",
    "build",
    "gather",
    "group_by",
    "load",
    "shipped",
    "weighted_mean",
]
