"""The audit of a finished run: its recipe is trained again with canaries, then attacked.

Whatever ``engine.kind`` and ``engine.workers`` were, it trains in this process. The run's own
folder is read, and never written.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft import sampling, tree
from fedpeft.audit.bounds import LEVEL
from fedpeft.audit.canaries import Planted, plant, stream_of
from fedpeft.audit.evidence import evidence
from fedpeft.audit.inversion import recover, recovered_share
from fedpeft.audit.losses import losses
from fedpeft.audit.membership import auc_interval, roc
from fedpeft.audit.report import Finding
from fedpeft.config_load import parse_recipe
from fedpeft.data.clients import Population
from fedpeft.data.examples import Examples
from fedpeft.engine import Seam, play_round
from fedpeft.errors import FedpeftError
from fedpeft.events import Watcher
from fedpeft.federation import Failure
from fedpeft.prepare import Prepared, prepare
from fedpeft.privacy.outlook import promised
from fedpeft.record.folder import RunFolder
from fedpeft.strategy import Messages, addressed
from fedpeft.tree import Tree

FEWEST = 10
"""Canaries: with fewer, coins that all fall alike are no rarity, and nothing can be told."""

SOME = 2000
"""Training and test examples, of each, whose losses are compared."""


@dataclass(frozen=True)
class Settings:
    """How a run is audited.

    canaries: how many, each in or out by a coin. seed: of the canaries and coins (None: from the
    operating system). delta: of the bound on epsilon (None: the recipe's).
    """

    canaries: int = 200
    seed: int | None = 0
    delta: float | None = None


def audit_run(folder: str, settings: Settings, watcher: Watcher) -> list[Finding]:
    """Audits the run in ``folder``: one finding for each attack that applies.

    Raises FedpeftError where the folder is no run's, its data have changed, or its strategy has no
    global adapter to attack.
    """
    opened = RunFolder.open(Path(folder))
    prepared = prepare(parse_recipe(opened.recipe(), str(opened.path)))
    opened.check_data(prepared.population.fingerprint)
    return audit_prepared(prepared, settings, watcher)


def claimed(prepared: Prepared) -> float:
    """The epsilon that the run's recipe promises for one example; infinite without privacy.

    What holds for all data of a client holds for each of its examples.
    """
    if prepared.terms is None:
        return math.inf
    sizes = prepared.population.clients.roster.numbers
    return promised(prepared.terms, prepared.recipe, sizes)


def audit_prepared(prepared: Prepared, settings: Settings, watcher: Watcher) -> list[Finding]:
    """Trains ``prepared`` with canaries in its clients' data, and attacks what comes out.

    The attacker of the canaries and of training examples sees the first and the last global
    adapter; that of the text, one client's update in the last round.
    """
    name = str(prepared.recipe.strategy["name"])
    if not prepared.strategy.shares:
        raise FedpeftError(
            f"strategy.name={name!r} has no global adapter, so nothing that the audit could attack "
            f"leaves the clients: audit the run of another strategy."
        )
    if settings.canaries < FEWEST:
        raise FedpeftError(
            f"canaries={settings.canaries}: at least {FEWEST} are needed, and some hundreds for a "
            f"bound that says something; clients should keep more examples of their own."
        )
    planted = plant(prepared.population, settings.canaries, stream_of(settings.seed))
    trained = _Trained(prepared, planted.population, watcher)
    promise = claimed(trained.prepared)
    delta = prepared.recipe.privacy.delta if settings.delta is None else settings.delta
    findings = [
        *_canaries(trained, planted, promise, delta),
        _training_examples(trained, promise),
    ]
    text = _text(trained, promise)
    return [*findings, text] if text is not None else findings


class _Trained:
    """A run with ``population`` in place of its own, all rounds played; and a victim's update.

    The victim trains in the last round on its own data, without canaries, beside the run. update is
    None where its reply failed, or holds no tree as it was sent.
    """

    def __init__(self, own: Prepared, population: Population, watcher: Watcher) -> None:
        self.own = own
        self.prepared = prepared = dataclasses.replace(own, population=population)
        self.watcher = watcher
        self.update: Tree | None = None
        self.victim = _victim(own.population)
        recipe, strategy = prepared.recipe, prepared.strategy
        federation = prepared.federation(watcher.chunk_done)
        played, seam = prepared.secured(federation), Seam(prepared.post)
        self.state = strategy.init(prepared.problem)
        watcher.stage("audit", recipe.rounds.count)
        for number in range(1, recipe.rounds.count + 1):
            if number == recipe.rounds.count:
                self.update = _update(own, federation.memory(), self.state, number, self.victim)
            names = sampling.draw(recipe.rounds.sampling, federation.clients(), recipe.seed, number)
            tokens = sum(federation.tokens(name) for name in names)
            watcher.round_began(number, len(names), tokens)
            self.state, report = play_round(
                strategy, self.state, played, recipe.rounds, recipe.seed, number, seam
            )
            watcher.round_done(report, None)

    def gains(self, examples: Examples, index: np.ndarray) -> np.ndarray:
        """How much lower the loss of each example is after the run than before, ``[n]``, nats."""
        prepared, strategy = self.prepared, self.prepared.strategy
        before = losses(prepared.network, prepared.lane, prepared.network.initial, examples, index)
        adapter, base = strategy.adapter(self.state), strategy.base(self.state)
        after = losses(prepared.network, prepared.lane, adapter, examples, index, base)
        found: np.ndarray = before - after
        return found


def _canaries(trained: _Trained, planted: Planted, promise: float, delta: float) -> list[Finding]:
    gains = trained.gains(planted.population.examples, planted.index)
    found = evidence(gains, planted.included, delta)
    interval = (found.auc_low, found.auc_high)
    low = found.one_run
    return [
        Finding("loss of canaries", "auc", found.auc, interval, promise, None),
        Finding("epsilon by canaries", "epsilon", low, (low, math.inf), promise, low <= promise),
    ]


def _training_examples(trained: _Trained, promise: float) -> Finding:
    """Training examples against test examples: no coin decided, so it proves nothing of epsilon."""
    population = trained.prepared.population
    own = _some(np.unique(population.clients.train.values))
    other = _some(np.arange(len(population.test), dtype=np.int64))
    parts = (trained.gains(population.examples, own), trained.gains(population.test, other))
    member = np.repeat([True, False], [len(own), len(other)])
    area = roc(np.concatenate(parts), member).auc
    interval = auc_interval(area, len(own), len(other), LEVEL)
    return Finding("loss of training data", "auc", area, interval, promise, None)


def _some(numbers: np.ndarray) -> np.ndarray:
    """All of ``numbers``, or SOME of them, evenly spaced."""
    if len(numbers) <= SOME:
        return numbers
    return numbers[np.linspace(0, len(numbers) - 1, SOME).astype(np.int64)]


def _victim(population: Population) -> str:
    """The client with the fewest tokens to train on: its text is the easiest to read out."""
    clients = population.clients
    lengths = population.examples.lengths_of(clients.train.values)
    totals = np.concatenate([[0], np.cumsum(lengths)])[clients.train.starts]
    return clients.names[int(np.diff(totals).argmin())]


def _update(
    prepared: Prepared, memory: dict[str, dict[str, Tree]], state: Any, number: int, client: str
) -> Tree | None:
    """What the client's training in a round changes, all its trees as one.

    Where two trees have a tensor of the same name, it is the one that was sent first.
    """
    federation = prepared.federation()
    federation.restore(memory)
    (sent,) = addressed(prepared.strategy, state, number, [client])
    (reply,) = federation.run(number, sent)
    if isinstance(reply, Failure):
        return None
    assert isinstance(reply, Messages)
    found: Tree = {}
    for name, before in sent.trees.items():
        after = reply.trees.get(name, {})
        if after.keys() == before.keys():
            old, new = ({k: v[0].cpu() for k, v in t.items()} for t in (before, after))
            found = (new if prepared.level is not None else tree.sub(new, old)) | found
    return found or None


def _text(trained: _Trained, promise: float) -> Finding | None:
    """The words of the victim that its update gives away; None, and a note, where none can be."""
    prepared, client = trained.own, trained.victim
    if trained.update is None:
        trained.watcher.note(f"gradient inversion does not apply: {client} sends no update")
        return None
    examples = prepared.population.examples
    numbers = prepared.population.clients.find(client).train
    tokens, starts = examples.tokens, examples.starts
    texts = [tokens[int(starts[i]) : int(starts[i + 1])].tolist() for i in numbers.tolist()]
    try:
        found = recover(prepared.network, trained.update, max(map(len, texts)), len(texts))
    except FedpeftError as error:
        trained.watcher.note(str(error))
        return None
    share = recovered_share(found, texts)
    label = f"text of {client}"
    return Finding(label, "share", share, (math.nan, math.nan), promise, None)
