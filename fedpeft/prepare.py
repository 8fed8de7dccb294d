"""From a recipe to everything a run trains with; the same in every process of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedpeft import sampling
from fedpeft.attacks.settings import Attack
from fedpeft.attacks.tampering import attackers
from fedpeft.base import check_foldable, gradients_by_weight, pretrained
from fedpeft.codecs.settings import feeds_back
from fedpeft.cohort.choose import choose_lane
from fedpeft.cohort.chunk import choose
from fedpeft.cohort.federation import CohortFederation, Settings
from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import Lane, LoopLane, speed_up
from fedpeft.cohort.self_check import check_per_example
from fedpeft.comms.downlink import Downlink
from fedpeft.comms.uplink import uplinks_of
from fedpeft.config import Comms, Local, Privacy, Recipe, SecureAggregation
from fedpeft.data.build import build_population, pool
from fedpeft.data.clients import ClientData, Clients, Population
from fedpeft.data.poison import poison
from fedpeft.data.store import is_store, verify_store
from fedpeft.data.store_writer import write_store
from fedpeft.data.stored import origin_of
from fedpeft.defence import Attackers, RobustRule
from fedpeft.errors import FedpeftError
from fedpeft.federation import Failure, Federation
from fedpeft.metrics import client_sums
from fedpeft.model import Network, attach, build_network, load_base, load_tokenizer, set_mode
from fedpeft.postprocess import Chain, Postprocessor
from fedpeft.privacy.client_level import ClientLevel
from fedpeft.privacy.compatibility import check_compatible
from fedpeft.privacy.randomness import Randomness
from fedpeft.privacy.record_level import RecordLevel
from fedpeft.privacy.terms import Terms, check_delta, clipped_for_sums, terms_of
from fedpeft.pruning.anatomy import structure_of
from fedpeft.robust.settings import Robust
from fedpeft.secure import SecureFederation
from fedpeft.strategy import Messages, Problem, Strategy, build
from fedpeft.tree import Tree
from fedpeft.walk import check_walk


@dataclass(frozen=True)
class Prepared:
    """A recipe's strategy, data, model and lane."""

    recipe: Recipe
    strategy: Strategy[Any]
    population: Population
    network: Network
    lane: Lane
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def terms(self) -> Terms | None:
        """What privacy the run promises, and by which mechanism; None for none."""
        if self.recipe.privacy.randomness == "seeded" and self.workers > 1:
            raise FedpeftError(
                f"privacy.randomness=seeded with {self.workers} workers would give each the same "
                f"noise: set engine.workers=1, or privacy.randomness=secure."
            )
        sizes = self.population.clients.roster.numbers
        return terms_of(self.recipe, sizes, self.strategy.exchanges)

    @cached_property
    def post(self) -> Chain:
        """What is done to messages beside the algorithm."""
        recipe, found = self.recipe, list[Postprocessor]()
        if self.downlink is not None:
            found.append(self.downlink)
        if self.terms is not None:
            found.append(self.terms.mechanism)
        if recipe.secure_aggregation.enabled and recipe.privacy.unit != "client":
            found.append(clipped_for_sums(recipe, Randomness.secure()))
        if recipe.robust.rule != "none":
            root = self._root if recipe.robust.rule == "fltrust" else None
            found.append(RobustRule(recipe.robust, root, self.network.scaling))
        if recipe.attack.kind != "none":
            bad = attackers(recipe.attack, self.population.clients.names, recipe.seed)
            found.append(Attackers(recipe.attack, bad, recipe.seed))
        found.extend(uplinks_of(recipe, self.network.digest))
        return Chain(tuple(found))

    @cached_property
    def downlink(self) -> Downlink | None:
        """What makes smaller what clients are sent, if anything does."""
        recipe = self.recipe
        if recipe.comms.down.codec == "none":
            return None
        network = self.network
        return Downlink(recipe.comms.down, recipe.seed, network.digest, network.initial)

    @property
    def remembers(self) -> bool:
        """Whether clients keep anything between rounds."""
        return self.strategy.remembers or self.strategy.keeps or self.post.remembers

    @property
    def level(self) -> ClientLevel | None:
        """What clips clients' updates, if anything does."""
        return next((link for link in self.post.links if isinstance(link, ClientLevel)), None)

    def secured(self, federation: Federation) -> Federation:
        """The federation, under secure aggregation where the recipe asks for it."""
        level, secure = self.level, self.recipe.secure_aggregation
        if not secure.enabled or level is None:
            return federation
        equal = self.recipe.rounds.weighting == "equal"
        return SecureFederation(federation, secure, level, equal)

    def _root(self, sent: Messages) -> Messages:
        """What training on the server's public examples makes of a message, as a client would."""
        examples = self.population.public
        if examples is None:
            raise FedpeftError(
                "robust.rule=fltrust compares updates with one that the server trains itself: name "
                "a split that it owns with data.public, or take another rule."
            )
        everything = np.arange(len(examples), dtype=np.int64)
        server = Clients.of([ClientData("server", everything, everything[:0])])
        own = dataclasses.replace(self.population, examples=examples, clients=server)
        settings = Settings(local_of(self.recipe), self.recipe.rounds, self.recipe.seed)
        federation = CohortFederation(
            self.network, self.lane, own, self.strategy, settings, 1, None
        )
        asked = dataclasses.replace(sent, clients=("server",))
        [reply] = federation.run(1, asked)
        if isinstance(reply, Failure):
            raise FedpeftError(
                f"robust.rule=fltrust: the server's own training failed: {reply.reason}"
            )
        return reply

    @property
    def settings(self) -> Settings:
        """What a client needs to train."""
        recipe, terms = self.recipe, self.terms
        mechanism = None if terms is None else terms.mechanism
        private = mechanism if isinstance(mechanism, RecordLevel) else None
        return Settings(local_of(recipe), recipe.rounds, recipe.seed, private, self.post)

    @property
    def problem(self) -> Problem:
        """What the strategy may know before round 1."""
        problem = Problem(
            initial=self.network.initial,
            scaling=self.network.scaling,
            clients=self.population.clients.names,
            rounds=self.recipe.rounds.count,
            seed=self.recipe.seed,
            weight=partial(pretrained, self.network),
            steps=self.recipe.local.steps,
            lr=self.recipe.local.lr,
            structure=partial(structure_of, self.network.model, self.network.scaling),
        )
        if self.population.public is None:
            return problem
        return dataclasses.replace(problem, public_gradients=self._public_gradients)

    def _public_gradients(self) -> Tree:
        """See ``Problem.public_gradients``."""
        examples, network, size = self.population.public, self.network, self.recipe.local.batch_size
        assert examples is not None, "only asked for where there are some"
        set_mode(network.model, True, False)
        at = {name: value[None].to(network.device) for name, value in network.initial.items()}
        lane = LoopLane(network.model)

        def sums(index: Tensor) -> tuple[Tensor, Tensor]:
            batch = examples.batch(index[None]).to(network.device)
            return client_sums(self.population.task, lane.logits(at, batch), batch)

        parts = torch.arange(len(examples)).split(size)
        return gradients_by_weight(network, [partial(sums, part) for part in parts])

    @property
    def gradients(self) -> Gradients:
        """The gradients of the clients' losses, under the recipe's local settings."""
        task, examples = self.population.task, self.population.examples
        return Gradients(self.lane, task, examples, local_of(self.recipe), self.network.device)

    @cached_property
    def chunk(self) -> int:
        """Clients in flight at once."""
        if isinstance(self.lane, LoopLane):
            return 1
        wanted = self.recipe.engine.chunk
        return wanted or choose(self.network, self.gradients, self.workers)

    @property
    def workers(self) -> int:
        """Processes of ``engine.kind=cohort`` that train at once; 1 is this one, without Ray."""
        engine, device = self.recipe.engine, self.network.device
        if engine.kind != "cohort":
            return 1
        every = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
        return engine.workers or max(1, every)

    def federation(self, on_chunk: Callable[[int, int], None] | None = None) -> CohortFederation:
        """The in-process federation of the run's clients; ``on_chunk`` as in CohortFederation."""
        return CohortFederation(
            self.network,
            self.lane,
            self.population,
            self.strategy,
            self.settings,
            self.chunk,
            on_chunk,
        )

    def resolved(self) -> Recipe:
        """The recipe with what was left to the machine written out.

        So a resume computes the same sums in the same order.
        """
        engine = self.recipe.engine
        engine = dataclasses.replace(
            engine,
            chunk=self.chunk,
            device=str(self.network.device),
            threads=torch.get_num_threads(),
            workers=engine.workers if engine.kind == "flower" else self.workers,
        )
        return dataclasses.replace(self.recipe, engine=engine)


def local_of(recipe: Recipe) -> Local:
    """Local training as it is done: private records are clipped one by one."""
    if recipe.privacy.unit != "record":
        return recipe.local
    return dataclasses.replace(recipe.local, clip_norm=recipe.privacy.clip_norm, clip_per="example")


def check_needs(recipe: Recipe, strategy: Strategy[Any]) -> None:
    """Raises FedpeftError where the recipe is not what the strategy's rule needs."""
    known = {f"local.{key}": value for key, value in vars(recipe.local).items()}
    known["comms.up.feedback"] = "always" if feeds_back(recipe.comms.up) else "never"
    for key, wanted in strategy.needs().items():
        if known[key] != wanted:
            raise FedpeftError(
                f"{key}={known[key]} with strategy.name={recipe.strategy.get('name')!r}: its rule "
                f"holds for {key}={wanted} alone. Set that, or use another strategy."
            )


def device_of(name: str) -> torch.device:
    """The device of ``engine.device``. Raises FedpeftError when CUDA is asked for and absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FedpeftError(
            f"engine.device={name!r} is no device: use auto, cpu, cuda or cuda:N."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FedpeftError(
            f"engine.device={name!r} but this machine has no usable CUDA device: use "
            f"engine.device=auto or cpu, or install a CUDA build of torch."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FedpeftError(
            f"engine.device={name!r} but there are only {torch.cuda.device_count()} CUDA devices."
        )
    return device


def build_strategy(recipe: Recipe) -> Strategy[Any]:
    """The recipe's strategy with its settings checked."""
    settings = {key: value for key, value in recipe.strategy.items() if key != "name"}
    return build(str(recipe.strategy.get("name", "fedavg")), settings)


def prepare(recipe: Recipe) -> Prepared:
    """Loads data and model, attaches the adapter and chooses the lane. Trains nothing."""
    device = device_of(recipe.engine.device)
    if recipe.engine.threads:
        torch.set_num_threads(recipe.engine.threads)
    strategy = build_strategy(recipe)
    check_compatible(recipe, strategy)
    if strategy.walks:
        check_walk(recipe.local)
    check_needs(recipe, strategy)
    tokenizer = load_tokenizer(recipe.model, recipe.data.task)
    population = build_population(recipe.data, recipe.partition, tokenizer, recipe.seed)
    bad = attackers(recipe.attack, population.clients.names, recipe.seed)
    population = poison(population, recipe.attack, bad, recipe.seed)
    if strategy.pools:
        population = pool(population)
    else:
        sampling.check(recipe.rounds.sampling, len(population.clients))
    network = prepare_network(recipe, population, device)
    return assemble(recipe, strategy, population, network, tokenizer)


def assemble(
    recipe: Recipe,
    strategy: Strategy[Any],
    population: Population,
    network: Network,
    tokenizer: PreTrainedTokenizerBase,
) -> Prepared:
    """What ``prepare`` makes of its parts, whatever they come from; chooses the lane."""
    check_delta(recipe.privacy, population.clients.roster.numbers)
    looped = recipe.engine.kind == "sequential"
    lane = LoopLane(network.model) if looped else choose_lane(network, population.examples)
    lane = speed_up(lane, recipe.engine)
    adapter = str(recipe.adapter.get("kind", "lora"))
    check_per_example(network, lane, population.examples, local_of(recipe), adapter)
    lane.set_precision(recipe.local.precision)
    if strategy.folds:
        check_foldable(network, str(recipe.strategy.get("name", "fedavg")))
    return Prepared(recipe, strategy, population, network, lane, tokenizer)


def prepare_store(recipe: Recipe, folder: str) -> Population:
    """Writes the recipe's clients into a new store and reads it back, every byte."""
    if is_store(recipe.data.source):
        raise FedpeftError(
            f"data.source={recipe.data.source!r} is a store already: copy the folder, or name the "
            "source that it was made from."
        )
    tokenizer = load_tokenizer(recipe.model, recipe.data.task)
    population = build_population(recipe.data, recipe.partition, tokenizer, recipe.seed)
    write_store(population, folder, origin_of(recipe, tokenizer))
    verify_store(folder)
    return population


def prepare_network(recipe: Recipe, population: Population, device: torch.device) -> Network:
    """The recipe's base model with its adapter, for the population's task and labels."""
    task, classes = population.task, len(population.labels)
    base = load_base(recipe.model, task, classes, population.examples.pad, recipe.seed, device)
    start = recipe.adapter.get("start")
    model = attach(base, recipe.adapter, task, recipe.seed)
    return build_network(model, task, classes, device, None if start is None else str(start))


def as_baseline(prepared: Prepared, name: str) -> Prepared:
    """The same model and data under another strategy (a reference such as ``local``).

    The reference gets the whole run's local training in one round, with every client that is
    measured: as many passes as a client makes on average over the federated run. It protects
    nobody.
    """
    recipe = prepared.recipe
    strategy = build(name, {})
    everyone = prepared.population.clients
    if strategy.pools:
        population = pool(prepared.population)
    else:
        names = sampling.measured(recipe.evaluation.most, everyone.roster, recipe.seed)
        own = Clients.of(everyone.find(name) for name in names)
        population = dataclasses.replace(prepared.population, clients=own)
    share = sampling.expected(recipe.rounds.sampling, len(everyone)) / len(everyone)
    passes = recipe.rounds.count * share
    local = recipe.local
    if local.steps:
        factor = len(everyone) if strategy.pools else 1
        local = dataclasses.replace(local, steps=max(1, round(local.steps * passes * factor)))
    else:
        local = dataclasses.replace(local, epochs=max(1, round(local.epochs * passes)))
    rounds = dataclasses.replace(
        recipe.rounds,
        count=1,
        failure_rate=0.0,
        sampling=dataclasses.replace(recipe.rounds.sampling, kind="uniform", fraction=1.0),
    )
    engine = dataclasses.replace(recipe.engine, chunk=prepared.chunk)
    changed = dataclasses.replace(
        recipe,
        strategy={"name": name},
        rounds=rounds,
        local=local,
        engine=engine,
        privacy=Privacy(),
        secure_aggregation=SecureAggregation(),
        comms=Comms(),
        robust=Robust(),
        attack=Attack(),
    )
    return dataclasses.replace(prepared, recipe=changed, strategy=strategy, population=population)
