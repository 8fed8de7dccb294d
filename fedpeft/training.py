"""What a strategy may ask of its clients: local training, gradients, losses, memory.

The clients' half of an algorithm is written on a ``Cohort``, K clients at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from fedpeft.pruning.structure import Structure
from fedpeft.tree import Tree

Adjust = Callable[[Tree, Tree, Mapping[str, Tree]], Tree]
"""``(gradient, adapter, own) -> gradient``, all stacked; applied after clipping, before the step.

Its rows are the clients that step together, which may be some of the cohort's; ``own`` holds the
same clients' rows of the trees that ``Cohort.fit`` was given under that name.
"""

Expand = Callable[[Tree], Tree]
"""``trained -> the model's own trainable tensors``, stacked, row by row, differentiable.

What is trained may be other tensors than the model's: a core R with ``lora_B = B R``, the leading
rows of a factor. What works on tensors (steps, clipping, ``adjust``) works on what is trained. Rows
are the clients of a step, or examples: never mix them.
"""


@dataclass(frozen=True)
class Fit:
    """The result of local training.

    adapter: stacked, the names that ``fit`` was given. loss: mean training loss over the steps,
    nats per example or token, ``[K]``; NaN under privacy. steps: optimizer steps, ``[K]``.
    """

    adapter: Tree
    loss: Tensor
    steps: Tensor


@dataclass(frozen=True)
class Route:
    """Where clients walk.

    seeds: of the directions, int64 ``[K, tau]``, tau the recipe's ``local.steps``. reach: how far
    ahead and behind losses are compared. factors: on the recipe's learning rate, ``[K, tau]``
    (None: 1). cap: a step whose two losses differ by more is skipped.
    """

    seeds: Tensor
    reach: float
    factors: Tensor | None = None
    cap: float = math.inf


@dataclass(frozen=True)
class Walk:
    """The result of local training along seeded directions.

    adapter: stacked, the names that ``walk`` was given. moves: what a step moved by against its
    direction, ``[K, tau]``; 0 where it was skipped. loss: mean over the steps that were taken of
    the losses at both ends, ``[K]``; NaN where there was none, and under privacy.
    """

    adapter: Tree
    moves: Tensor
    loss: Tensor


class Cohort(ABC):
    """K clients that train in lockstep on one shared frozen model, each on its own data.

    clients: their names. weights: aggregation weights ``[K]`` (float64) as the recipe says.
    initial: every trainable tensor as peft initialised it, unstacked; never to be written. lr: the
    recipe's learning rate, which under plain SGD is the size of every step.
    Nothing of one client can reach another through a cohort.
    """

    clients: tuple[str, ...]
    weights: Tensor
    initial: Tree
    lr: float

    @abstractmethod
    def fit(
        self,
        start: Tree,
        *,
        fixed: Tree | None = None,
        adjust: Adjust | None = None,
        own: Mapping[str, Tree] | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
        steps: int | None = None,
    ) -> Fit:
        """Local training from ``start`` (stacked) with the recipe's optimizer, steps and batches.

        Exactly the tensors of ``start`` are trained; ``fixed`` (unstacked) holds the model's other
        trainable tensors, the same for all clients. Together they must name every trainable tensor
        of the model; with ``expand`` what it makes of ``start`` counts in place of ``start``.
        ``adjust`` maps the clipped gradient, e.g. a proximal term; what it needs of each client
        (stacked trees) comes through ``own``, never from outside. ``base`` changes the frozen
        weights for this call: LoRA layer -> dense update ``[d_out, d_in]``, the same for all
        clients. ``steps`` is the number of steps in place of the recipe's, the same for all.
        """

    @abstractmethod
    def walk(
        self,
        start: Tree,
        route: Route,
        *,
        fixed: Tree | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
    ) -> Walk:
        """Local training from ``start`` by forward passes alone, along directions from seeds.

        At step t client k moves by ``w <- w - m z`` with
        ``m = lr factor (l(w + reach z) - l(w - reach z)) / (2 reach)``, its mean loss l on the
        step's batch (that of ``fit``), and z ~ N(0, I) of ``seeds[k, t]`` in the tensors of
        ``start`` (see ``fedpeft.directions``). A step whose losses are not finite is skipped.
        Dropout is off. fixed, expand, base: as for ``fit``.
        """

    @abstractmethod
    def gradients(
        self,
        at: Tree,
        *,
        fixed: Tree | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
    ) -> Tree:
        """The gradient of each client's mean loss over all its training data by ``at``, stacked."""

    @abstractmethod
    def losses(
        self,
        at: Tree,
        *,
        fixed: Tree | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
        most: int | None = None,
    ) -> Tensor:
        """Each client's mean loss over its training data, ``[K]``; forward only.

        most: over the first so many examples alone, always the same ones.
        """

    @abstractmethod
    def weight_gradients(self, at: Tree, *, fixed: Tree | None = None) -> Tree:
        """The gradient of each client's mean loss by the frozen weights of all LoRA layers.

        LoRA layer -> ``[K, d_out, d_in]``, dense, on the CPU: K times the adapted weights.
        """

    @abstractmethod
    def structure(self) -> Structure:
        """What can be pruned from the model. Raises FedpeftError where nothing is known of it."""

    @abstractmethod
    def pruned(self, alive: Tree) -> AbstractContextManager[None]:
        """Inside the block every client's model lacks what it has pruned: part -> bool ``[K, G]``.

        For ``fit``, ``gradients`` and ``losses``. Tensors keep their shapes; entries of adapters
        that belong to nothing any more do nothing, and have gradient zero.
        """

    @abstractmethod
    def recall(self, name: str, default: Tree) -> Tree:
        """The clients' private memory ``name``, stacked; ``default``'s rows where there is none."""

    @abstractmethod
    def remember(self, name: str, value: Tree) -> None:
        """Keeps ``value`` (stacked) as the clients' private memory ``name`` for later rounds."""

    @abstractmethod
    def keep(self, name: str, version: int, value: Tree) -> None:
        """The clients keep ``value`` (unstacked) as version ``version`` of ``name``, from 1 up.

        For what the server gives to everybody and a client need not be sent twice: changes of the
        frozen base, a basis. Public, and one copy for all clients of a process. A version stands
        for one value: what is given for a version that somebody here keeps is not looked at.
        """

    @abstractmethod
    def kept(self, name: str, since: int) -> tuple[int, Tree]:
        """The newest version of ``name`` that is kept here, and its value; ``(0, {})`` if none.

        Raises FedpeftError where a client keeps a version older than ``since``. A client that keeps
        ``since`` may be given a newer one: in one process, others may have brought it there.
        """
