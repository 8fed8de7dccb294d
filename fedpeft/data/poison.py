"""Poisoned training examples for chosen clients, and the test set that shows whether they worked.

For tests and studies of robust aggregation only. What a client is given instead is appended to the
population's examples, and only that client's numbers point at it: nobody else's examples change,
even where clients share some. Hold-outs and the test set stay as they are. The tokens are copied
once, also where they were views of a file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import numpy as np
import torch

from fedpeft.attacks.settings import Attack
from fedpeft.data.clients import ClientData, Clients, Pieces, Population
from fedpeft.data.examples import Examples
from fedpeft.data.fingerprint import sealed
from fedpeft.data.tokens import take
from fedpeft.errors import FedpeftError
from fedpeft.streams import numpy_stream


def poison(population: Population, attack: Attack, names: Collection[str], seed: int) -> Population:
    """The population in which the malicious clients ``names`` train on what ``attack`` makes.

    Has a fingerprint of its own, unless the attack is not one on data; then it is the same
    population. Raises FedpeftError where there are no classes, or they are too few.
    """
    attack.check()
    if attack.kind == "label_flip":
        return flip_labels(population, names)
    if attack.kind == "backdoor":
        return plant_trigger(population, attack, names, seed)
    return population


def flip_labels(
    population: Population, names: Iterable[str], classes: Collection[int] | None = None
) -> Population:
    """The clients ``names`` train on class ``classes[y]`` for y; C - 1 - y where it is None.

    Raises FedpeftError unless ``classes`` has one class number for each class.
    """
    count = _classes(population)
    other = np.array(range(count)[::-1] if classes is None else list(classes), np.int64)
    if len(other) != count or not 0 <= other.min() <= other.max() < count:
        raise FedpeftError(
            f"classes={other.tolist()}: must say for each of the {count} classes which it becomes, "
            f"from 0 to {count - 1}."
        )
    clients = [population.clients.find(name) for name in sorted(set(names))]
    numbers = np.concatenate([np.empty(0, np.int64), *(client.train for client in clients)])
    found = take(population.examples, numbers)
    assert found.labels is not None, "_classes has looked"
    flipped = replace(found, labels=torch.from_numpy(other)[found.labels])
    return _with(population, clients, [client.train >= 0 for client in clients], flipped)


def plant_trigger(
    population: Population, attack: Attack, names: Iterable[str], seed: int
) -> Population:
    """The clients ``names`` train ``attack.poisoned`` of their examples on the trigger's class.

    Which ones, at least one, is drawn by the seed and the client's name.
    """
    _check_trigger(attack, _classes(population), population.examples)
    clients = [population.clients.find(name) for name in sorted(set(names))]
    chosen = [_drawn(client, attack.poisoned, seed) for client in clients]
    numbers = [client.train[mine] for client, mine in zip(clients, chosen, strict=True)]
    found = take(population.examples, np.concatenate([np.empty(0, np.int64), *numbers]))
    return _with(population, clients, chosen, _written(found, attack))


def triggered(test: Examples, attack: Attack, labels: int) -> Examples:
    """The test examples of other classes with the trigger written in, labelled with its class.

    The accuracy on them is the attack's success rate. labels: how many classes there are. Raises
    FedpeftError where no test example is of another class.
    """
    _check_trigger(attack, labels, test)
    assert test.labels is not None, "classification has labels"
    others = np.flatnonzero(test.labels.numpy() != attack.target)
    if not len(others):
        raise FedpeftError(
            f"attack.target={attack.target}: all test examples are of this class, so that no "
            "success could be seen. Choose another class."
        )
    return _written(take(test, others), attack)


def _classes(population: Population) -> int:
    if population.task != "classification" or population.examples.labels is None:
        raise FedpeftError(
            f"data.task={population.task}: attacks on labels need classes. Set data.task="
            "classification, or take an attack.kind that changes updates."
        )
    return len(population.labels)


def _check_trigger(attack: Attack, classes: int, examples: Examples) -> None:
    attack.check()
    if attack.target >= classes:
        raise FedpeftError(
            f"attack.target={attack.target}: there are {classes} classes, give 0 to {classes - 1}."
        )
    limits = examples.limits
    if limits is not None and max(attack.trigger, default=0) >= limits.tokens:
        raise FedpeftError(
            f"attack.trigger={attack.trigger}: the store's tokens are below {limits.tokens}."
        )


def _drawn(client: ClientData, share: float, seed: int) -> np.ndarray:
    """Which of a client's training examples are poisoned, bool ``[n]``."""
    stream = numpy_stream(seed, "poison", client.name)
    chosen = np.zeros(len(client.train), bool)
    size = max(1, round(share * len(chosen))) if share else 0
    chosen[stream.choice(len(chosen), size=size, replace=False)] = True
    return chosen


def _written(examples: Examples, attack: Attack) -> Examples:
    """The examples with the trigger over the tokens from ``position`` on, all of class ``target``.

    Lengths stay, unless an example ends before the trigger does; it then ends with it. One that
    ends before ``position`` gets the trigger at its end. ``examples`` begin at token 0.
    """
    starts, lengths = examples.starts.numpy(), examples.lengths.numpy()
    begin = np.minimum(attack.position, lengths)
    longer = np.maximum(lengths, begin + len(attack.trigger))
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(longer)])
    tokens = np.empty(ends[-1], np.int32)
    moved = np.repeat(ends[:-1] - starts[:-1], lengths)
    tokens[np.arange(len(moved)) + moved] = examples.tokens.numpy()
    at = (ends[:-1] + begin)[:, None] + np.arange(len(attack.trigger))
    tokens[at] = attack.trigger
    labels = torch.full((len(lengths),), attack.target, dtype=torch.int64)
    return Examples(torch.from_numpy(tokens), torch.from_numpy(ends), labels, examples.pad)


def _with(
    population: Population,
    clients: list[ClientData],
    chosen: list[np.ndarray],
    made: Examples,
) -> Population:
    """The population in which ``made``, in the clients' order, replaces their chosen examples."""
    examples, everyone = population.examples, population.clients
    values, below = everyone.train.values.copy(), len(examples)
    for client, mine in zip(clients, chosen, strict=True):
        own = client.train.copy()
        own[mine] = np.arange(below, below + int(mine.sum()))
        below += int(mine.sum())
        start = everyone.train.starts[everyone.names.find(client.name)]
        values[start : start + len(own)] = own
    assert examples.labels is not None and made.labels is not None, "both were checked"
    limits = examples.limits
    if limits is not None and len(made):
        limits = replace(limits, longest=max(limits.longest, made.longest))
    joined = Examples(
        torch.cat([examples.tokens, made.tokens]),
        torch.cat([examples.starts, examples.starts[-1] + made.starts[1:]]),
        torch.cat([examples.labels, made.labels]),
        examples.pad,
        limits,
    )
    pieces = Pieces(values, everyone.train.starts)
    poisoned = Clients(everyone.names, pieces, everyone.holdout, below)
    return sealed(replace(population, clients=poisoned, examples=joined))
