"""Loss and metrics of a model's outputs: per client inside a cohort, and as scores over a test set.

Both tasks have one loss: cross-entropy in nats, per example (classification) or per predicted
token (causal language modelling). A ``Tally`` adds up over batches; a ``Score`` is read from it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedpeft.data.clients import Task
from fedpeft.data.examples import IGNORED, Batch


def item_losses(task: Task, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy per item and which items count, both ``[K*b]`` or ``[K*b, T-1]``.

    logits: ``[K*b, C]``, or ``[K*b, P + T, V]`` where P >= 0 virtual tokens come before the text.
    Items that do not count have loss 0.
    """
    if task == "classification":
        target = batch.labels
        loss = cross_entropy(logits.float(), target, reduction="none", ignore_index=IGNORED)
        return loss, target != IGNORED
    text = logits[:, -batch.tokens.shape[1] :]
    target = batch.labels[:, 1:]
    flat = cross_entropy(
        text[:, :-1].float().flatten(0, 1), target.flatten(), reduction="none", ignore_index=IGNORED
    )
    return flat.view(target.shape), target != IGNORED


def client_sums(task: Task, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed loss and number of items per client, both ``[K]``; differentiable in ``logits``."""
    loss, counted = item_losses(task, logits, batch)
    shape = (batch.clients, -1)
    return loss.reshape(shape).sum(1), counted.reshape(shape).sum(1)


@dataclass(frozen=True)
class Score:
    """One model on one set of examples.

    items: examples (classification) or predicted tokens (causal language modelling). loss: nats
    per item. accuracy: share of items predicted exactly. macro_f1: unweighted mean of the F1 of
    the classes that occur among labels or predictions; NaN for language modelling. perplexity:
    exp(loss).
    """

    items: int
    loss: float
    accuracy: float
    macro_f1: float

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def as_dict(self) -> dict[str, float]:
        """Plain numbers for a JSON record."""
        return {**asdict(self), "perplexity": self.perplexity}


class Tally:
    """Adds up loss, hits and the confusion matrix of ``groups`` models or clients over batches.

    Everything stays on the device until ``scores`` is called.
    """

    def __init__(self, task: Task, classes: int, groups: int = 1) -> None:
        self._task = task
        self._classes = classes
        self._loss = torch.zeros(groups, dtype=torch.float64)
        self._items = torch.zeros(groups, dtype=torch.int64)
        self._hits = torch.zeros(groups, dtype=torch.int64)
        cells = groups * classes * classes if task == "classification" else 0
        self._confusion = torch.zeros(cells, dtype=torch.int64)

    def add(self, logits: Tensor, batch: Batch, group: Tensor) -> None:
        """Adds a batch; ``group`` int64 ``[K*b]`` says whom each row belongs to."""
        loss, counted = item_losses(self._task, logits, batch)
        target = batch.labels if self._task == "classification" else batch.labels[:, 1:]
        if self._task == "classification":
            guess = logits.argmax(-1)
            cell = (group.to(guess.device) * self._classes + target) * self._classes + guess
            found = torch.bincount(cell[counted].cpu(), minlength=len(self._confusion))
            self._confusion += found
        else:
            guess = logits[:, -batch.tokens.shape[1] :][:, :-1].argmax(-1)
        rows = (len(batch.tokens), -1)
        self._loss.index_add_(0, group.cpu(), loss.double().reshape(rows).sum(1).cpu())
        self._items.index_add_(0, group.cpu(), counted.reshape(rows).sum(1).cpu())
        hits = (guess == target) & counted
        self._hits.index_add_(0, group.cpu(), hits.reshape(rows).sum(1).cpu())

    def scores(self) -> list[Score]:
        """One score per group; a group without items has NaN figures."""
        found = []
        for g in range(len(self._items)):
            n = int(self._items[g])
            loss = float(self._loss[g]) / n if n else math.nan
            hits = int(self._hits[g]) / n if n else math.nan
            found.append(Score(n, loss, hits, self._macro_f1(g)))
        return found

    def _macro_f1(self, group: int) -> float:
        if self._task != "classification":
            return math.nan
        size = self._classes**2
        matrix = self._confusion[group * size : (group + 1) * size].view(self._classes, -1).double()
        true, said, right = matrix.sum(1), matrix.sum(0), matrix.diagonal()
        seen = (true + said) > 0
        return (
            float((2 * right[seen] / (true + said)[seen]).mean()) if bool(seen.any()) else math.nan
        )
